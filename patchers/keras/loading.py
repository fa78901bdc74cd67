"""Let a patched Keras model take weights whole or not at all.

Keras loads a file layer by layer and raises at the end. Of weights of the model before the patch the kernels would be
in place by then, without what their norms count on. With ``skip_mismatch=True``, and where a file lacks a list within a
list, it only warns. While layers of a model are replaced, its ``load_weights`` therefore looks whether all of them got
their weights, and takes everything back where one did not.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, update_wrapper
from typing import Any

import keras

from ...errors import InputError, listed
from ...frameworks.keras import distinct_layers, named_layers, override, snapshot
from .equalized import BIASED
from .swap import MARK


def keep_whole(model: keras.Layer) -> None:
    """Have every model within load weights whole or not at all, or as ever where no layer is replaced."""
    for each in distinct_layers(model):
        if isinstance(each, keras.Model):
            if isinstance(each.__dict__.get("load_weights"), _Whole):
                del each.__dict__["load_weights"]
            if _changed(each):
                each.__dict__["load_weights"] = _Whole(each)


def _changed(model: keras.Model) -> dict[str, keras.Layer]:
    """Return the layers whose variables are others than before the patch by name."""
    return {name: each for name, each in named_layers(model) if MARK in each.__dict__ or BIASED in each.__dict__}


class _Whole:
    """The ``load_weights`` of a patched model."""

    def __init__(self, model: keras.Model) -> None:
        self.model, self.load = model, model.load_weights
        update_wrapper(self, self.load)

    def __call__(self, filepath: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as Keras does; where that fails, or a layer that the patch has changed is left out, change nothing.

        Raises `InputError` for such a layer, and what Keras raises for others.
        """
        optimizer = getattr(self.model, "optimizer", None)
        restores = [snapshot(each) for each in (self.model, optimizer) if each is not None]
        result = failure = None
        try:
            with _counting(_changed(self.model)) as left_out:
                try:
                    result = self.load(filepath, *args, **kwargs)
                except Exception as error:
                    failure = error
                if names := left_out():
                    raise InputError(
                        f"expected weights of the patched model, received {filepath}, which do not fit layers that it "
                        "changed; load a BatchNorm model's weights before the patch, and a bundle by "
                        f"normswap.load:\n{listed(names)}"
                    ) from failure
            if failure is not None:
                raise failure
        except BaseException:
            for restore in restores:
                restore()
            raise
        return result


@contextmanager
def _counting(layers: Mapping[str, keras.Layer]) -> Iterator[Callable[[], list[str]]]:
    """Give a function that returns which of the layers were to load weights within the context and did not."""
    tried: set[str] = set()
    loaded: set[str] = set()

    def spy(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def load(store: Any) -> None:
            tried.add(name)
            run(store)
            loaded.add(name)

        return load

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(override(layer, "load_own_variables", partial(spy, name)))
        yield lambda: [name for name in layers if name in tried - loaded]
