"""Have the optimizers of a Keras model go on with other variables: the same objects, new slots for new variables only.

Code of the user's holds an optimizer, and its schedule may be a function that no config tells, so none is made anew.
It is built again for the variables there are now, as a new one is, and everything it had for those it knew goes back
to its place. Slots stand in lists parallel to the variables, as Keras's own build makes them.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from .strategy import beside


class Optimizers:
    """The optimizers that models hold, as they are before a change of ``layers``, which are all that those have."""

    def __init__(self, layers: Sequence[keras.Layer]) -> None:
        self._layers = layers
        self._found: list[tuple[keras.Model, Any]] = []
        for each in layers:
            for held in vars(each).values() if isinstance(each, keras.Model) else ():
                if isinstance(held, keras.optimizers.Optimizer) and held.built:
                    self._found.append((each, held))
        self._before = [_ids(each.trainable_variables) for each, _ in self._found]
        averaging = any(_averages(optimizer) for _, optimizer in self._found)
        weights = [v for layer in layers for v in layer._trainable_variables] if averaging else []
        self._values = {id(weight): (weight, np.array(keras.ops.convert_to_numpy(weight))) for weight in weights}

    def extend(self) -> None:
        """Have each know the variables there are now, and average from the weights what the change has set."""
        for (model, optimizer), before in zip(self._found, self._before, strict=True):
            known, now = list(optimizer._trainable_variables), model.trainable_variables
            wanted = now if _ids(known) == before else self._part(known)
            if _ids(wanted) != _ids(known):
                _rebuild(optimizer, wanted)
            for variable, average in _averages(optimizer):
                weight, value = self._values.get(id(variable), (variable, None))
                if value is None or not np.array_equal(keras.ops.convert_to_numpy(weight), value):
                    average.assign(ops.copy(variable))  # on JAX two variables may not share memory

    def _part(self, known: Sequence[Any]) -> list[Any]:
        """Return what an optimizer of a part of the model is for now: new variables are those of a layer it knows."""
        ids = set(_ids(known))
        owns = [layer._trainable_variables for layer in self._layers]
        held = {id(variable) for own in owns for variable in own}
        new = [v for own in owns if ids.intersection(_ids(own)) for v in own if id(v) not in ids]
        gone = {id(v) for v in known if id(v) not in held and id(v) in self._once_held}
        return [*(v for v in known if id(v) not in gone), *new]

    @property
    def _once_held(self) -> set[int]:
        return {each for ids in self._before for each in ids}


def _rebuild(optimizer: Any, variables: Sequence[Any]) -> None:
    """Build an optimizer for ``variables``, with the step, rates and slots that it has; if that fails, it is as was."""
    parts = [_Part(each) for each in _parts(optimizer)]
    try:
        for part in parts:
            part.forget()
        with beside(optimizer.variables):
            optimizer.build(list(variables))
        for part in parts:
            part.remember()
    except BaseException:
        for part in parts:
            part.restore()
        raise


class _Part:
    """One optimizer, which may be inside of another, and what it had."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._had = dict(vars(optimizer))
        self._variables = list(optimizer._variables)
        self._places = {optimizer._var_key(v): i for i, v in enumerate(optimizer._trainable_variables)}

    def forget(self) -> None:
        """Make it one that was not built yet."""
        self._optimizer.built = False
        self._optimizer._trainable_variables_indices = {}

    def remember(self) -> None:
        """Give what was built the place of what it had for the same variable."""
        optimizer, swapped = self._optimizer, {}
        optimizer.built = True
        replaced = {
            id(v) for name, had in self._had.items() if vars(optimizer).get(name) is not had for v in _flat(had)
        }
        new = [self._places.get(optimizer._var_key(v)) for v in optimizer._trainable_variables]
        for name, now in list(vars(optimizer).items()):
            had = self._had.get(name)
            if had is now or name in ("_variables", "_trainable_variables"):
                continue
            if isinstance(now, keras.Variable) and isinstance(had, keras.Variable):
                swapped[id(now)] = had
                setattr(optimizer, name, had)
            elif isinstance(now, list) and isinstance(had, list):
                if len(now) != len(new) or len(had) != len(self._places):
                    continue
                for index, place in enumerate(new):
                    if place is not None and isinstance(now[index], keras.Variable):
                        swapped[id(now[index])] = had[place]
                        now[index] = had[place]
        old = set(_ids(self._variables))
        before = [v for v in self._variables if id(v) not in replaced]
        self._track([*before, *(swapped.get(id(v), v) for v in optimizer._variables if id(v) not in old)])

    def restore(self) -> None:
        """Make it what it was."""
        vars(self._optimizer).clear()
        vars(self._optimizer).update(self._had)
        self._track(self._variables)

    def _track(self, variables: Sequence[Any]) -> None:
        """Have it list these variables as its own, in the order of a new one, which is that of saved files."""
        for variable in list(self._optimizer._variables):
            self._optimizer._untrack_variable(variable)
        for variable in variables:
            self._optimizer._track_variable(variable)


def _parts(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer and those inside it: of a loss scale's, or of one for each part of the variables."""
    yield optimizer
    inner = getattr(optimizer, "inner_optimizer", None)
    for each in (*([inner] if inner is not None else []), *getattr(optimizer, "optimizers", [])):
        yield from _parts(each)


def _averages(optimizer: Any) -> Iterator[tuple[Any, Any]]:
    """Yield each variable with its average, of optimizers that keep one."""
    for each in _parts(optimizer):
        if each.use_ema and each.built:
            pairs = zip(each._trainable_variables, each._model_variables_moving_average, strict=True)
            yield from ((variable, average) for variable, average in pairs if average is not None)


def _flat(held: Any) -> list[Any]:
    """Return the variables that an attribute holds."""
    return [v for v in keras.tree.flatten(held) if isinstance(v, keras.Variable)]


def _ids(variables: Any) -> list[int]:
    return [id(variable) for variable in variables]
