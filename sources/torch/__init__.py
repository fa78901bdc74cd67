"""What PyTorch keeps on disk."""
