"""Training: the loop (pure torch), its checkpoints, and the Ray Train adapter around them."""
