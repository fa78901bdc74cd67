"""Runs at their edges: what they refuse before they write, what they take over, and what a failing one leaves."""

import re
import tomllib
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

import normswap
from normswap.bundles import bundle
from normswap.data.dataset import from_arrays
from normswap.errors import InputError, NormswapWarning, OutputExistsError, VerificationError
from normswap.finetune import update_statistics
from normswap.finetune.calibration.calibrate import split
from normswap.finetune.run.checkpoints import Checkpoints
from normswap.finetune.run.journal import read

from .runs import PREPROCESSING, SETTINGS, HaltError, checkpoints, halt_at, same, weights
from .runs import quick as finetune


def images(count=96, labels=3, classes=None):
    """Random images of so many classes."""
    rng = np.random.default_rng(1)
    found = from_arrays(rng.random((count, 12, 12, 3), np.float32), np.arange(count) % labels, PREPROCESSING)
    found.classes = classes
    return found


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def poison_last(monkeypatch, call):
    """Let the gradients of a call be NaN, though its loss is fine."""
    from normswap.finetune.run.torch import train as engine

    gradients, calls = engine._gradients, []

    def poisoned(accelerator, prepared, *rest):
        calls.append(1)
        found = gradients(accelerator, prepared, *rest)
        if len(calls) == call:
            for parameter in prepared.parameters():
                parameter.grad.fill_(float("nan"))
        return found

    monkeypatch.setattr(engine, "_gradients", poisoned)


class TestBrokenModels:
    def test_a_last_step_that_breaks_the_model(self, source, data, tmp_path, monkeypatch):
        """No loss tells of it; the model of the checkpoint before is the output."""
        poison_last(monkeypatch, 6)
        message = (
            "expected finite scores, received NaN or infinity from the model of step=6; lower lr; "
            f"the model of step 3 is in {tmp_path}/out"
        )
        with pytest.raises(VerificationError, match=f"^{re.escape(message)}$"):
            finetune(source(), tmp_path / "out", data, SETTINGS)

        assert checkpoints(tmp_path / "out")[-1] == "step-000003"
        assert all(np.isfinite(values).all() for values in weights(tmp_path / "out").values())

    def test_a_failing_run_gives_the_old_one_back(self, source, data, tmp_path, monkeypatch):
        """An --overwrite that comes to nothing loses neither the old bundle nor its run."""
        finetune(source(), tmp_path / "out", data, SETTINGS)
        before, old = files(tmp_path / "out"), weights(tmp_path / "out")
        poison_last(monkeypatch, 1)
        with pytest.raises(VerificationError):
            finetune(source(), tmp_path / "out", data, replace(SETTINGS, seed=1), overwrite=True)

        assert files(tmp_path / "out") == before
        assert same(weights(tmp_path / "out"), old)

    def test_what_a_run_replaces_goes_in_the_end(self, source, data, tmp_path):
        """Of the old run, and of an original that the new bundle does not have, nothing is left."""
        finetune(source(), tmp_path / "out", data, SETTINGS)
        bare = tmp_path / "bare"
        without = replace(bundle.read(source()), has_original=False)
        bundle.save(without, bare, source=f"{tmp_path}/net.py:build", preprocessing=PREPROCESSING)
        finetune(bare, tmp_path / "out", data, replace(SETTINGS, seed=1), overwrite=True)

        assert not bundle.read(tmp_path / "out").has_original
        assert not (tmp_path / "out" / "original.safetensors").exists()
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "model.safetensors",
            "normswap.json",
            "run",
        ]


class TestRefusals:
    def test_a_stage_that_cannot_be(self, source, data, tmp_path):
        """Every stage is checked before the first."""
        with pytest.raises(InputError, match="last:99"):
            finetune(source(), tmp_path / "out", data, replace(SETTINGS, stages="norm=2,last:99"))

        assert not (tmp_path / "out").exists()

    def test_resuming_with_other_data(self, source, data, tmp_path):
        """Images of the same labels and shape are told from those of the run."""
        finetune(source(), tmp_path / "out", data, SETTINGS)
        message = (
            f"expected the data of the run in {tmp_path}/out, received other images, labels or preprocessing; "
            "repeat it, or write to another output"
        )
        other = from_arrays(np.random.default_rng(2).random((96, 12, 12, 3), np.float32), data.labels, PREPROCESSING)
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            finetune(source(), tmp_path / "out", other, SETTINGS, resume=True)

    def test_resuming_with_another_model(self, source, data, tmp_path):
        """A bundle patched in another way is told from the run's."""
        finetune(source(), tmp_path / "out", data, SETTINGS)
        message = (
            f"expected the model of the run in {tmp_path}/out, received another bundle; "
            "repeat it, or write to another output"
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            finetune(source("sn"), tmp_path / "out", data, SETTINGS, resume=True)

    def test_images_that_are_all_the_same(self, source, data, tmp_path):
        """They teach nothing."""
        alike = from_arrays(np.full((96, 12, 12, 3), 0.5, np.float32), data.labels, PREPROCESSING)
        message = "expected images that differ, received 64 that are all the same"
        with pytest.raises(VerificationError, match=f"^{message}$"):
            finetune(source(), tmp_path / "out", alike, SETTINGS)

        assert not (tmp_path / "out").exists()

    def test_images_of_another_shape(self, source, tmp_path):
        """What the model cannot take is told of as what was given."""
        known = replace(PREPROCESSING, shape=(1, 12, 12))
        grey = from_arrays(np.random.default_rng(0).random((8, 12, 12, 1), np.float32), np.arange(8) % 3, known)
        message = (
            r"expected images of a shape that the model takes, received \(1, 12, 12\): .*; "
            "see its preprocessing"
        )
        with pytest.raises(InputError, match=f"^{message}$"):
            finetune(source(), tmp_path / "out", grey, SETTINGS)

    def test_an_output_that_is_no_bundle(self, source, data, tmp_path):
        """A folder of other files, and a file, are not overwritten; an unfinished run is told of."""
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.tex").write_text("x")
        (tmp_path / "file").write_text("x")
        for name, what in (("mine", "a folder"), ("file", "a file")):
            message = f"expected a bundle to overwrite, received {tmp_path}/{name}, {what}; write to another output"
            with pytest.raises(OutputExistsError, match=f"^{re.escape(message)}$"):
                finetune(source(), tmp_path / name, data, SETTINGS, overwrite=True)
        with pytest.raises(HaltError):
            finetune(source(), tmp_path / "out", data, SETTINGS, on_step=halt_at(4))
        message = (
            f"expected an output path that does not exist, received {tmp_path}/out with a fine-tuning run that has not "
            "ended; add resume=True to go on with it, or overwrite=True"
        )
        with pytest.raises(OutputExistsError, match=f"^{re.escape(message)}$"):
            finetune(source(), tmp_path / "out", data, SETTINGS)

    def test_labels_count_only_where_they_are_learned(self, source, data, tmp_path):
        """Folders that a teacher explains may be named as they like; without one the names have to agree."""
        tests = images(12, classes=["a", "b", "c"])
        learned = images(classes=["monday", "tuesday", "friday"])
        finetune(source(), tmp_path / "out", learned, replace(SETTINGS, teacher="original"), eval_data=tests)
        with pytest.raises(InputError, match="monday"):
            finetune(source(), tmp_path / "labels", learned, SETTINGS, eval_data=tests)


class TestWhatARunTakesOver:
    def test_preprocessing(self, source, tmp_path):
        """The bundle remembers the mean and deviation it was trained with, and the crop that arrays do not have."""
        path = tmp_path / "cropped"
        known = replace(PREPROCESSING, crop=0.8)
        bundle.save(bundle.read(source()), path, source=f"{tmp_path}/net.py:build", preprocessing=known)
        x, y = np.random.default_rng(0).random((32, 12, 12, 3), np.float32), np.arange(32) % 3
        finetune(path, tmp_path / "out", from_arrays(x, y, replace(known, mean=(0.1,), std=(0.9,))), SETTINGS)

        assert bundle.read(tmp_path / "out").preprocessing == replace(known, mean=(0.1,), std=(0.9,))

    def test_a_batch_larger_than_the_data(self, source, tmp_path):
        """It counts as all of the data."""
        finetune(source(), tmp_path / "out", images(10), replace(SETTINGS, batch_size=64))

        assert tomllib.loads((tmp_path / "out/run/run.toml").read_text())["batch_size"] == 10

    def test_a_second_run_with_calibration(self, source, data, tmp_path):
        """BRN has nothing to calibrate, as good as the original or not."""
        settings = replace(SETTINGS, stages="calibrate,all", teacher="original", early_stop=False)
        finetune(source(), tmp_path / "first", data, settings)
        result = finetune(tmp_path / "first", tmp_path / "second", data, settings)

        assert result.steps == 6

    def test_a_blend_of_less_than_a_step(self, source, data, tmp_path):
        """It takes one."""
        assert finetune(source("gn"), tmp_path / "out", data, replace(SETTINGS, blend=0.001)).steps == 6


class TestStatistics:
    def test_of_hardened_gates(self, source, data, tmp_path):
        """Statistics are those of the model as it is left, after its gates became one-hot."""
        finetune(source("sn"), tmp_path / "out", data, replace(SETTINGS, harden=True, reestimate=64))
        model = normswap.load(tmp_path / "out")
        found = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
        update_statistics(model, data.batches(64, data.sample(64)))

        for name, value in found.items():
            torch.testing.assert_close(model.state_dict()[name], value)

    def test_of_the_start(self, source, data, tmp_path, monkeypatch):
        """The model of step 0 is evaluated and kept with re-estimated statistics, as those of later steps are."""
        from normswap.finetune.run import evaluation
        from normswap.finetune.run.accuracy import Accuracy

        scores = iter([50.0, 90.0, 10.0, 10.0])
        monkeypatch.setattr(evaluation, "accuracy", lambda *_, **__: Accuracy(next(scores), 100.0, 96))
        finetune(source("sn"), tmp_path / "out", data, replace(SETTINGS, reestimate=64), eval_data=data)

        assert not np.array_equal(weights(tmp_path / "out")["1.running_mean"], weights(source("sn"))["1.running_mean"])
        assert np.array_equal(weights(tmp_path / "out")["0.weight"], weights(source("sn"))["0.weight"])


def test_no_row_is_missing_after_a_kill(source, data, tmp_path, monkeypatch):
    """A row is on the disk before the checkpoint that would let a run go on behind it."""
    writing = Checkpoints.writing

    @contextmanager
    def killed(self, step, log):
        with writing(self, step, log) as folder:
            yield folder
        if step == 3:
            raise HaltError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "writing", killed)
        with pytest.raises(HaltError):
            finetune(source(), tmp_path / "out", data, SETTINGS, eval_data=data)
    finetune(source(), tmp_path / "out", data, SETTINGS, eval_data=data, resume=True)

    rows = read(tmp_path / "out/run/metrics.csv")
    assert [row["step"] for row in rows] == [0, 0, 1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in rows if row["eval_top1"] is not None] == [0, 0, 3, 6]


@pytest.mark.parametrize(("count", "asked", "taken", "judging"), [(96, 16, 16, 16), (96, 90, 72, 24), (3, 8, 3, 3)])
def test_calibration_is_judged_by_other_images(count, asked, taken, judging):
    """They are as many, or a quarter of all; of very few all serve for both."""
    x = np.linspace(0, 1, count, dtype=np.float32)[:, None, None, None] * np.ones((1, 12, 12, 3), np.float32)
    data = from_arrays(x, np.arange(count) % 3, PREPROCESSING)
    if taken < asked:
        others = 0 if count < 4 else judging
        message = f"expected {asked} images to calibrate on, received {taken} beside {others} to judge it by"
        with pytest.warns(NormswapWarning, match=f"^{message}$"):
            batches, held = split(data, asked)
    else:
        batches, held = split(data, asked)

    seen, kept = ({float(image.flat[0]) for image in part} for part in (np.concatenate(batches), held))
    assert (len(seen), len(kept)) == (taken, judging)
    assert bool(seen & kept) == (count < 4)
