"""A patched model on disk: its weights, how it was made, and the original it was made from."""
