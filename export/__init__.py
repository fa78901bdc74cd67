"""A patched model to a folded ONNX file, and the proof that the file computes the same."""
