"""What every layer of every framework has to compute, in NumPy float64 from the formulas; see `CASES` and `golden`.

Arrays have the channels second. A framework's adapter builds the case's layer, calls it, and returns what it computed
under the names of `golden`; `check` compares.
"""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

EPS = 1e-5
MOMENTUM = 0.25
"""Weight of the new value in a running average."""

STEP = 1e-30
"""Of the complex step: f(x + ih) = f(x) + ih·f'(x) for analytic f, without a difference that could cancel digits."""

INPUTS = {
    "(N, C)": lambda rng: rng.normal(2, 3, (6, 5)),
    "(N, C, L)": lambda rng: rng.normal(2, 3, (4, 5, 7)),
    "2d": lambda rng: rng.normal(2, 3, (3, 5, 2, 6)),
    "3d": lambda rng: rng.normal(2, 3, (2, 5, 2, 3, 4)),
    "1x1 maps": lambda rng: rng.normal(2, 3, (4, 5, 1, 1)),
    "batch of one": lambda rng: rng.normal(2, 3, (1, 5, 4, 4)),
    "one channel": lambda rng: rng.normal(2, 3, (3, 1, 4, 4)),
    "prime number of channels": lambda rng: rng.normal(2, 3, (2, 13, 3, 3)),
    "constant": lambda _: np.full((2, 3, 4, 4), 12345.678),
    "mean far above deviation": lambda rng: rng.normal(1e4, 1, (3, 5, 4, 4)),
    "mean far above deviation (N, C)": lambda rng: rng.normal(1e4, 1, (16, 6)),
    "float16 around 600": lambda rng: rng.normal(600, 50, (2, 8, 4, 4)),
}
LAYERS = {
    "SN moving": ("sn", {"batch_statistics": "moving"}),
    "SN frozen": ("sn", {"batch_statistics": "frozen"}),
    "SN none": ("sn", {"batch_statistics": "none"}),
    "BRN": ("brn", {"r_max": 1e6, "d_max": 1e6}),
    "BRN clipped": ("brn", {"r_max": 1.25, "d_max": 0.25}),
}


@dataclass(frozen=True)
class Case:
    """A layer with its values, an input, and the gradient of its output."""

    layer: str
    input: str
    training: bool
    kind: str = field(init=False)
    options: dict[str, Any] = field(init=False, hash=False)
    x: Any = field(init=False, hash=False, compare=False)
    dy: Any = field(init=False, hash=False, compare=False)
    parameters: dict[str, Any] = field(init=False, hash=False, compare=False)
    statistics: dict[str, Any] = field(init=False, hash=False, compare=False)

    def __post_init__(self):
        rng = np.random.default_rng([len(self.input), len(self.layer)])
        kind, options = LAYERS[self.layer]
        dtype = np.float16 if "float16" in self.input else np.float32
        x = INPUTS[self.input](rng).astype(dtype)

        def uniform(size):
            return rng.uniform(0.5, 1.5, size).astype(np.float32)

        parameters = {"weight": uniform(x.shape[1]), "bias": uniform(x.shape[1])}
        statistics = {"running_mean": uniform(x.shape[1]), "running_var": uniform(x.shape[1])}
        statistics["running_mean"] += np.float32(x.astype(np.float64).mean())
        if kind == "sn":
            gates = 3 if options["batch_statistics"] != "none" else 2
            parameters |= {"mean_weight": uniform(gates), "var_weight": uniform(gates)}
            statistics = statistics if gates == 3 else {}
        for name, value in {
            "kind": kind,
            "options": options,
            "x": x,
            "dy": rng.normal(size=x.shape).astype(dtype),
            "parameters": parameters,
            "statistics": statistics,
        }.items():
            object.__setattr__(self, name, value)

    def __str__(self):
        return f"{self.layer}, {self.input}, {'training' if self.training else 'inference'}"


CASES = [Case(layer, x, training) for layer in LAYERS for x in INPUTS for training in (True, False)]


@cache
def golden(case):
    """Return the output ``y``, the running statistics after the call, and the gradients of x and each parameter."""
    y, statistics = _call(case, {"x": case.x, **case.parameters})
    gradients = {"x": _derivative(case, "x"), **{name: _derivative(case, name) for name in case.parameters}}
    return {"y": y.real, **statistics, **{f"d {name}": value for name, value in gradients.items()}}


def check(case, found):
    """Compare what a framework computed: 1e-5 of the largest value, or half precision where the result is half.

    Batch Renormalization at inference is the framework's own BatchNorm, which rounds to the spacing of floats at x.
    """
    expected = golden(case)
    rounding = {}
    if case.kind == "brn" and not case.training:
        spacing = 2 * float(np.spacing(np.abs(case.x).astype(np.float32).max()))
        rounding = {"y": spacing, "d weight": spacing * float(np.abs(case.dy).astype(np.float64).sum())}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        array = np.asarray(found[name])
        half = case.x.dtype == np.float16 and name in ("y", "d x")
        assert array.dtype == (np.float16 if half else np.float32), f"{name} is {array.dtype}"
        tolerance = float(np.finfo(np.float16).eps) if half else 1e-5
        limit = tolerance * max(1.0, float(np.abs(value).max())) + rounding.get(name, 0.0)
        np.testing.assert_allclose(array.astype(np.float64), value, rtol=0, atol=limit, err_msg=f"{case}: {name}")


def switch_norm(x, weight, bias, mean_weight, var_weight, running_mean=None, running_var=None, *, live=False):
    """Switchable Normalization (Luo et al., section 3) with the batch's statistics, if ``live``, or the running."""
    maps, batch = tuple(range(2, x.ndim)), (0, *range(2, x.ndim))
    layer = _moments(x, tuple(range(1, x.ndim)))
    parts = [_moments(x, maps) if maps else layer, layer]
    if live:
        parts.append(_moments(x, batch))
    elif running_mean is not None:
        parts.append((_channels(running_mean, x), _channels(running_var, x)))
    mean = sum(w * part[0] for w, part in zip(_softmax(mean_weight), parts, strict=True))
    var = sum(w * part[1] for w, part in zip(_softmax(var_weight), parts, strict=True))
    return _channels(weight, x) * (x - mean) / np.sqrt(var + EPS) + _channels(bias, x)


def batch_renorm(x, weight, bias, running_mean, running_var, *, r_max, d_max):
    """Batch Renormalization in training (Ioffe, algorithm 1), with r and d as constants."""
    mean, var = _moments(x, (0, *range(2, x.ndim)))
    sigma, running_sigma = np.sqrt(var + EPS), np.sqrt(_channels(running_var, x) + EPS)
    r = np.clip(sigma.real / running_sigma, 1 / r_max, r_max)
    d = np.clip((mean.real - _channels(running_mean, x)) / running_sigma, -d_max, d_max)
    return _channels(weight, x) * ((x - mean) / sigma * r + d) + _channels(bias, x)


def _call(case, values):
    """Return the output and the running statistics that the call leaves."""
    values = {name: np.asarray(value, complex if np.iscomplexobj(value) else float) for name, value in values.items()}
    statistics = {name: value.astype(np.float64) for name, value in case.statistics.items()}
    live = case.training and case.options.get("batch_statistics", "moving") == "moving"
    if case.kind == "sn":
        y = switch_norm(**values, **statistics, live=live)
    elif live:
        y = batch_renorm(**values, **statistics, **case.options)
    else:
        x, mean, var = values["x"], statistics["running_mean"], statistics["running_var"]
        y = (x - _channels(mean, x)) / np.sqrt(_channels(var, x) + EPS)
        y = _channels(values["weight"], x) * y + _channels(values["bias"], x)
    if live and statistics:
        mean, var = (part.real.ravel() for part in _moments(values["x"], (0, *range(2, values["x"].ndim))))
        if case.kind == "brn":  # the average is of σ
            sigma = _moved(np.sqrt(statistics["running_var"] + EPS), np.sqrt(var + EPS))
            statistics["running_var"] = sigma**2 - EPS
        else:
            statistics["running_var"] = _moved(statistics["running_var"], var)
        statistics["running_mean"] = _moved(statistics["running_mean"], mean)
    return y, statistics


def _derivative(case, name):
    """Return the derivative of the sum of dy·y, by a complex step in each element."""
    values = {"x": case.x, **case.parameters}
    base = values[name].astype(complex)
    result = np.empty(base.shape)
    for index in np.ndindex(base.shape):
        stepped = base.copy()
        stepped[index] += 1j * STEP
        y, _ = _call(case, {**values, name: stepped})
        result[index] = (y.imag * case.dy.astype(np.float64)).sum() / STEP
    return result


def _moments(x, axes):
    mean = x.mean(axes, keepdims=True)
    return mean, ((x - mean) ** 2).mean(axes, keepdims=True)


def _channels(vector, x):
    return np.reshape(vector, (1, -1, *[1] * (x.ndim - 2)))


def _softmax(logits):
    exponentials = np.exp(logits)
    return exponentials / exponentials.sum()


def _moved(old, new):
    return old + MOMENTUM * (new - old)
