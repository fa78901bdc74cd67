"""What calibration needs of a Keras model."""
