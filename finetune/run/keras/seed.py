"""What Keras draws the weights of new layers from."""

import keras


def seed(number: int) -> None:
    """Let the weights of a model that is built next depend on ``number`` alone."""
    keras.utils.set_random_seed(number % 2**32)
