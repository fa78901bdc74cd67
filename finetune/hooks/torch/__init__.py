"""What the hooks do to a PyTorch model."""
