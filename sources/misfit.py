"""Weights that do not fit a model, told in one message."""

from collections.abc import Sequence

from ..errors import InputError, listed, spoken


def patched_way_out() -> str:
    """Return what to do with weights that a plain model does not take since another network's norms are in them."""
    way = spoken("normswap patch MODEL --to KIND --weights FILE", "normswap.load_weights")
    return f"they look like a patched network's: load them into the patched model ({way}), or give the bundle"


def _without_them() -> str:
    """Return what to do with a file in which all fits, and there is more: a head, or another, larger network."""
    code = spoken("give file.py:callable, a function that loads", "in code of your own load")
    return f"if the network is right without them, {code} of the file what it needs"


class PatchedWeightsError(InputError):
    """The weights do not fit since they are those of a network whose BatchNorms have been replaced."""


def misfit(
    origin: str,
    missing: Sequence[str],
    unexpected: Sequence[str],
    shapes: Sequence[str],
    types: Sequence[str] = (),
    *,
    patched: bool = False,
) -> InputError:
    """Return the error that lists what is missing in ``origin``, unexpected there, or of another shape or type.

    With ``patched`` it is a `PatchedWeightsError`, which tells the way out; so is told where there is more alone.
    """
    superset = unexpected and not (missing or shapes or types or patched)
    parts = [
        _listing("missing", missing),
        _listing("unexpected", unexpected),
        _listing("other shape", shapes),
        _listing("other type", types),
        f"  {patched_way_out()}" if patched else f"  {_without_them()}" if superset else "",
    ]
    error = PatchedWeightsError if patched else InputError
    return error(f"expected weights that fit the model, received {origin}:\n" + "\n".join(filter(None, parts)))


def _listing(label: str, names: Sequence[str]) -> str:
    return f"  {label} ({len(names)}):\n{listed(names, '    ')}" if names else ""
