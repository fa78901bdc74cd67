"""PyTorch modules as ONNX graphs."""
