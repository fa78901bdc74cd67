"""A page that shows people what a bundle, a run or an ONNX file is: one HTML file that asks for nothing else."""
