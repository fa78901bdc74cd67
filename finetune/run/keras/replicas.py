"""The replicas of a TensorFlow strategy, among which a batch is divided."""

from typing import Any

import keras


def replicas() -> int:
    """Return among how many replicas the active strategy divides a batch."""
    if keras.backend.backend() != "tensorflow":
        return 1
    import tensorflow as tf

    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def summed(gradients: list[Any]) -> list[Any]:
    """Return the sums of gradients over all replicas."""
    if replicas() == 1:
        return gradients
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return list(context.all_reduce(tf.distribute.ReduceOp.SUM, gradients))
