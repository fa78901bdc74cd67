"""PyTorch module trees, traced graphs and exported programs."""
