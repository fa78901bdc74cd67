"""Keras models as ONNX graphs."""
