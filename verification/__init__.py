"""The proof that an ONNX file computes what a model computes; nothing here writes one."""
