"""What calibration needs of a PyTorch model."""
