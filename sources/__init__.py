"""Where models and data come from and where bundles go, with safe reading and atomic writing."""
