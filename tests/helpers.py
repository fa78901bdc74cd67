"""What tests of every room say in the same way."""

import re


def exactly(message):
    """A pattern that matches ``message`` and nothing else."""
    return f"^{re.escape(message)}$"


def refusal(*lines):
    """The whole message about sites that cannot be replaced, one line each."""
    return "\n".join(
        (
            f"expected BatchNorms that can be replaced, received {len(lines)} that cannot:",
            *(f"  {line}" for line in lines),
            "leave such a layer as it is with exclude='NAME'",
        )
    )


def bits(arrays):
    """Everything there is to know of each array, for comparison."""
    return {name: (array.shape, array.dtype, array.tobytes()) for name, array in arrays.items()}
