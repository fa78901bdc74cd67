"""Where models and files come from, with safe reading and atomic writing."""
