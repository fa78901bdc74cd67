"""The seam: what any model can be asked, as a contract, and how PyTorch and Keras answer."""
