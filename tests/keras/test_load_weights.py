"""Keras checkpoints of the three systems, synthesised in their layouts, in a patched model and on the command line."""

import json
import re

import h5py
import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers
from numpy.lib.stride_tricks import sliding_window_view

import normswap
from normswap.cli import main
from normswap.convert.gates import softmax
from normswap.errors import InputError

from .models import output

pytestmark = [
    pytest.mark.keras,
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
]

CODE = """
import keras
from keras import layers

def build(epsilon=EPSILON):
    return keras.Sequential([
        keras.Input((8, 8, 3)),
        layers.Conv2D(4, 3), layers.BatchNormalization(epsilon=epsilon), layers.ReLU(),
        layers.Conv2D(4, 3), layers.BatchNormalization(epsilon=epsilon), layers.ReLU(),
        layers.GlobalAveragePooling2D(), layers.Dense(5, name="scores"),
    ])
"""

EPSILON = {"sn": 1e-3, "brn": 1e-3, "gn": 1e-6}
SYSTEM = {"sn": "keras-switchnorm", "brn": "BatchRenormalization", "gn": "GroupNormalization-keras"}
NORM = {"sn": "switch_normalization", "brn": "batch_renormalization", "gn": "group_normalization"}
TARGET = {"sn": "sn", "brn": "brn", "gn": normswap.GroupNorm(groups=2)}
KINDS = ["sn", "brn", "gn"]


def network(epsilon):
    """The network of `CODE`, which Keras numbers as a fresh process does."""
    keras.utils.clear_session(free_memory=False)
    namespace = {}
    exec(CODE.replace("EPSILON", repr(epsilon)), namespace)
    return namespace["build"]()


def patched(kind, epsilon=None):
    """The network patched to what the file of ``kind`` holds."""
    return normswap.patch(network(EPSILON[kind] if epsilon is None else epsilon), TARGET[kind]).model


def norm(kind, rng, channels=4):
    """One published layer's weights by part."""
    affine = {"gamma": rng.uniform(0.5, 1.5, channels), "beta": rng.normal(size=channels)}
    if kind == "gn":
        return {part: array.reshape(1, 1, 1, channels) for part, array in affine.items()}
    if kind == "brn":
        return affine | {"running_mean": rng.normal(size=channels), "running_std": rng.uniform(0.5, 2, channels)}
    gates = {gate: rng.normal(size=3) for gate in ("mean_weights", "variance_weights")}
    return affine | gates | {"moving_mean": rng.normal(size=channels), "moving_variance": rng.uniform(0.5, 2, channels)}


def published(kind, first=1, scores="scores"):
    """The network's weights as Keras 2 lists them, its numbers from ``first`` on."""
    rng = np.random.default_rng(0)
    weights = {}
    for index, channels in enumerate((3, 4), first):
        convolution = {"kernel": rng.normal(size=(3, 3, channels, 4)) / 5, "bias": rng.normal(size=4)}
        for layer, parts in ((f"conv2d_{index}", convolution), (f"{NORM[kind]}_{index}", norm(kind, rng))):
            weights[layer] = {f"{layer}/{part}:0": array.astype(np.float32) for part, array in parts.items()}
        weights[f"activation_{index}"] = {}
    dense = {"kernel": rng.normal(size=(4, 5)), "bias": rng.normal(size=5)}
    weights[scores] = {f"{scores}/{part}:0": array.astype(np.float32) for part, array in dense.items()}
    return weights


def write(path, weights, *, group="/", config=None, backend="tensorflow", version="2.1.6"):
    """Write an HDF5 file as Keras 1 or 2 does."""
    with h5py.File(path, "w") as file:
        root = file.require_group(group)
        root.attrs["layer_names"] = np.array([name.encode() for name in weights], "S")
        if version is not None:
            root.attrs.update(backend=backend.encode(), keras_version=version.encode())
        if config is not None:
            file.attrs["model_config"] = json.dumps(config).encode()
        for layer, arrays in weights.items():
            root.require_group(layer).attrs["weight_names"] = np.array([name.encode() for name in arrays], "S")
            for name, array in arrays.items():
                root[f"{layer}/{name}"] = array
    return path


def scores(kind, weights, x, epsilon=None):
    """The published network at inference by its formulas, in float64."""
    epsilon = EPSILON[kind] if epsilon is None else epsilon
    flat = [
        {name.rpartition("/")[2].removesuffix(":0"): np.asarray(array, np.float64) for name, array in arrays.items()}
        for arrays in weights.values()
        if arrays
    ]

    def convolve(x, own):
        windows = sliding_window_view(x, (3, 3), axis=(1, 2))
        return np.einsum("nhwcij,ijco->nhwo", windows, own["kernel"]) + own["bias"]

    def normalize(x, own):
        gamma, beta = own.get("gamma", np.ones(4)), own.get("beta", np.zeros(4))
        if kind == "gn":
            grouped = x.reshape(*x.shape[:3], 2, 2)
            mean, variance = (f(grouped, (1, 2, 4), keepdims=True) for f in (np.mean, np.var))
            return ((grouped - mean) / np.sqrt(variance + epsilon)).reshape(x.shape) * gamma + beta
        if kind == "brn":
            return (x - own["running_mean"]) / np.sqrt(own["running_std"] + epsilon) * gamma + beta
        mean, variance = x.mean((1, 2), keepdims=True), x.var((1, 2), keepdims=True)
        layer = mean.mean(3, keepdims=True)
        layer_variance = (variance + mean**2).mean(3, keepdims=True) - layer**2
        m, v = softmax(own["mean_weights"]), softmax(own["variance_weights"])
        mean = m[0] * mean + m[1] * layer + m[2] * own["moving_mean"]
        variance = v[0] * variance + v[1] * layer_variance + v[2] * own["moving_variance"]
        return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta

    x = x.astype(np.float64)
    for convolution, own in (flat[:2], flat[2:4]):
        x = np.maximum(normalize(convolve(x, convolution), own), 0)
    return x.mean((1, 2)) @ flat[4]["kernel"] + flat[4]["bias"]


def close(kind, model, weights, images, epsilon=None):
    """Whether a model computes what the published network computes."""
    expected = scores(kind, weights, images, epsilon)
    np.testing.assert_allclose(output(model, images), expected, rtol=1e-5, atol=1e-5)


def exactly(message):
    """A pattern that matches ``message`` and nothing else."""
    return f"^{re.escape(message)}$"


class TestLoading:
    @pytest.mark.parametrize("first", [1, 7])
    @pytest.mark.parametrize("group", ["/", "model_weights"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_file_of_another_system(self, tmp_path, images, kind, group, first):
        """Numbered by Keras from anywhere, as weights or a whole model, it computes the published formula."""
        weights = published(kind, first)
        path = write(tmp_path / "w.h5", weights, group=group)
        model = patched(kind)

        loaded = normswap.load_weights(model, path)

        assert str(loaded) == f"{SYSTEM[kind]} weights for 2 norms and 3 other layers"
        close(kind, model, weights, images)

    def test_numbers_are_not_names(self, tmp_path, images):
        """A second layer that Keras 3 calls conv2d_1 does not get the weights of the first, which Keras 2 called so."""
        weights = published("sn")
        model = patched("sn")
        names = [layer.name for layer in model.layers if layer.weights]

        normswap.load_weights(model, write(tmp_path / "w.h5", weights))

        assert names == ["conv2d", "batch_normalization", "conv2d_1", "batch_normalization_1", "scores"]
        close("sn", model, weights, images)

    def test_the_order_in_the_file_does_not_count(self, tmp_path, images):
        """Branches come in any order; numbers tell in which order the layers were made."""
        weights = published("sn")
        path = write(tmp_path / "w.h5", dict(reversed(weights.items())))
        model = patched("sn")

        normswap.load_weights(model, path)

        close("sn", model, weights, images)

    def test_the_names_of_keras_1(self, tmp_path, images):
        """Its convolutions and kernels have other names."""
        weights = published("brn")
        old = {"conv2d": "convolution2d", "batch_renormalization": "batchrenormalization"}
        parts = {"kernel": "W", "bias": "b"}
        renamed = {}
        for layer, arrays in weights.items():
            base, _, number = layer.rpartition("_")
            name = f"{old[base]}_{number}" if base in old else layer
            found = {full.rpartition("/")[2].removesuffix(":0"): array for full, array in arrays.items()}
            renamed[name] = {f"{name}_{parts.get(part, part)}": array for part, array in found.items()}
        model = patched("brn")

        normswap.load_weights(model, write(tmp_path / "w.h5", renamed, version=None))

        close("brn", model, weights, images)

    @pytest.mark.parametrize("absent", ["gamma", "beta"])
    def test_layers_without_scale_or_center(self, tmp_path, images, absent):
        """What a layer of the file lacks is 1 or 0 in the model."""
        weights = {
            layer: {name: array for name, array in arrays.items() if not name.endswith(f"{absent}:0")}
            for layer, arrays in published("sn").items()
        }
        model = patched("sn")

        normswap.load_weights(model, write(tmp_path / "w.h5", weights))

        close("sn", model, weights, images)

    @pytest.mark.parametrize("told", ["file", "call"])
    def test_another_epsilon(self, tmp_path, images, told):
        """A whole model's file tells its ε, and so can the call."""
        weights = published("gn")
        config = {
            "class_name": "Sequential",
            "config": [
                {"class_name": "GroupNormalization", "config": {"name": f"group_normalization_{i}", **settings}}
                for i in (1, 2)
                for settings in [{"epsilon": 1e-2, "group": 2}]
            ],
        }
        path = write(tmp_path / "w.h5", weights, group="model_weights", config=config if told == "file" else None)
        model = patched("gn", 1e-2)

        normswap.load_weights(model, path, **({"eps": 1e-2} if told == "call" else {}))

        close("gn", model, weights, images, 1e-2)

    @pytest.mark.parametrize("name", ["w.weights.h5", "w.h5", "w.keras"])
    def test_a_patched_models_own_weights(self, tmp_path, images, name):
        """What a patched model saved comes back into another copy of it."""
        model = patched("sn")
        model.set_weights([array + 0.1 for array in model.get_weights()])
        (model.save_weights if name == "w.weights.h5" else model.save)(tmp_path / name)
        other = patched("sn")

        loaded = normswap.load_weights(other, tmp_path / name)

        assert (loaded.system, loaded.norms, loaded.others) == ("normswap", 2, 3)
        assert np.array_equal(output(other, images), output(model, images))


FIRST = 'normswap.patch(model, "sn")'


def without(weights, *layers):
    """The weights without some layers."""
    return {name: arrays for name, arrays in weights.items() if name not in layers}


def file_of_groups(groups):
    """The configuration of a model with GroupNormalizations of so many groups."""
    names = ("group_normalization_1", "group_normalization_2")
    return [{"class_name": "GroupNormalization", "config": {"name": name, "group": groups}} for name in names]


class TestRefusals:
    @pytest.mark.parametrize(
        ("kind", "options", "change", "model", "message"),
        [
            (
                "sn",
                {},
                lambda weights: weights,
                lambda: network(1e-3),
                "expected a patched model for the weights in {path}, received one without replaced layers; patch the "
                f"model first: {FIRST}",
            ),
            (
                "sn",
                {},
                lambda weights: weights,
                lambda: patched("gn"),
                "expected a model patched to sn for the weights in {path} of keras-switchnorm, received one patched to "
                f"gn; patch to sn first: {FIRST}",
            ),
            (
                "gn",
                {},
                lambda weights: weights,
                lambda: patched("gn", 1e-3),
                "expected layers with the eps that the network was trained with, received others; build MODEL with "
                "that, or tell what it was trained with: load_weights(..., eps=EPS):\n"
                "  batch_normalization: eps=0.001 instead of 1e-06\n"
                "  batch_normalization_1: eps=0.001 instead of 1e-06",
            ),
            (
                "gn",
                {"config": file_of_groups(4), "group": "model_weights"},
                lambda weights: weights,
                lambda: patched("gn"),
                "expected the file's number of groups, received another; patch with GroupNorm(groups=...):"
                "\n  batch_normalization: 2 in the model, 4 in the file\n"
                "  batch_normalization_1: 2 in the model, 4 in the file",
            ),
            (
                "sn",
                {},
                lambda weights: without(weights, "switch_normalization_2", "scores") | {"head": weights["scores"]},
                lambda: patched("sn"),
                "expected weights that fit the model, received {path}:\n"
                "  missing (3):\n    batch_normalization\n    batch_normalization_1\n    scores\n"
                "  unexpected (2):\n    switch_normalization_1\n    head",
            ),
            (
                "sn",
                {},
                lambda weights: (
                    weights | {"conv2d_2": {"kernel:0": np.ones((3, 3, 4, 5), np.float32), "scale:0": np.ones(4)}}
                ),
                lambda: patched("sn"),
                "expected weights that fit the model, received {path}:\n"
                "  missing (1):\n    conv2d_1/bias\n  unexpected (1):\n    conv2d_2/scale\n"
                "  other shape (1):\n    conv2d_1/kernel: (3, 3, 4, 4) in the model, (3, 3, 4, 5) in the file",
            ),
            (
                "brn",
                {"backend": "theano"},
                lambda weights: weights,
                lambda: patched("brn"),
                "{path}: expected convolution kernels as TensorFlow has them, received backend='theano', which turns "
                "them round; save the weights in Keras 2 on TensorFlow",
            ),
            (
                "sn",
                {},
                lambda weights: weights | {"gn": {"gn/gamma:0": np.ones((1, 4)), "gn/beta:0": np.ones((1, 4))}},
                lambda: patched("sn"),
                "expected layers of one system in {path}, received keras-switchnorm, GroupNormalization-keras; load "
                "each by itself",
            ),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, kind, options, change, model, message):
        """The message tells what does not fit and the way out, and the model is as it was."""
        path, model = write(tmp_path / "w.h5", change(published(kind)), **options), model()
        before = model.get_weights()

        with pytest.raises(InputError, match=exactly(message.format(path=path))):
            normswap.load_weights(model, path)

        assert all(map(np.array_equal, model.get_weights(), before))

    def test_two_layers_of_one_name(self, tmp_path):
        """Names that a subclassed model has twice do not tell which layer is meant."""

        class Twice(keras.Model):
            def __init__(self):
                super().__init__()
                self.first, self.second = (layers.BatchNormalization(name="norm") for _ in range(2))

            def call(self, x, training=None):
                return self.second(self.first(x, training=training), training=training)

        model = Twice()
        model(np.ones((2, 8, 8, 4), "float32"))
        normswap.patch(model, "sn")
        path = write(tmp_path / "w.h5", published("sn"))
        message = "expected layers of different names in the model, received norm twice; name them apart"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.load_weights(model, path)

    def test_own_weights_that_do_not_fit(self, tmp_path):
        """Where Keras stops in the middle of a file of its own, what it had loaded is taken back."""
        model = patched("sn")
        other = normswap.patch(
            keras.Sequential(
                [
                    keras.Input((8, 8, 3)),
                    *(layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()),
                    *(layers.Conv2D(4, 3), layers.BatchNormalization(), layers.ReLU()),
                    *(layers.GlobalAveragePooling2D(), layers.Dense(6)),
                ]
            ),
            "sn",
        ).model
        other.save_weights(tmp_path / "w.weights.h5")
        before = model.get_weights()

        start = f"expected weights that fit the model, received {tmp_path}/w.weights.h5:\n"
        with pytest.raises(InputError, match=f"^{re.escape(start)}"):
            normswap.load_weights(model, tmp_path / "w.weights.h5")

        assert all(map(np.array_equal, model.get_weights(), before))

    def test_a_target_of_pytorch(self):
        """The formulas of switchablenorms, a PyTorch system, are no target for a Keras model."""
        message = "batch_normalization: expected compat=None for a Keras model, received compat='switchablenorms'"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.patch(network(1e-3), normswap.SwitchNorm(compat="switchablenorms"))

    def test_a_state_dict_of_torch(self, tmp_path):
        """A file of the other framework is told as one."""
        torch = pytest.importorskip("torch")
        path = tmp_path / "w.h5"
        torch.save({"weight": torch.ones(2)}, path)
        message = f"expected a file of Keras for a keras model, received {path}, a PyTorch checkpoint"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.load_weights(patched("sn"), path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command in a folder and returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


class TestCommandLine:
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_whole_job(self, run, tmp_path, images, kind):
        """Patch with the file, load, export and verify: the ONNX file computes the published formula."""
        import onnxruntime

        weights = published(kind)
        write(tmp_path / "w.h5", weights)
        (tmp_path / "net.py").write_text(CODE.replace("EPSILON", repr(EPSILON[kind])))
        groups = ("--groups", "2") if kind == "gn" else ()

        code, _, err = run("patch", "net.py:build", "--to", kind, *groups, "--weights", "w.h5", "-o", "b")
        assert code == 0, err
        close(kind, normswap.load(tmp_path / "b"), weights, images)

        code, _, err = run("export", "b", "-o", "b.onnx")
        assert code == 0, err
        session = onnxruntime.InferenceSession("b.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: images})
        np.testing.assert_allclose(found, scores(kind, weights, images), rtol=1e-5, atol=1e-5)
        assert run("verify", "b", "b.onnx")[0] == 0

    def test_groups_have_to_be_told(self, run, tmp_path):
        """A file of weights does not tell how many groups its network had, so the patch guesses none."""
        write(tmp_path / "w.h5", published("gn"))
        (tmp_path / "net.py").write_text(CODE.replace("EPSILON", "1e-6"))

        code, _, err = run("patch", "net.py:build", "--to", "gn", "--weights", "w.h5", "-o", "b")

        assert (code, err.splitlines()[-1]) == (
            2,
            "Error: expected --groups with the weights of a patched network, which the network in w.h5 was trained "
            "with",
        )
        assert not (tmp_path / "b").exists()

    @pytest.mark.parametrize("command", [("inspect",), ("export", "-o", "x.onnx"), ("verify", "x.onnx")])
    @pytest.mark.parametrize("kind", KINDS)
    def test_other_commands_tell_the_way(self, run, tmp_path, kind, command):
        """Weights of a patched network for a plain MODEL are told as such."""
        write(tmp_path / "w.h5", published(kind))
        (tmp_path / "net.py").write_text(CODE.replace("EPSILON", "1e-3"))

        code, _, err = run(command[0], "net.py:build", *command[1:], "--weights", "w.h5")

        assert code == 3
        assert err == (
            "error: expected weights for this model in w.h5, received another network's:\n"
            "  they look like a patched network's: load them into the patched model (normswap patch MODEL --to KIND "
            "--weights FILE), or give the bundle\n"
        )
