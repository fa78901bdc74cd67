"""Checkpoints of switchablenorms, synthesised in their published layout, in a patched model and on the command line."""

import json
import os
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from numpy.lib.stride_tricks import sliding_window_view

import normswap
from normswap.cli import main
from normswap.convert.gates import softmax
from normswap.errors import InputError
from normswap.interop.switchablenorms import to_switchablenorms
from normswap.sources.files import sha256

CODE = """
from torch import nn

class Net(nn.Module):
    def __init__(self, eps=1e-5):
        super().__init__()
        self.conv1, self.sn1 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps)
        self.conv2, self.sn2 = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6, eps)
        self.fc, self.sn3 = nn.Linear(6, 5), nn.BatchNorm1d(5, eps)

    def forward(self, x):
        x = self.sn1(self.conv1(x)).relu()
        return self.sn3(self.fc(self.sn2(self.conv2(x)).relu().mean((2, 3))))

def build():
    model = Net()
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5, 0.5, 0.5), "std": (0.3, 0.3, 0.3)}
    return model
"""

DIMENSIONS = {"sn1": 2, "sn2": 2, "sn3": 1}


def network(eps=1e-5):
    """The network of `CODE`, before the patch."""
    namespace = {"__name__": "net"}
    exec(CODE, namespace)
    return namespace["Net"](eps).eval()


def published(moving=True, seed=0):
    """A state dict of the network as switchablenorms saves it."""
    rng = np.random.default_rng(seed)
    state = {
        "conv1.weight": rng.normal(size=(4, 3, 3, 3)) / 3,
        "conv2.weight": rng.normal(size=(6, 4, 3, 3)) / 4,
        "fc.weight": rng.normal(size=(5, 6)),
        "fc.bias": rng.normal(size=5),
    }
    for name, channels in (("sn1", 4), ("sn2", 6), ("sn3", 5)):
        shape = (1, channels) if name == "sn3" else (1, channels, 1, 1)
        state |= {f"{name}.weight": rng.uniform(0.5, 1.5, shape), f"{name}.bias": rng.normal(size=shape)}
        gates = 2 if name == "sn3" or not moving else 3
        state |= {f"{name}.{gate}": rng.normal(size=gates) for gate in ("mean_weight", "var_weight")}
        if name == "sn3" or moving:
            state[f"{name}.running_mean"] = rng.normal(size=shape[:3])
            state[f"{name}.running_var"] = rng.uniform(0.5, 2, shape[:3])
    return {name: torch.from_numpy(array).float() for name, array in state.items()}


def scores(state, x):
    """The published network at inference by its formulas, in float64."""
    state = {name: tensor.double().numpy() for name, tensor in state.items()}

    def convolve(x, kernel):
        return np.einsum("nchwij,ocij->nohw", sliding_window_view(x, kernel.shape[2:], axis=(2, 3)), kernel)

    def norm(name, x):
        own = {part.removeprefix(f"{name}."): array for part, array in state.items() if part.startswith(f"{name}.")}
        if x.ndim == 2:
            means, variances = [x.mean(1, keepdims=True)], [x.var(1, ddof=1, keepdims=True)]
        else:
            mean, variance = x.mean((2, 3), keepdims=True), x.var((2, 3), ddof=1, keepdims=True)
            layer = mean.mean(1, keepdims=True)
            means, variances = [mean, layer], [variance, (variance + mean**2).mean(1, keepdims=True) - layer**2]
        if "running_mean" in own:
            means.append(own["running_mean"].reshape(own["weight"].shape))
            variances.append(own["running_var"].reshape(own["weight"].shape))
        mean = sum(w * m for w, m in zip(softmax(own["mean_weight"]), means, strict=True))
        variance = sum(w * v for w, v in zip(softmax(own["var_weight"]), variances, strict=True))
        return own["weight"] * (x - mean) / np.sqrt(variance + 1e-5) + own["bias"]

    x = np.maximum(norm("sn1", convolve(x.astype(np.float64), state["conv1.weight"])), 0)
    x = np.maximum(norm("sn2", convolve(x, state["conv2.weight"])), 0)
    return norm("sn3", x.mean((2, 3)) @ state["fc.weight"].T + state["fc.bias"])


def images():
    """Four images of 8x8."""
    return np.random.default_rng(5).normal(size=(4, 3, 8, 8)).astype(np.float32)


def close(model, state):
    """Whether a model computes what the published network computes."""
    with torch.no_grad():
        found = model.eval()(torch.from_numpy(images())).numpy()
    np.testing.assert_allclose(found, scores(state, images()), rtol=1e-5, atol=1e-5)


def exactly(message):
    """A pattern that matches ``message`` and nothing else."""
    return f"^{re.escape(message)}$"


def contents(model):
    """Every tensor of a model, its bits included."""
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


def trainer(state):
    """What the published trainer saves."""
    return {
        "epoch": 90,
        "model": "resnetv1sn50",
        "state_dict": {f"module.{name}": tensor for name, tensor in state.items()},
        "best_prec1": torch.tensor(76.9),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
    }


class TestLoading:
    @pytest.mark.parametrize("name", ["sn.pth", "sn.pth.tar", "model.pth-90", "sn"])
    @pytest.mark.parametrize("wrap", [dict, trainer])
    def test_a_checkpoint_of_switchablenorms(self, tmp_path, name, wrap):
        """Bare or as the trainer saves it, and under any file name, it computes the published formula."""
        state = published()
        torch.save(wrap(state), tmp_path / name)
        report = normswap.patch(network(), "sn")

        loaded = normswap.load_weights(report.model, tmp_path / name)

        assert str(loaded) == "switchablenorms weights for 3 norms and 3 other layers"
        assert (loaded.system, loaded.norms, loaded.others) == ("switchablenorms", 3, 3)
        assert report.model.sn1.compat == "switchablenorms"
        assert [getattr(report.model, name).momentum for name in DIMENSIONS] == [0.9, 0.9, 0.997]
        close(report.model, state)

    def test_narrow_weights(self, tmp_path):
        """Weights in bfloat16, which NumPy does not know, are loaded as the numbers they are."""
        narrow = {name: tensor.bfloat16() for name, tensor in published().items()}
        torch.save(narrow, tmp_path / "sn.pth")
        report = normswap.patch(network(), "sn")

        normswap.load_weights(report.model, tmp_path / "sn.pth")

        close(report.model, {name: tensor.float() for name, tensor in narrow.items()})

    def test_layers_without_batch_statistics(self, tmp_path):
        """A checkpoint of using_bn=False fits where the patch leaves the batch out too."""
        state = published(moving=False)
        torch.save(state, tmp_path / "sn.pth")
        rules = normswap.Rules(
            (
                normswap.Rule(normswap.SwitchNorm(), match="sn3"),
                normswap.Rule(normswap.SwitchNorm(batch_statistics="none")),
            )
        )
        report = normswap.patch(network(), rules)

        normswap.load_weights(report.model, tmp_path / "sn.pth")

        close(report.model, state)

    def test_a_batch_average(self, tmp_path):
        """Sums over batches are loaded as the averages they were to become."""
        state = published()
        sums = dict(state)
        for name in DIMENSIONS:
            mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
            sums |= {f"{name}.running_mean": mean * 200, f"{name}.running_var": (var + mean**2) * 200}
        torch.save(sums, tmp_path / "sn.pth")
        report = normswap.patch(network(), "sn")

        normswap.load_weights(report.model, tmp_path / "sn.pth", batches=200)

        close(report.model, state)

    @pytest.mark.parametrize("given", [None, 1e-3])
    def test_another_epsilon(self, tmp_path, given):
        """The face networks' ε is known, any other is taken where it is told."""
        torch.save(published(), tmp_path / "sn.pth")
        report = normswap.patch(network(2e-5 if given is None else given), "sn")

        assert normswap.load_weights(report.model, tmp_path / "sn.pth", eps=given).norms == 3

    @pytest.mark.parametrize("target", ["sn", "brn", "gn"])
    def test_a_patched_models_own_weights(self, tmp_path, target):
        """What a patched model saved comes back into another copy of it."""
        report = normswap.patch(network(), target)
        torch.save(report.model.state_dict(), tmp_path / "own.pth")
        other = normswap.patch(network(), target).model

        loaded = normswap.load_weights(other, tmp_path / "own.pth")

        assert (loaded.system, loaded.norms, loaded.others) == ("normswap", 3, 3)
        assert contents(other) == contents(report.model)

    def test_the_formulas_as_a_target(self, tmp_path):
        """A patch can ask for them before there is a checkpoint, and a recipe tells of them."""
        state = published()
        torch.save(state, tmp_path / "sn.pth")
        report = normswap.patch(network(), normswap.SwitchNorm(compat="switchablenorms"))
        again = normswap.patch(network(), normswap.Recipe.from_json(report.recipe.to_json()))

        normswap.load_weights(again.model, tmp_path / "sn.pth")

        assert report.model.sn3.compat == again.model.sn3.compat == "switchablenorms"
        assert report.model.sn3.momentum == 0.997
        close(again.model, state)

    def test_bundles_keep_the_formulas(self, tmp_path):
        """Saved, loaded and saved again, it computes the same, though the patch knew nothing of the checkpoint."""
        state = published()
        torch.save(state, tmp_path / "sn.pth")
        report = normswap.patch(network(), "sn")
        normswap.load_weights(report.model, tmp_path / "sn.pth")

        normswap.save(report, tmp_path / "a")
        first = normswap.load(tmp_path / "a", model=network())
        normswap.save(first, tmp_path / "b")
        second = normswap.load(tmp_path / "b", model=network())

        for model in (first, second):
            assert (model.sn3.compat, model.sn3.momentum) == ("switchablenorms", 0.997)
            close(model, state)


FIRST = 'normswap.patch(model, "sn")'


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "model", "message"),
        [
            (
                {},
                network,
                "expected a patched model for the weights in {path}, received one without replaced layers; patch the "
                f"model first: {FIRST}",
            ),
            (
                {},
                lambda: normswap.patch(network(), "gn").model,
                "expected a model patched to sn for the weights in {path} of switchablenorms, received one patched to "
                f"gn; patch to sn first: {FIRST}",
            ),
            (
                {},
                lambda: normswap.patch(network(1e-3), "sn").model,
                "expected layers with the eps that the network was trained with, received others; build MODEL with "
                "that, or tell what it was trained with: load_weights(..., eps=EPS):\n"
                "  sn1: eps=0.001 instead of 1e-05 or 2e-05\n"
                "  sn2: eps=0.001 instead of 1e-05 or 2e-05\n"
                "  sn3: eps=0.001 instead of 1e-05 or 2e-05",
            ),
            (
                {},
                lambda: normswap.patch(network(), normswap.SwitchNorm(batch_statistics="none")).model,
                "expected layers with the file's gates, received others; patch to "
                "SwitchNorm(batch_statistics='moving'):\n"
                "  sn1: using_bn=True in the file, batch_statistics='none' in the model\n"
                "  sn2: using_bn=True in the file, batch_statistics='none' in the model\n"
                "  sn3: using_bn=True in the file, batch_statistics='none' in the model",
            ),
            (
                {f"sn3.{part}": tensor for part, tensor in {"weight": torch.ones(1, 5, 1, 1)}.items()}
                | {"sn3.bias": torch.ones(1, 5, 1, 1)}
                | {f"sn3.{part}": torch.ones(1, 5, 1) for part in ("running_mean", "running_var")}
                | {f"sn3.{part}": torch.ones(3) for part in ("mean_weight", "var_weight")},
                lambda: normswap.patch(network(), "sn").model,
                "expected layers for input of the file's dimensions, received others; patch the network that was "
                "trained:\n  sn3: SwitchNorm2d in the file, SwitchNorm1d in the model",
            ),
            (
                {"fc.weight": torch.ones(5, 7), "fc.bias": None, "head.bias": torch.ones(5)},
                lambda: normswap.patch(network(), "sn").model,
                "expected weights that fit the model, received {path}:\n"
                "  missing (1):\n    fc.bias\n  unexpected (1):\n    head.bias\n"
                "  other shape (1):\n    fc.weight: (5, 6) in the model, (5, 7) in the file",
            ),
            (
                {"sn2.running_var": None},
                lambda: normswap.patch(network(), "sn").model,
                "expected every SwitchNorm layer as switchablenorms saves it, received 1 of 3 that are not; use a "
                "whole checkpoint:\n  sn2: running_var is missing",
            ),
        ],
    )
    def test_what_does_not_fit(self, tmp_path, change, model, message):
        """The message tells what does not fit and the way out, and the model is as it was."""
        path, model = tmp_path / "sn.pth", model()
        torch.save({name: tensor for name, tensor in (published() | change).items() if tensor is not None}, path)
        before = contents(model)

        with pytest.raises(InputError, match=exactly(message.format(path=path))):
            normswap.load_weights(model, path)

        assert contents(model) == before
        assert getattr(model.sn1, "compat", None) is None

    def test_a_checkpoint_without_batch_statistics(self, tmp_path):
        """A checkpoint of using_bn=False for layers that have them says how to patch."""
        torch.save(published(moving=False), tmp_path / "sn.pth")
        message = (
            "expected layers with the file's gates, received others; patch to SwitchNorm(batch_statistics='none'):"
            "\n  sn1: using_bn=False in the file, batch_statistics='moving' in the model\n"
            "  sn2: using_bn=False in the file, batch_statistics='moving' in the model"
        )
        with pytest.raises(InputError, match=exactly(message)):
            normswap.load_weights(normswap.patch(network(), "sn").model, tmp_path / "sn.pth")

    def test_batches_belong_to_switchablenorms(self, tmp_path):
        """A number of batches for another file is a mistake that is told."""
        report = normswap.patch(network(), "sn")
        path = tmp_path / "own.pth"
        torch.save(report.model.state_dict(), path)
        message = (
            f"expected `batches` for weights of switchablenorms alone, received batches=200 for {path} of normswap"
        )
        with pytest.raises(InputError, match=exactly(message)):
            normswap.load_weights(report.model, path, batches=200)

    def test_a_file_of_keras(self, tmp_path):
        """HDF5 is known by its content, whatever it is called."""
        path = tmp_path / "sn.pth"
        path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
        message = f"expected a PyTorch checkpoint for a torch model, received {path}, a file of Keras"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.load_weights(normswap.patch(network(), "sn").model, path)

    def test_a_file_of_nothing(self, tmp_path):
        """What is a file of neither framework is told as that."""
        path = tmp_path / "sn.pth"
        path.write_text("weights")
        message = f"expected weights of PyTorch or Keras in {path}, received another file"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.load_weights(normswap.patch(network(), "sn").model, path)

    def test_a_pickle_that_runs_code(self, tmp_path):
        """A checkpoint with a payload is refused, and nothing of it is run."""
        mark, path = tmp_path / "mark", tmp_path / "sn.pth.tar"

        class Payload:
            def __reduce__(self):
                return os.system, (f"touch {mark}",)

        torch.save({"state_dict": published(), "epoch": Payload()}, path)
        with pytest.raises(InputError, match=f"^expected plain weights in {re.escape(str(path))}, received a pickle"):
            normswap.load_weights(normswap.patch(network(), "sn").model, path)

        assert not mark.exists()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that runs a command in a folder with a network and returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(CODE)

    def invoke(*arguments):
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    return invoke


class TestCommandLine:
    def test_the_whole_job(self, run, tmp_path):
        """Patch with the checkpoint, load, export and verify: the file computes the published formula."""
        import onnxruntime

        state = published()
        torch.save(trainer(state), "sn.pth.tar")

        code, out, err = run("patch", "net.py:build", "--to", "sn", "--weights", "sn.pth.tar", "-o", "b", "--json")
        assert code == 0, err
        assert json.loads(out)["weights"] == "switchablenorms weights for 3 norms and 3 other layers"
        close(normswap.load(tmp_path / "b"), state)

        code, out, err = run("export", "b", "-o", "b.onnx", "--json")
        assert code == 0, err
        assert [row["file"] for row in json.loads(out)["files"]] == ["b.onnx"]
        session = onnxruntime.InferenceSession("b.onnx")
        (found,) = session.run(None, {session.get_inputs()[0].name: images()})
        np.testing.assert_allclose(found, scores(state, images()), rtol=1e-5, atol=1e-5)

        assert run("verify", "b", "b.onnx")[0] == 0

    def test_fine_tuning(self, run, tmp_path):
        """Without an original it learns from labels, and what comes out computes by the same formulas."""
        torch.save(published(), "sn.pth")
        rng = np.random.default_rng(0)
        np.savez("d.npz", x=rng.integers(0, 255, (8, 8, 8, 3), np.uint8), y=np.arange(8) % 5)
        assert run("patch", "net.py:build", "--to", "sn", "--weights", "sn.pth", "-o", "b")[0] == 0

        code, _, err = run("finetune", "b", "--data", "d.npz", "--distill", "-o", "c")
        assert (code, err.splitlines()[-1]) == (
            3,
            "error: expected a bundle saved with its original, received b without; patch the model with its "
            "BatchNorms' weights",
        )
        code, _, err = run("finetune", "b", "--data", "d.npz", "--steps", "2", "--batch-size", "4", "-o", "c")
        assert code == 0, err
        model = normswap.load(tmp_path / "c")
        arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        back = to_switchablenorms(arrays, dimensions=DIMENSIONS)
        close(model, {name: torch.from_numpy(array) for name, array in back.items()})

    def test_a_patched_models_own_weights(self, run, tmp_path):
        """They are as good as another system's."""
        model = normswap.patch(network(), "gn").model
        torch.save(model.state_dict(), "own.pth")

        code, _, err = run("patch", "net.py:build", "--to", "gn", "--groups", "1", "--weights", "own.pth", "-o", "b")

        assert code == 0, err
        assert contents(normswap.load(tmp_path / "b")) == contents(model)

    @pytest.mark.parametrize("target", [("gn", "--groups", "1"), ("sn",)])
    @pytest.mark.parametrize("mode", ["full", "scale"])
    def test_the_own_weights_of_an_equalized_model(self, run, tmp_path, target, mode):
        """They come back with the same word on equalizing, and where biases tell of another the way is told."""
        model = normswap.patch(network(), target[0], example=torch.zeros(2, 3, 8, 8), equalize=mode == "full" or mode)
        torch.save(model.model.state_dict(), "own.pth")
        command = ("patch", "net.py:build", "--to", *target, "--weights", "own.pth", "-o", "b")

        code, _, err = run(*command, "--equalize", mode)
        assert code == 0, err
        assert contents(normswap.load(tmp_path / "b")) == contents(model.model)

        message = "error: expected weights of a network that was equalized as the model is, received own.pth "
        if mode == "full":
            found = "with conv1.bias, conv2.bias, biases that equalizing adds to layers in front of norms"
            refused, way = run(*command, "--overwrite"), "--equalize full, with --input-shape"
        else:
            found = "without conv1.bias, conv2.bias, biases that equalizing has added to layers in front of norms here"
            refused = run(*command, "--overwrite", "--equalize", "full")
            way = "--equalize scale or without --equalize"
        assert refused[0] == 3
        assert refused[2] == f"{message}{found}; patch with {way}\n"

        code, _, err = run("export", "net.py:build", "--weights", "own.pth", "-o", "x.onnx")
        assert code == 3
        assert err.splitlines()[-1].startswith("  they look like a patched network's: load them into the patched model")

    @pytest.mark.parametrize("command", [("inspect",), ("export", "-o", "x.onnx"), ("verify", "x.onnx")])
    def test_other_commands_tell_the_way(self, run, command):
        """Weights of a patched network for a plain MODEL are told as such."""
        torch.save(published(), "sn.pth")

        code, _, err = run(command[0], "net.py:build", *command[1:], "--weights", "sn.pth")

        assert code == 3
        assert err.startswith("error: expected weights that fit the model, received sn.pth:\n")
        assert err.splitlines()[-1] == (
            "  they look like a patched network's: load them into the patched model (normswap patch MODEL --to KIND "
            "--weights FILE), or give the bundle"
        )

    @pytest.mark.parametrize(
        ("options", "code", "message"),
        [
            (
                ("--to", "gn"),
                3,
                "error: expected a model patched to sn for the weights in sn.pth of switchablenorms, received one "
                "patched to gn; patch to sn first: --to sn",
            ),
            (
                ("--to", "sn", "--data", "d.npz"),
                2,
                "Error: --calibrate and --data compare with the original, received the weights of a patched network: "
                "sn.pth",
            ),
        ],
    )
    def test_what_does_not_fit(self, run, tmp_path, options, code, message):
        """The command ends with the reason and leaves no bundle."""
        torch.save(published(), "sn.pth")

        found, _, err = run("patch", "net.py:build", *options, "--weights", "sn.pth", "-o", "b")

        assert (found, err.splitlines()[-1]) == (code, message)
        assert not (tmp_path / "b").exists()

    def test_a_folder_stays_the_bundle_it_was(self, run, tmp_path):
        """A checkpoint that does not fit replaces no bundle."""
        torch.save(published(), "sn.pth")
        assert run("patch", "net.py:build", "--to", "sn", "--weights", "sn.pth", "-o", "b")[0] == 0
        before = sha256(tmp_path / "b" / "model.safetensors")
        torch.save({n: t for n, t in published().items() if n != "sn2.running_var"}, "sn.pth")

        assert run("patch", "net.py:build", "--to", "sn", "--weights", "sn.pth", "-o", "b", "--overwrite")[0] == 3
        assert sha256(tmp_path / "b" / "model.safetensors") == before
