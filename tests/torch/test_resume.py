"""Resuming a run: bit for bit what it would have been, whatever ended it."""

import json
import multiprocessing
import random
import re
import time
from dataclasses import replace

import pytest
import safetensors.numpy
import torch

from normswap.bundles import bundle
from normswap.data.dataset import from_arrays
from normswap.errors import InputError, NormswapWarning
from normswap.finetune import Distillation
from normswap.finetune.run.checkpoints import Checkpoints
from normswap.finetune.run.folder import Progress
from normswap.finetune.run.journal import read
from normswap.formats.seal import sealed

from ..helpers import exactly
from .runs import EVERYTHING, PREPROCESSING, SETTINGS, HaltError, checkpoints, halt_at, same, weights
from .runs import quick as finetune


class TestResume:
    @pytest.mark.parametrize("target", ["sn", "brn", "gn"])
    @pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
    @pytest.mark.parametrize("step", [2, 5])
    def test_gives_the_uninterrupted_run(self, source, data, tmp_path, target, changes, step):
        """A run that is halted and resumed ends in the same weights, bit for bit, dropout and all."""
        settings = replace(SETTINGS, **changes)
        finetune(source(target), tmp_path / "whole", data, settings, eval_data=data)
        with pytest.raises(HaltError):
            finetune(source(target), tmp_path / "parts", data, settings, eval_data=data, on_step=halt_at(step))
        steps = []
        finetune(
            source(target), tmp_path / "parts", data, settings, eval_data=data, resume=True,
            on_step=lambda now, _: steps.append(now),
        )  # fmt: skip

        assert steps == ([1, 2, 3, 4, 5, 6] if step == 2 and not changes else steps)
        assert steps[-1] == 6
        assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
        for name in checkpoints(tmp_path / "whole"):
            one, other = (tmp_path / run / "run/checkpoints" / name for run in ("whole", "parts"))
            assert same(weights(one), weights(other))
            states = [safetensors.numpy.load_file(each / "state.safetensors") for each in (one, other)]
            assert same(*states)

        def curve(output):
            kept = ("step", "stage", "loss", "learning_rate", "eval_top1", "drift", "clipped")
            return [[row[name] for name in kept] for row in read(output / "run/metrics.csv")]

        assert curve(tmp_path / "parts") == curve(tmp_path / "whole")

    @pytest.mark.parametrize(
        "options",
        [
            {"optimizer": "adam", "schedule": "step", "milestones": (0.5,)},
            {"optimizer": "adamw", "schedule": "poly", "power": 2.0},
            {"optimizer": "sgd", "momentum": 0.5, "schedule": "constant"},
            {"optimizer": "amsgrad", "schedule": "plateau", "patience": 1, "factor": 0.5, "lr": 5.0},
        ],
        ids=lambda options: options["schedule"],
    )
    def test_with_every_rule_and_schedule(self, source, data, tmp_path, options):
        """Moments, the number of steps and what a plateau has seen go on as well, in a later stage too."""
        chosen = {"stages": "norm=4,all=10", "steps": 14, "weight_decay": 1e-2, **options}
        settings = replace(SETTINGS, checkpoint_every=2, **{"lr": 0.3, **chosen})
        finetune(source("sn"), tmp_path / "whole", data, settings, eval_data=data)
        for stop in (4, 11):
            with pytest.raises(HaltError):
                finetune(
                    source("sn"), tmp_path / "parts", data, settings, eval_data=data, resume=True, on_step=halt_at(stop)
                )
        finetune(source("sn"), tmp_path / "parts", data, settings, eval_data=data, resume=True)
        rows = [read(tmp_path / run / "run/metrics.csv") for run in ("whole", "parts")]

        assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
        assert [row["learning_rate"] for row in rows[0]] == [row["learning_rate"] for row in rows[1]]
        assert [row["eval_loss"] for row in rows[0]] == [row["eval_loss"] for row in rows[1]]
        if options["schedule"] == "plateau":
            assert len({row["learning_rate"] for row in rows[0] if row["step"] > 4}) > 1

    def test_starts_where_there_is_none(self, source, data, tmp_path):
        """--resume without a run to resume is a fresh run, and so is one beside what a killed writer left."""
        assert finetune(source(), tmp_path / "out", data, SETTINGS, resume=True).steps == 6
        (tmp_path / "new" / ".normswap-0123456789abcdef").mkdir(parents=True)
        assert finetune(source(), tmp_path / "new", data, SETTINGS, resume=True).steps == 6

    def test_a_folder_that_is_no_run(self, source, data, tmp_path):
        """A folder with other things in it is left alone."""
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("precious")
        with pytest.raises(
            InputError, match=f"^{re.escape(f'expected a fine-tuning run to resume in {tmp_path}/out, received none')}$"
        ):
            finetune(source(), tmp_path / "out", data, SETTINGS, resume=True)

    @pytest.mark.parametrize("teacher", ["original", "none"])
    def test_the_default_rate(self, source, data, tmp_path, teacher):
        """A model that is taught learns at a share of the loss it starts with, which a resumed run still knows."""
        path = source("in")
        chosen = {"lr": None, "teacher": teacher, "early_stop": False, "warmup": 0.0, "schedule": "constant"}
        with pytest.raises(HaltError):
            finetune(path, tmp_path / "out", data, replace(SETTINGS, **chosen), on_step=halt_at(4))
        rates = []
        finetune(
            path, tmp_path / "out", data, replace(SETTINGS, **chosen), resume=True,
            on_step=lambda step, figures: rates.append(figures["learning_rate"]),
        )  # fmt: skip

        found = bundle.read(path)
        x = data.batch(data.sample(64))[0]
        with torch.no_grad():
            loss = float(Distillation(found.model.eval(), found.original())(x, found.model(torch.from_numpy(x))))
        expected = 0.0125 if teacher == "none" else 0.25 * 0.005 * loss
        assert 0.25 * 0.005 * 1e-3 < expected <= 0.0125
        assert rates == pytest.approx(3 * [expected], rel=1e-4)

    def test_other_settings(self, source, data, tmp_path):
        """A run cannot go on with another learning rate."""
        finetune(source(), tmp_path / "out", data, SETTINGS)
        message = (
            f"expected the settings of the run in {tmp_path}/out, lr=0.05, received lr=1.0; "
            "repeat them, or write to another output"
        )
        with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
            finetune(source(), tmp_path / "out", data, replace(SETTINGS, lr=1.0), resume=True)

    def test_other_data(self, source, data, tmp_path):
        """A run cannot go on with other labels."""
        finetune(source(), tmp_path / "out", data, SETTINGS)
        other = from_arrays(data._images.images, data.labels[::-1], PREPROCESSING)
        with pytest.raises(
            InputError, match="^expected the data of the run in .*, received other images, labels or pre"
        ):
            finetune(source(), tmp_path / "out", other, SETTINGS, resume=True)

    @pytest.mark.parametrize("harm", ["truncated", "changed", "no log"])
    def test_a_damaged_checkpoint(self, source, data, tmp_path, harm):
        """The one before it is taken, with a warning, and the run ends as if nothing had been."""
        finetune(source(), tmp_path / "whole", data, SETTINGS)
        with pytest.raises(HaltError):
            finetune(source(), tmp_path / "out", data, replace(SETTINGS, checkpoint_every=2), on_step=halt_at(5))
        newest = tmp_path / "out/run/checkpoints/step-000004"
        file = newest / ("checkpoint.json" if harm == "no log" else "model.safetensors")
        if harm == "truncated":
            file.write_bytes(file.read_bytes()[:-8])
        elif harm == "changed":
            content = bytearray(file.read_bytes())
            content[-1] ^= 1
            file.write_bytes(bytes(content))
        else:
            file.unlink()
        steps = []
        with pytest.warns(NormswapWarning, match=r"step-000004.*; going on from the checkpoint before it$"):
            finetune(
                source(), tmp_path / "out", data, replace(SETTINGS, checkpoint_every=2), resume=True,
                on_step=lambda step, _: steps.append(step),
            )  # fmt: skip

        assert steps == [3, 4, 5, 6]
        assert same(weights(tmp_path / "whole"), weights(tmp_path / "out"))

    def test_only_damaged_checkpoints(self, source, data, tmp_path):
        """Without a whole one there is nothing to go on from."""
        finetune(source(), tmp_path / "out", data, SETTINGS)
        for name in checkpoints(tmp_path / "out"):
            (tmp_path / "out/run/checkpoints" / name / "checkpoint.json").write_text("{}")
        with (
            pytest.warns(NormswapWarning, match="going on from the checkpoint before it$"),
            pytest.raises(InputError, match="; no other checkpoint is whole: start anew with overwrite=True$"),
        ):
            finetune(source(), tmp_path / "out", data, SETTINGS, resume=True)

    @pytest.mark.slow
    def test_kills_at_any_moment(self, source, data, tmp_path):
        """Twenty kills at random moments of a run of 60 steps, each resumed: the weights are those of no kill."""
        settings = replace(SETTINGS, steps=60, checkpoint_every=7, ema=0.9)
        path = source("sn")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["normswap.finetune.run.torch.train", "normswap.layers.torch.kernels", "torch._dynamo", "tensorboardX"]
        )

        def start(output):
            options = {"eval_data": data, "resume": True, "draw": False}
            process = context.Process(target=finetune.func, args=(path, output, data, settings), kwargs=options)
            process.start()
            return process

        whole = tmp_path / "whole"
        start(whole).join()
        begin = time.perf_counter()
        start(tmp_path / "timed").join()
        duration = time.perf_counter() - begin
        expected, moments = weights(whole), random.Random(0)
        for kill in range(20):
            output = tmp_path / str(kill)
            process = start(output)
            process.join(moments.uniform(0.1, 1.0) * duration)
            process.kill()
            process.join()
            again = start(output)
            again.join()
            assert again.exitcode == 0
            assert same(weights(output), expected)
            assert json.loads((output / "normswap.json").read_text())["sha256"].keys() == {
                "model.safetensors",
                "original.safetensors",
            }

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            (lambda told: told["log"].update(step=True), "an integer at log.step in {file}, received True"),
            (lambda told: told["log"].update(lr="1"), "a number at log.lr in {file}, received '1'"),
            (lambda told: told["log"].update(plateau=[0, "x", 0]),
             "a number at log.plateau[1] in {file}, received 'x'"),
            (lambda told: told["log"].update(best={"top1": 1}),
             "a value at log.best.top5 in {file}, received none (and 1 more)"),
            (lambda told: told["log"].update(best={"top1": 1, "top5": 1, "n": 2.5}),
             "an integer at log.best.n in {file}, received 2.5"),
            (lambda told: told.update(log=[]), "an object at log in {file}, received []"),
            (lambda told: told.update(sha256={}),
             "every file beside it at sha256 in {file}, received model.safetensors, which is there and not listed"),
            (lambda told: told["sha256"].update({"../x": "0"}),
             "names of files at sha256 in {file}, received '../x'"),
        ],
    )  # fmt: skip
    def test_a_log_of_other_kinds(self, source, data, tmp_path, change, expected):
        """Every field of a checkpoint's log is read as declared, even where its seal is right."""
        finetune(source(), tmp_path / "out", data, replace(SETTINGS, steps=2))
        file = sorted((tmp_path / "out/run/checkpoints").iterdir())[-1] / "checkpoint.json"
        told = json.loads(file.read_text())
        del told["seal"]
        change(told)
        file.write_text(json.dumps(sealed(told)))
        said = Checkpoints(tmp_path / "out/run/checkpoints", Progress)

        with pytest.raises(InputError, match=exactly(f"expected {expected.format(file=file)}")):
            said.at(2)

    def test_folders_of_other_names(self, source, data, tmp_path):
        """What is no checkpoint by its name is passed over, whatever it begins with."""
        finetune(source(), tmp_path / "out", data, replace(SETTINGS, steps=2))
        for name in ("step-1abc", "step-٣٣٣٣٣٣", "step-", f"step-{'9' * 5000}"[:200]):
            (tmp_path / "out/run/checkpoints" / name).mkdir()

        assert Checkpoints(tmp_path / "out/run/checkpoints", Progress).newest().log.step == 2
