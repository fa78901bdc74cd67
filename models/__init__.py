"""The networks that the norms were published with, for PyTorch (`torch`) and Keras (`keras`), with any of the norms."""
