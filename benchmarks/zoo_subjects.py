"""A network under test in its framework: what `zoo_checks` asks of PyTorch's and of Keras's alike."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from zoos import Network

from normswap import Inputs

MEANS, VARIANCES = 0.2, (0.5, 2.0)
"""Running means are drawn from a normal distribution of this spread, variances uniformly between these."""


def subject_of(build: Callable[[], Network], seed: int) -> "Subject":
    """Build a network with random weights and running statistics."""
    random.seed(seed)
    np.random.seed(seed)
    import torch

    torch.manual_seed(seed)
    network = build()
    kind: type[Subject] = Torch if isinstance(network.model, torch.nn.Module) else Keras
    subject = kind(network.model, network.example)
    subject.randomize(np.random.default_rng(seed))
    return subject


class Subject(ABC):
    """A model and the arguments of a call of it."""

    def __init__(self, model: Any, example: Inputs) -> None:
        self.model, self.example = model, example

    @abstractmethod
    def randomize(self, generator: np.random.Generator) -> None:
        """Draw running statistics, which are 0 and 1 in a network that has not been trained."""

    @abstractmethod
    def norms(self) -> list[str]:
        """Return the names of the layers that are BatchNorms."""

    @abstractmethod
    def outputs(self) -> list[np.ndarray]:
        """Return all floating outputs at inference."""

    @abstractmethod
    def weights(self) -> dict[str, np.ndarray]:
        """Return all of the model's state by name."""

    @abstractmethod
    def put(self, state: dict[str, np.ndarray]) -> None:
        """Set all of the model's state."""

    @abstractmethod
    def step(self) -> list[str]:
        """Train for one step, and return the names of weights without a finite gradient, of layers that have run."""

    @abstractmethod
    def export(self, path: str) -> None:
        """Write an ONNX file by the framework's own exporter."""


class Torch(Subject):
    """A module: one step of SGD on the mean square of all outputs, in train mode where it takes no targets there."""

    def randomize(self, generator: np.random.Generator) -> None:  # noqa: D102
        import torch

        for module in self.model.modules():
            if isinstance(mean := getattr(module, "running_mean", None), torch.Tensor) and hasattr(
                module, "running_var"
            ):
                with torch.no_grad():
                    mean.copy_(torch.from_numpy(generator.normal(0, MEANS, mean.shape)))
                    module.running_var.copy_(torch.from_numpy(generator.uniform(*VARIANCES, mean.shape)))
        self.model.eval()

    def norms(self) -> list[str]:  # noqa: D102
        from torch.nn.modules.batchnorm import _BatchNorm

        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, _BatchNorm) or "FrozenBatchNorm" in type(module).__name__
        ]

    def outputs(self) -> list[np.ndarray]:  # noqa: D102
        import torch

        self.model.eval()
        torch.manual_seed(0)
        with torch.no_grad():
            return [y.float().numpy() for y in _floating(self._call())]

    def weights(self) -> dict[str, np.ndarray]:  # noqa: D102
        return {name: value.detach().clone().numpy() for name, value in self._state()}

    def put(self, state: dict[str, np.ndarray]) -> None:  # noqa: D102
        import torch

        with torch.no_grad():
            for name, value in self._state():
                value.copy_(torch.from_numpy(np.asarray(state[name])))

    def step(self) -> list[str]:  # noqa: D102
        import torch

        torch.manual_seed(0)
        self.model.train()
        ran: set[torch.nn.Module] = set()
        hooks = [each.register_forward_hook(lambda each, *_: ran.add(each)) for each in self.model.modules()]
        try:
            outputs = list(_floating(self._call()))
        except Exception:  # detectors ask for targets in train mode
            self.model.eval()
            outputs = list(_floating(self._call()))
        loss = sum((y.float() ** 2).mean() for y in outputs if y.requires_grad and y.numel())
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], 1e-4)
        optimizer.zero_grad()
        loss.backward()
        for hook in hooks:
            hook.remove()
        lacking = [
            f"{place}.{name}"
            for place, module in self.model.named_modules()
            if module in ran
            for name, weight in module.named_parameters(recurse=False)
            if weight.requires_grad and (weight.grad is None or not bool(weight.grad.isfinite().all()))
        ]
        optimizer.step()
        optimizer.zero_grad()
        return lacking

    def export(self, path: str) -> None:  # noqa: D102
        import torch

        self.model.eval()
        own = self.example.map(lambda x: x)
        torch.onnx.export(self.model, own.args, path, kwargs=own.kwargs, dynamo=True, opset_version=20, verbose=False)

    def _call(self) -> Any:
        own = self.example.map(lambda x: x)  # lists of its own: some models write into what they are given
        return self.model(*own.args, **own.kwargs)

    def _state(self) -> Iterator[tuple[str, Any]]:
        import torch

        for name, value in self.model.state_dict().items():
            if isinstance(value, torch.Tensor):
                yield name, value


class Keras(Subject):
    """A Keras model: one step of SGD on the mean square of all outputs, in training mode."""

    def randomize(self, generator: np.random.Generator) -> None:  # noqa: D102
        for layer in self._found():
            layer.moving_mean.assign(generator.normal(0, MEANS, layer.moving_mean.shape))
            layer.moving_variance.assign(generator.uniform(*VARIANCES, layer.moving_variance.shape))

    def norms(self) -> list[str]:  # noqa: D102
        return [layer.name for layer in self._found()]

    def outputs(self) -> list[np.ndarray]:  # noqa: D102
        import keras

        return [
            np.asarray(keras.ops.convert_to_numpy(y), "float32")
            for y in keras.tree.flatten(self.model(*self.example.args, **self.example.kwargs, training=False))
        ]

    def weights(self) -> dict[str, np.ndarray]:  # noqa: D102
        return {f"{i} {weight.path}": np.array(weight) for i, weight in enumerate(self.model.weights)}

    def put(self, state: dict[str, np.ndarray]) -> None:  # noqa: D102
        for weight, value in zip(self.model.weights, state.values(), strict=True):
            weight.assign(value)

    def step(self) -> list[str]:  # noqa: D102
        import keras
        import tensorflow as tf

        with tf.GradientTape() as tape:
            outputs = keras.tree.flatten(self.model(*self.example.args, **self.example.kwargs, training=True))
            loss = sum(keras.ops.mean(y * y) for y in outputs)
        trained = self.model.trainable_weights
        gradients = tape.gradient(loss, trained)
        lacking = [
            weight.path
            for weight, gradient in zip(trained, gradients, strict=True)
            if gradient is None or not np.isfinite(tf.convert_to_tensor(gradient)).all()
        ]
        optimizer = keras.optimizers.SGD(1e-4)
        optimizer.apply(
            [g for g in gradients if g is not None],
            [weight for weight, g in zip(trained, gradients, strict=True) if g is not None],
        )
        return lacking

    def export(self, path: str) -> None:  # noqa: D102
        import tensorflow as tf
        import tf2onnx

        signature = [tf.TensorSpec(x.shape, x.dtype) for x in self.example.arrays.values()]

        @tf.function(input_signature=signature)
        def call(*arrays: Any) -> Any:
            own = self.example.filled(list(arrays))
            return self.model(*own.args, **own.kwargs, training=False)

        tf2onnx.convert.from_function(call, input_signature=signature, opset=18, output_path=path)

    def _found(self) -> list[Any]:
        import keras

        return [layer for layer in self.model._flatten_layers() if isinstance(layer, keras.layers.BatchNormalization)]


def _floating(value: Any) -> Iterator[Any]:
    """Yield the floating tensors within lists, mappings and dataclasses."""
    import torch

    if isinstance(value, torch.Tensor):
        if value.is_complex():
            value = torch.view_as_real(value)
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _floating(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _floating(part)
    elif hasattr(value, "__dict__") and not isinstance(value, torch.nn.Module):
        for part in vars(value).values():
            yield from _floating(part)
