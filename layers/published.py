"""The arguments of other systems' layers under the names and values they have here."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, TypeVar, cast

Argument = Callable[[Any], Mapping[str, Any] | str]
"""What a value is here: arguments by name, none where it is how a layer computes anyway; or what to expect instead."""

Init = TypeVar("Init", bound=Callable[..., None])


def renamed(name: str) -> Argument:
    """Return the argument that is called ``name`` here, and takes the same values."""
    return lambda value: {name: value}


def only(default: Any, instead: str) -> Argument:
    """Return the argument whose one value here is ``default``; ``instead`` says what to expect of others."""
    return lambda value: {} if value == default else instead


SWITCHABLENORMS: Mapping[str, Argument] = {
    "last_gamma": renamed("zero_init"),
    "using_bn": lambda value: {"batch_statistics": "moving" if value else "none"},
    "using_moving_average": only(
        True, "averages over batches to be taken after training, by normswap.finetune.update_statistics(model, batches)"
    ),
}
"""Arguments of switchablenorms' SwitchNorm1d, 2d and 3d and of its SyncSwitchableNorm2d."""

KERAS_SWITCHNORM: Mapping[str, Argument] = {
    "final_gamma": renamed("zero_init"),
    "mean_weights_initializer": renamed("mean_weight_initializer"),
    "variance_weights_initializer": renamed("var_weight_initializer"),
    "mean_weights_regularizer": renamed("mean_weight_regularizer"),
    "variance_weights_regularizer": renamed("var_weight_regularizer"),
    "mean_weights_constraints": renamed("mean_weight_constraint"),
    "variance_weights_constraints": renamed("var_weight_constraint"),
}
"""Arguments of keras-switchnorm's SwitchNormalization."""

BATCH_RENORMALIZATION: Mapping[str, Argument] = {
    "r_max_value": renamed("r_max"),
    "d_max_value": renamed("d_max"),
    "gamma_init": renamed("gamma_initializer"),
    "beta_init": renamed("beta_initializer"),
    "mode": lambda value: (
        "a norm of each sample to be a keras.layers.LayerNormalization"
        if value == 1
        else only(0, "the batch's statistics at inference to be asked for by a call, model(x, training=True)")(value)
    ),
}
"""Arguments of BatchRenormalization, of both its versions."""


def takes(
    system: str | None, theirs: Mapping[str, Argument], others: Mapping[str, Argument], last: str = ""
) -> Callable[[Init], Init]:
    """Return the decorator of an ``__init__`` that takes a system's arguments with ``compat=system``.

    Without it, and for ``others``, the names that arguments have here are told. ``last`` is the last argument up to
    which theirs are in the order of ours.

    Raises `TypeError` for an argument that is called otherwise here, that there is not, or that is given twice, and
    with ``compat`` for one behind ``last`` without its name.
    """

    def decorate(init: Init) -> Init:
        signature = inspect.signature(init)
        shared = list(signature.parameters).index(last) + 1 if last else 0

        @wraps(init)
        def translating(*args: Any, **kwargs: Any) -> None:
            if system is not None and kwargs.get("compat") == system and len(args) > shared:
                raise TypeError(
                    f"{type(args[0]).__name__}: expected arguments behind {last} by name with compat={system!r}, whose "
                    f"layer has them in another order, received {len(args) - shared} without"
                )
            published = {name: kwargs.pop(name) for name in [*kwargs] if name in theirs or name in others}
            if published:
                layer, given = type(args[0]).__name__, signature.bind_partial(*args, **kwargs).arguments
                compat = given.get("compat")
                for name, value in published.items():
                    taken = compat is not None and compat == system and name in theirs
                    known = theirs if name in theirs else others
                    kwargs |= _here(layer, name, value, known[name], system if name in theirs else None, taken, given)
            init(*args, **kwargs)

        translating.__signature__ = signature  # type: ignore[attr-defined]
        return cast(Init, translating)

    return decorate


def _here(
    layer: str, name: str, value: Any, argument: Argument, system: str | None, taken: bool, given: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Return what an argument is here, if it is taken."""
    received = f"{name}={value!r}"
    own = argument(value)
    if isinstance(own, str):
        raise TypeError(f"{layer}: expected {own}, received {received}; leave it out")
    if not taken:
        way = f"; compat={system!r} takes it as well" if system is not None else ""
        said = ", ".join(f"{n}={v!r}" for n, v in own.items())
        if own:
            raise TypeError(f"{layer}: expected {said}, as it is called here, received {received}{way}")
        raise TypeError(f"{layer}: expected no {name}, as {received} is how it computes, received it{way}")
    if twice := [n for n in own if n in given]:
        raise TypeError(
            f"{layer}: expected {name} or {twice[0]}, which are the same, received {received} and "
            f"{twice[0]}={given[twice[0]]!r}"
        )
    return own
