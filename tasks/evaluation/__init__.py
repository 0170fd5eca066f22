"""Evaluation: one protocol, the same for every family."""
