"""What the hooks do to a Keras model."""
