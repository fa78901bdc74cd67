"""Small objects a training loop calls once a step, and what it learns from."""
