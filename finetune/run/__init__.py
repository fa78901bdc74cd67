"""A fine-tuning run from bundle to bundle."""
