"""The stages of the pipeline, one module each; `python -m tasks.<stage>` runs one."""
