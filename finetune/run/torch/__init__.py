"""How a run trains a PyTorch model."""
