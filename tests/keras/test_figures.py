"""What is told of a Keras model while it is fine-tuned: gates and clipping; and `normswap plot`."""

import json
import subprocess
import sys

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from keras import layers

import normswap
from normswap.cli import main
from normswap.finetune import Momentum
from normswap.finetune.run.figures import Clipping, gates
from normswap.layers.keras import BatchRenormalization, SwitchNormalization

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


def renormed(**options):
    """A model whose Batch Renormalization is the first layer, so that what it sees is the input."""
    norm = BatchRenormalization(r_max=1.2, d_max=0.3, name="norm", **options)
    return keras.Sequential([keras.Input((6, 6, 8)), norm, layers.GlobalAveragePooling2D(), layers.Dense(2)])


def clipped(layer, x):
    """The share of channels that the limits clip, by the definition of r and d."""
    value = {v.name: keras.ops.convert_to_numpy(v).astype(np.float64) for v in layer.weights}
    sigma = np.sqrt(value["moving_variance"] + layer.epsilon)
    r = np.sqrt(x.var((0, 1, 2), dtype=np.float64) + layer.epsilon) / sigma
    d = (x.mean((0, 1, 2), dtype=np.float64) - value["moving_mean"]) / sigma
    return ((r > value["r_max"]) | (r < 1 / value["r_max"]) | (np.abs(d) > value["d_max"])).mean()


@pytest.mark.parametrize("images", [16, 64])
def test_clipping_in_fit(images):
    """The share told of a step of ``fit``, compiled as it is, is what the layer did in it.

    So it is where a hook has the statistics average over more images than the layer says.
    """
    rng = np.random.default_rng(0)
    model = renormed(momentum=0.9)
    model.compile("sgd", "mse")
    clipping = Clipping(model)
    Momentum(model, 16, images).open()
    told, true = [], []
    for step in range(5):
        x = rng.normal(rng.normal(size=8) / 3, 1 + rng.uniform(-0.3, 0.3, 8), (16, 6, 6, 8)).astype(np.float32)
        true.append(clipped(model.get_layer("norm"), x))
        clipping.on_step(step)
        model.fit(x, np.zeros((16, 2)), batch_size=16, verbose=0)
        told.append(clipping.share())

    assert told == true
    assert 0 < min(told) < max(told)


@pytest.mark.parametrize(
    "make", [lambda: renormed(compat="titu1994"), lambda: keras.Sequential([keras.Input((2,)), layers.Dense(2)])]
)
def test_nothing_to_tell(make):
    """A model without Batch Renormalization has no share, nor has one whose average is of another kind."""
    clipping = Clipping(make())
    clipping.on_step(0)

    assert clipping.share() is None


def test_inference_is_no_step():
    """A pass at inference moves nothing, and nothing is told of it."""
    model = renormed()
    clipping = Clipping(model)
    clipping.on_step(0)
    model(np.ones((2, 6, 6, 8), np.float32), training=False)

    assert clipping.share() is None


def test_gates(make):
    """Every layer's gates come under its name, as weights that sum to 1; of a model without there are none."""
    model = make("functional")
    assert gates(model) == {}
    report = normswap.patch(model, normswap.SwitchNorm(batch_statistics="none"))
    found = gates(report.model)

    assert set(found) == {decision.site.name for decision in report.replaced}
    assert all(part.shape == (2,) and part.sum() == pytest.approx(1) for pair in found.values() for part in pair)


def test_plot(tmp_path, monkeypatch):
    """`normswap plot` draws the gates of a Keras bundle."""
    monkeypatch.chdir(tmp_path)
    model = keras.Sequential([keras.Input((8, 8, 3)), layers.Conv2D(4, 3), layers.BatchNormalization(name="bn")])
    model.save("net.keras")
    for command in ("patch net.keras --to sn -o sn", "plot sn -o sn.svg --json"):
        done = CliRunner().invoke(main, command.split())
        assert done.exit_code == 0, done.stderr

    assert list(json.loads(done.stdout)["gates"]) == ["bn"]
    assert (tmp_path / "sn.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
def test_a_file_that_holds_our_layers(tmp_path, suffix):
    """A process that has imported nothing else reads and draws it, though Keras alone would not know the layer."""
    model = keras.Sequential([keras.Input((6, 6, 3)), SwitchNormalization(name="norm")])
    model.layers[0].mean_weight.assign([1.0, 0.0, -1.0])
    model.save(tmp_path / f"net{suffix}")
    command = [sys.executable, "-m", "normswap", "plot", f"net{suffix}", "-o", "o.png", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    ((mean, variance),) = gates(model).values()
    assert json.loads(done.stdout)["gates"] == {"norm": {"mean": mean.tolist(), "variance": variance.tolist()}}
