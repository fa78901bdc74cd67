"""Runs from bundle to bundle: stages, what is written, and what stops one."""

import os
import re
import signal
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

import normswap
from normswap.bundles import bundle
from normswap.errors import InputError, OutputExistsError, VerificationError
from normswap.finetune.run.folder import RunFolder
from normswap.finetune.run.interruption import StoppedError
from normswap.finetune.run.journal import read

from .runs import SETTINGS, HaltError, checkpoints, halt_at, same, weights
from .runs import quick as finetune


class TestOutput:
    def test_a_run(self, source, data, tmp_path):
        """The output is a bundle with the trained model, its original, the settings, the curves and checkpoints."""
        steps = []
        result = finetune(
            source(), tmp_path / "out", data, SETTINGS, record={"data": "x.npz"}, on_step=lambda s, _: steps.append(s)
        )

        assert steps == [1, 2, 3, 4, 5, 6]
        assert result.to_dict() == {
            "output": str(tmp_path / "out"),
            "steps": 6,
            "kept": 6,
            "loss": result.loss,
            "eval": None,
            "original": None,
        }
        found = bundle.read(tmp_path / "out")
        assert float(found.model[1].r_max) > 1
        assert found.original()[1].weight.tolist() == [1, 1, 1, 1]
        assert checkpoints(tmp_path / "out") == ["step-000003", "step-000006"]
        settings = tomllib.loads((tmp_path / "out/run/run.toml").read_text())
        assert settings["data"] == "x.npz"
        assert settings["lr"] == 0.05
        rows = read(tmp_path / "out/run/metrics.csv")
        assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
        assert [row["clipped"] is not None for row in rows] == [False, False, False, True, False, False, True]

    def test_the_best_model_is_kept(self, source, data, tmp_path, monkeypatch):
        """With data to evaluate on the bundle holds the model that was best on it, and its checkpoint stays."""
        from normswap.finetune.run import evaluation
        from normswap.finetune.run.accuracy import Accuracy

        scores = iter([50.0, 10.0, 90.0, 20.0, 30.0, 40.0])  # the original, the start, and four checkpoints
        monkeypatch.setattr(evaluation, "accuracy", lambda *_, **__: Accuracy(next(scores), 100.0, 96))
        result = finetune(source(), tmp_path / "out", data, replace(SETTINGS, steps=12), eval_data=data)

        assert result.evaluation.top1 == 90.0
        assert result.original.top1 == 50.0
        assert checkpoints(tmp_path / "out") == ["step-000003", "step-000009", "step-000012"]
        best = weights(tmp_path / "out/run/checkpoints/step-000003")
        assert same(weights(tmp_path / "out"), best)

    def test_stops_when_it_is_as_good_as_its_teacher(self, source, data, tmp_path, monkeypatch):
        """A run that distils ends at the first evaluation that reaches the original's accuracy."""
        from normswap.finetune.run import evaluation
        from normswap.finetune.run.accuracy import Accuracy

        scores = iter([50.0, 10.0, 50.0])
        monkeypatch.setattr(evaluation, "accuracy", lambda *_, **__: Accuracy(next(scores), 100.0, 96))
        settings = replace(SETTINGS, teacher="original", steps=12)
        result = finetune(source("gn"), tmp_path / "out", data, settings, eval_data=data)

        assert result.steps == 3
        again = finetune(source("gn"), tmp_path / "out", data, settings, eval_data=data, resume=True)
        assert again.steps == 3

    def test_stages(self, source, data, tmp_path):
        """Each stage trains what it names, from the step the one before it ended at; calibration comes first."""
        settings = replace(SETTINGS, stages="calibrate,norm=2,all", teacher="original")
        finetune(source("gn"), tmp_path / "out", data, settings)
        rows = read(tmp_path / "out/run/metrics.csv")

        assert [row["stage"] for row in rows] == ["start", "norm", "norm", "all", "all", "all", "all"]
        start = weights(tmp_path / "in-gn")
        calibrated = finetune(source("gn"), tmp_path / "c", data, replace(settings, stages="calibrate"))
        assert calibrated.steps == 0
        assert not np.array_equal(weights(tmp_path / "c")["1.weight"], start["1.weight"])

    def test_calibration_that_does_not_help_is_undone(self, source, data, tmp_path, monkeypatch):
        """What takes the model further from the original on other images is not kept."""
        from normswap.finetune.run import run

        def spoil(model, reference, batches):
            with torch.no_grad():
                model[1].weight.mul_(3)

        monkeypatch.setattr(run, "calibrate", spoil)
        settings = replace(SETTINGS, stages="calibrate", teacher="original")
        finetune(source("gn"), tmp_path / "out", data, settings)

        assert same(weights(tmp_path / "out"), weights(tmp_path / "in-gn"))

    def test_hardened_gates(self, source, data, tmp_path):
        """harden ends with one-hot gates, in the bundle too."""
        finetune(source("sn"), tmp_path / "out", data, replace(SETTINGS, harden=True), eval_data=data)
        gates = normswap.load(tmp_path / "out")[1].gates()

        assert [sorted(gate.tolist()) for gate in gates] == [[0, 0, 1], [0, 0, 1]]

    def test_the_average_is_deployed(self, source, data, tmp_path):
        """With ema the bundle holds the average, re-estimated statistics with it, and resuming has the other."""
        finetune(source("sn"), tmp_path / "out", data, replace(SETTINGS, ema=0.5, reestimate=64))
        last = tmp_path / "out/run/checkpoints/step-000006"

        assert same(weights(tmp_path / "out"), safetensors.numpy.load_file(last / "deployed.safetensors"))
        assert not same(weights(tmp_path / "out"), weights(last))

    def test_an_output_that_exists(self, source, data, tmp_path):
        """An existing output is refused before training, or replaced once the new one is whole."""
        finetune(source("sn"), tmp_path / "out", data, SETTINGS)
        before = weights(tmp_path / "out")
        with pytest.raises(OutputExistsError):
            finetune(source(), tmp_path / "out", data, SETTINGS)
        with pytest.raises(HaltError):
            finetune(
                source("sn"), tmp_path / "out", data, replace(SETTINGS, seed=1), overwrite=True, on_step=halt_at(4)
            )
        assert same(weights(tmp_path / "out"), before)
        normswap.load(tmp_path / "out")
        finetune(source("sn"), tmp_path / "out", data, replace(SETTINGS, seed=1), overwrite=True)
        assert not same(weights(tmp_path / "out"), before)

    def test_onto_itself(self, source, data, tmp_path):
        """A bundle can be replaced by its fine-tuned self, original and all."""
        path = source("gn")
        finetune(path, path, data, SETTINGS, overwrite=True)

        assert bundle.read(path).original()[1].weight.tolist() == [1, 1, 1, 1]
        assert not (path / "run" / "original.safetensors").exists()


class TestStopping:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_signals(self, source, data, tmp_path, number, code):
        """The step under way is finished and saved, the error says how to go on, and doing so loses nothing."""
        finetune(source("sn"), tmp_path / "whole", data, SETTINGS, eval_data=data)

        def shoot(step, figures):
            if step == 3:
                os.kill(os.getpid(), number)

        handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
        message = f"stopped by {number.name} after step 4, which is saved; go on with resume=True"
        with pytest.raises(StoppedError, match=f"^{message}$") as caught:
            finetune(source("sn"), tmp_path / "out", data, SETTINGS, eval_data=data, on_step=shoot)

        assert caught.value.exit_code == code
        assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
        unfinished = (
            f"expected a bundle in {tmp_path}/out, received a fine-tuning run that has not ended; "
            "repeat it with resume=True"
        )
        with pytest.raises(InputError, match=f"^{re.escape(unfinished)}$"):
            normswap.load(tmp_path / "out")
        steps = []
        finetune(
            source("sn"), tmp_path / "out", data, SETTINGS, eval_data=data, resume=True,
            on_step=lambda step, _: steps.append(step),
        )  # fmt: skip
        assert steps == [5, 6]
        assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))

    def test_a_run_that_came_and_went_meanwhile(self, source, data, tmp_path, monkeypatch):
        """One that ends between the look at the output and its lock keeps it."""
        first, looked = tmp_path / "first", RunFolder.require_free

        def late(folder, **how):
            looked(folder, **how)
            os.rename(first, folder.output)

        finetune(source(), first, data, SETTINGS)
        before, names = weights(first), sorted(os.listdir(first))
        monkeypatch.setattr(RunFolder, "require_free", late)
        message = f"expected an output path that does not exist, received {tmp_path}/out; add overwrite=True"
        with pytest.raises(OutputExistsError, match=f"^{re.escape(message)}$"):
            finetune(source(), tmp_path / "out", data, SETTINGS)
        assert same(before, weights(tmp_path / "out"))
        assert sorted(os.listdir(tmp_path / "out")) == names

    def test_two_runs_into_one_output(self, source, data, tmp_path):
        """A run keeps others out of its output, whether they resume or overwrite, and ends as if there were none."""
        message = (
            f"expected an output that no other run is writing, received {tmp_path}/out; "
            "wait for that run to end, or write to another output"
        )

        def intrude(step, figures):
            for mode in ("resume", "overwrite"):
                with pytest.raises(OutputExistsError, match=f"^{re.escape(message)}$"):
                    finetune(source(), tmp_path / "out", data, SETTINGS, **{mode: True})

        finetune(source(), tmp_path / "out", data, SETTINGS, on_step=intrude)
        finetune(source(), tmp_path / "whole", data, SETTINGS)

        assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
        assert not (tmp_path / "out" / ".lock").exists()

    @pytest.mark.parametrize("left", [".lock", ".normswap-0123456789abcdef/new/run/run.toml"])
    def test_what_a_run_killed_at_its_start_leaves(self, source, data, tmp_path, left):
        """It may be replaced, by a run and by a bundle, and is gone then."""
        for name in ("run", "bundle"):
            (tmp_path / name / left).parent.mkdir(parents=True)
            (tmp_path / name / left).touch()
        with pytest.raises(OutputExistsError, match="add overwrite=True$"):
            finetune(source(), tmp_path / "run", data, SETTINGS)
        finetune(source(), tmp_path / "run", data, SETTINGS, overwrite=True)
        normswap.save(normswap.load(tmp_path / "run"), tmp_path / "bundle", overwrite=True)

        for name in ("run", "bundle"):
            assert (tmp_path / name / "normswap.json").exists()
            assert not (tmp_path / name / left).exists()

    def test_a_failing_run_leaves_no_output(self, source, data, tmp_path):
        """A run whose first step fails leaves nothing."""
        with pytest.raises(VerificationError):
            finetune(source(), tmp_path / "out", data, replace(SETTINGS, lr=1e30))

        assert not (tmp_path / "out").exists()

    def test_a_loss_that_is_not_finite(self, source, data, tmp_path, monkeypatch):
        """The run ends with the last checkpoint's model as the output, and says so."""
        from normswap.finetune.run.torch import train as engine

        gradients, calls = engine._gradients, []

        def broken(*args):
            calls.append(1)
            loss, right = gradients(*args)
            return (float("nan") if len(calls) == 5 else loss), right

        monkeypatch.setattr(engine, "_gradients", broken)
        message = (
            f"expected a finite loss, received loss=nan at step=4; lower lr; the model of step 3 is in {tmp_path}/out"
        )
        with pytest.raises(VerificationError, match=f"^{re.escape(message)}$"):
            finetune(source(), tmp_path / "out", data, SETTINGS)

        assert same(weights(tmp_path / "out"), weights(tmp_path / "out/run/checkpoints/step-000003"))
        normswap.load(tmp_path / "out")

    def test_a_full_disk(self, source, data, tmp_path, monkeypatch):
        """A checkpoint that cannot be written leaves the one before it whole, to go on from."""
        from normswap.finetune.run import run

        write = run.write_weights

        def full(model, path):
            if "step-000006" in str(path):
                path.write_bytes(b"half")
                raise OSError(28, "No space left on device")
            write(model, path)

        with monkeypatch.context() as patched:
            patched.setattr(run, "write_weights", full)
            with pytest.raises(OSError, match="No space left on device"):
                finetune(source(), tmp_path / "out", data, SETTINGS)
        finetune(source(), tmp_path / "whole", data, SETTINGS)

        assert checkpoints(tmp_path / "out") == ["step-000000", "step-000003"]
        finetune(source(), tmp_path / "out", data, SETTINGS, resume=True)
        assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))
