"""What tests of every room say in the same way."""

import json
import re

from click.testing import CliRunner

from normswap.cli import main


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


def commanded(*arguments):
    """Run a command; returns its exit code, what it prints with --json, and what it says to people."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, json.loads(result.stdout) if "--json" in arguments else None, result.stderr


def bits(arrays):
    """Everything there is to know of each array, for comparison."""
    return {name: (array.shape, array.dtype, array.tobytes()) for name, array in arrays.items()}
