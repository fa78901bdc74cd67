"""Fine-tuning PyTorch models: losses, what learns, hooks, checkpoints and resuming."""

import copy
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import normswap
from normswap import GroupNorm
from normswap.errors import InputError, OutputExistsError, VerificationError
from normswap.finetune.accuracy import accuracy
from normswap.finetune.hooks import RenormLimits
from normswap.finetune.run import Settings, finetune
from normswap.finetune.torch import predict, train
from normswap.patchers import bundle
from normswap.sources.data import Preprocessing, from_arrays

PREPROCESSING = Preprocessing((3, 12, 12), "channels_first", mean=(0.5,), std=(0.3,))


@pytest.fixture
def data():
    """Images whose class is the colour that is brightest, which a few steps can learn."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 96)
    images = rng.uniform(0, 0.6, (96, 12, 12, 3)).astype(np.float32)
    images[np.arange(96), :, :, labels] += 0.4
    return from_arrays(images, labels, PREPROCESSING)


def losses(model, data, **options):
    """Train and return the loss of each step."""
    found = []
    settings = {"steps": 12, "batch_size": 16, "lr": 0.05, **options}
    train(model, data, on_step=lambda step, loss, state: found.append(loss), **settings)
    return found


class TestTrain:
    @pytest.mark.parametrize("target", ["sn", "brn", "gn"])
    def test_labels(self, model, data, target):
        """Cross-entropy with the labels goes down, and accuracy up."""
        normswap.patch(model, target)
        before = accuracy(lambda x: predict(model, x), data).top1
        found = losses(model, data, steps=40)

        assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
        assert accuracy(lambda x: predict(model, x), data).top1 > before
        assert not model.training

    def test_distillation(self, model, data):
        """The model comes closer to its teacher, which does not change; labels play no part."""
        teacher = copy.deepcopy(model)
        normswap.patch(model, GroupNorm(groups=4))
        state = copy.deepcopy(teacher.state_dict())
        other = from_arrays(data._images.images, np.zeros(96, np.int64), PREPROCESSING)
        twin = copy.deepcopy(model)
        found = losses(model, data, teacher=teacher, steps=30)

        assert np.mean(found[-5:]) < 0.5 * np.mean(found[:5])
        assert all(torch.equal(state[k], v) for k, v in teacher.state_dict().items())
        assert losses(twin, other, teacher=teacher, steps=30) == found

    def test_norms_alone(self, model, data):
        """train="norm" moves the normalization layers' parameters and nothing else; flags are put back."""
        normswap.patch(model, "sn")
        before = copy.deepcopy(model.state_dict())
        losses(model, data, train="norm")
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}

        assert {k.rsplit(".", 1)[0] for k in moved} == {"stem.1", "bn"}
        assert {"bn.weight", "bn.bias", "bn.mean_weight", "bn.var_weight"} <= moved
        assert all(p.requires_grad for p in model.parameters())

    def test_frozen_parameters_stay(self, model, data):
        """A parameter the user froze does not learn."""
        model.stem.requires_grad_(False)
        normswap.patch(model, "gn")
        before = model.stem[1].weight.clone()
        losses(model, data)

        assert torch.equal(model.stem[1].weight, before)

    def test_a_frozen_stem_before_group_norm_does_not_crash(self, model, data):
        """A GroupNorm of the model's own is guarded too, for as long as it trains (see `guard`)."""
        model.stem[1] = nn.GroupNorm(2, 8)
        normswap.patch(model, "gn")
        model.to(memory_format=torch.channels_last)

        assert np.isfinite(losses(model, data, train="norm")).all()
        assert not model.stem[1]._forward_pre_hooks

    def test_the_same_seed_gives_the_same_run(self, model, data):
        """A run is a function of its seed; another seed sees the data in another order."""
        normswap.patch(model, "sn")
        twin, other = copy.deepcopy(model), copy.deepcopy(model)

        assert losses(model, data) == losses(twin, data)
        assert losses(other, data, seed=1) != losses(twin, data)

    def test_a_loss_that_is_not_finite(self, model, data):
        """NaN stops the run with the step, and the weights are those before it."""
        normswap.patch(model, "gn")
        with torch.no_grad():
            model.head.weight[0, 0] = torch.nan
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(
            VerificationError, match="^expected a finite loss, received loss=nan at step=0; lower --lr$"
        ):
            losses(model, data)

        assert all(
            torch.equal(
                before[k],
                v,
            )
            or before[k].isnan().any()
            for k, v in model.state_dict().items()
        )


class TestLimits:
    def test_the_schedule_moves_the_limits(self, model, data):
        """BatchRenorm's limits follow the preset to its end."""
        normswap.patch(model, "brn")
        hook = RenormLimits(model.modules(), 10)
        seen = []
        for step in (0, 5, 10):
            hook.on_step(step)
            seen.append((float(model.bn.r_max), float(model.bn.d_max)))

        assert seen == [(1, 0), (1.125, 0.25), (1.25, 0.5)]
        assert len(hook.layers) == 2

    def test_the_papers_schedule(self):
        """Plain BatchNorm at first, then linear to 3 and 5."""
        from normswap.finetune.schedules import renorm_limits

        assert renorm_limits("paper", 0.04) == (1, 0)
        assert renorm_limits("paper", 0.19)[1] == 5
        assert renorm_limits("paper", 0.31) == (3, 5)

    def test_the_learning_rate(self):
        """It rises for a twentieth of the run and falls to nothing along a cosine."""
        from normswap.finetune.schedules import learning_rate

        rates = [learning_rate(step, 100, 1.0) for step in range(100)]

        assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
        assert rates[5:] == sorted(rates[5:], reverse=True)
        assert rates[-1] < 1e-3


class TestRun:
    SETTINGS = Settings(steps=6, batch_size=16, lr=0.05, checkpoint_every=3)

    @pytest.fixture
    def source(self, tmp_path, monkeypatch):
        """A bundle whose source is a Python file beside it."""
        (tmp_path / "net.py").write_text(
            "import torch\nfrom torch import nn\n\n\ndef build():\n    torch.manual_seed(0)\n"
            "    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),\n"
            "                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))\n"
        )
        from normswap.sources.models import load_model

        spec = f"{tmp_path}/net.py:build"
        original = load_model(spec)
        report = normswap.patch(load_model(spec), "brn")
        bundle.save(report, tmp_path / "in", source=spec, original=original, preprocessing=PREPROCESSING)
        return tmp_path / "in"

    def weights(self, path):
        return {k: v.clone() for k, v in normswap.load(path).state_dict().items()}

    def test_a_run(self, source, data, tmp_path):
        """The output is a bundle with the trained model, its original, and a log."""
        steps = []
        result = finetune(source, tmp_path / "out", data, self.SETTINGS, on_step=lambda s, loss: steps.append(s))

        assert steps == [1, 2, 3, 4, 5, 6]
        assert result.to_dict() == {
            "output": str(tmp_path / "out"),
            "steps": 6,
            "loss": result.loss,
            "eval": None,
        }
        found = bundle.read(tmp_path / "out")
        assert float(found.model[1].r_max) > 1
        assert found.original()[1].weight.tolist() == [1, 1, 1, 1]
        assert len(json.loads((tmp_path / "out" / "training.json").read_text())["losses"]) == 6

    def test_resuming_gives_the_uninterrupted_run(self, source, data, tmp_path):
        """A run stopped at a checkpoint and resumed ends in the same weights, bit for bit, dropout included."""
        finetune(source, tmp_path / "whole", data, self.SETTINGS)

        class StoppedError(Exception):
            pass

        def stop(step, loss):
            if step == 5:
                raise StoppedError

        with pytest.raises(StoppedError):
            finetune(source, tmp_path / "parts", data, self.SETTINGS, on_step=stop)
        steps = []
        finetune(source, tmp_path / "parts", data, self.SETTINGS, resume=True, on_step=lambda s, loss: steps.append(s))

        assert steps == [4, 5, 6]
        whole, parts = self.weights(tmp_path / "whole"), self.weights(tmp_path / "parts")
        assert all(torch.equal(whole[name], parts[name]) for name in whole)

    def test_resume_starts_where_there_is_none(self, source, data, tmp_path):
        """--resume without a run to resume is a fresh run."""
        assert finetune(source, tmp_path / "out", data, self.SETTINGS, resume=True).steps == 6

    def test_resuming_with_other_settings(self, source, data, tmp_path):
        """A run cannot go on with another learning rate."""
        finetune(source, tmp_path / "out", data, self.SETTINGS)
        with pytest.raises(
            InputError, match="^expected the settings of the run in .*'lr': 0.05.*, received .*'lr': 1,"
        ):
            finetune(source, tmp_path / "out", data, replace(self.SETTINGS, lr=1), resume=True)

    def test_the_best_model_is_kept(self, source, data, tmp_path, monkeypatch):
        """With data to evaluate on, the bundle holds the best checkpoint and the last beside it."""
        from normswap.finetune import run
        from normswap.finetune.accuracy import Accuracy

        scores = iter([90.0, 10.0])
        monkeypatch.setattr(run, "accuracy", lambda predict, data: Accuracy(next(scores), 100.0, 96))
        result = finetune(source, tmp_path / "out", data, self.SETTINGS, eval_data=data)
        half = finetune(source, tmp_path / "half", data, replace(self.SETTINGS, checkpoint_every=6))

        assert result.evaluation.top1 == 90.0
        assert (tmp_path / "out" / "last.safetensors").exists()
        best, last = self.weights(tmp_path / "out"), self.weights(half.output)
        assert not torch.equal(best["6.weight"], last["6.weight"])

    def test_an_output_that_exists(self, source, data, tmp_path):
        """An existing output is refused before training."""
        (tmp_path / "out").mkdir()
        with pytest.raises(OutputExistsError):
            finetune(source, tmp_path / "out", data, self.SETTINGS)

    def test_a_failing_run_leaves_no_output(self, source, data, tmp_path):
        """A run whose first step fails leaves nothing."""
        with pytest.raises(VerificationError):
            finetune(source, tmp_path / "out", data, replace(self.SETTINGS, lr=1e30))

        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["steps", "batch_size", "lr", "checkpoint_every"])
    def test_settings_are_positive(self, name):
        """Zero of anything is refused by name."""
        with pytest.raises(InputError, match=f"^{re.escape(f'expected `{name}` above 0, received {name}=0')}$"):
            Settings(**{name: 0})


def test_accuracy_counts_ties_as_wrong(data):
    """A constant output scores no better than a wrong one, and NaN is an error."""
    assert accuracy(lambda x: np.zeros((len(x), 10)), data).top1 == 0
    perfect = accuracy(lambda x: np.eye(10)[data._images.labels[: len(x)]], data)
    assert (perfect.top1, perfect.top5, perfect.n) == (100, 100, 96)
    with pytest.raises(VerificationError, match="^expected finite scores, received NaN or infinity$"):
        accuracy(lambda x: np.full((len(x), 10), np.nan), data)
    with pytest.raises(InputError, match=r"^expected scores of shape \(N, classes\) for labels up to 2, received"):
        accuracy(lambda x: np.zeros((len(x), 2)), data)
