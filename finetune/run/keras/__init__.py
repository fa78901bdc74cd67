"""How a run trains a Keras model."""
