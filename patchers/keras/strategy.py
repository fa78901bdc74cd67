"""Make new variables where those of a model are: under its distribution strategy, as TensorFlow asks for."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


def beside(variables: Iterable[Any]) -> AbstractContextManager[Any]:
    """Return the context in which to make variables that belong to these, also outside of their strategy's scope.

    A variable made outside it has one value for all replicas, which neither layer nor optimizer can use with the rest.
    """
    for variable in variables:
        strategy = getattr(variable.value, "distribute_strategy", None)
        if strategy is not None and hasattr(variable.value, "values"):
            import tensorflow as tf

            return nullcontext() if tf.distribute.get_strategy() is strategy else strategy.scope()
    return nullcontext()
