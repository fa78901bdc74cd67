"""What is said of an error: options are named as whoever asked gives them."""

from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from normswap.bundles.manifest import read_manifest
from normswap.convert.groups import resolve_groups
from normswap.convert.targets import GroupNorm, SwitchNorm, as_target
from normswap.data.dataset import from_arrays
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError, OutputExistsError, UnsupportedError, command_line, option, spoken
from normswap.finetune.run.interruption import StoppedError
from normswap.finetune.run.training import not_finite
from normswap.patchers.plan import Site, decide
from normswap.sources.outputs import require_output
from normswap.verification.stored import load_reference

SITE = Site("layer 1.bn", "BatchNorm2d", 8, obstacle="it clips")
LAZY = Site("bn", "SyncBatchNorm", 8, any_rank=True)


IMAGES = Preprocessing((3, 8, 8), "channels_first")


def refused(site, target="sn"):
    """The note of a site that is refused."""
    return decide("torch", [site], as_target(target)).decisions[0].note


def said(error, call, *arguments, **options):
    """The message of the error that a call raises."""
    with pytest.raises(error) as raised:
        call(*arguments, **options)
    return str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "command", "python"),
    [
        (["overwrite"], "--overwrite", "overwrite=True"),
        (["input_shape", "3,8,8"], "--input-shape 3,8,8", "input_shape='3,8,8'"),
        (["exclude", "layer 1.*"], "--exclude 'layer 1.*'", "exclude='layer 1.*'"),
        (["steps", 3], "--steps 3", "steps=3"),
    ],
)
def test_an_option(arguments, command, python):
    """It is written so that it can be typed as it stands."""
    with command_line():
        assert option(*arguments) == command
    assert option(*arguments) == python


def test_the_voice_ends_with_the_command():
    """It is that of the command's own thread, and Python's again after it, also after an error."""
    heard = []
    with pytest.raises(ValueError, match="^x$"), command_line():
        thread = Thread(target=lambda: heard.append(spoken("command", "python")))
        thread.start()
        thread.join()
        heard.append(spoken("command", "python"))
        raise ValueError("x")

    assert [*heard, spoken("command", "python")] == ["python", "command", "python"]


MESSAGES = [
    (
        lambda folder: said(OutputExistsError, require_output, folder, overwrite=False),
        "expected an output path that does not exist, received {}; add --overwrite",
        "expected an output path that does not exist, received {}; add overwrite=True",
    ),
    (
        lambda folder: said(UnsupportedError, decide("torch", [SITE], GroupNorm()).require_work),
        "expected BatchNorms that can be replaced, received 1 that cannot:\n  layer 1.bn (BatchNorm2d): it clips\n"
        "leave such a layer as it is with --exclude NAME",
        "expected BatchNorms that can be replaced, received 1 that cannot:\n  layer 1.bn (BatchNorm2d): it clips\n"
        "leave such a layer as it is with exclude='NAME'",
    ),
    (
        lambda folder: refused(LAZY),
        "a SyncBatchNorm takes any number of dimensions: give --input-shape to see how many there are",
        "a SyncBatchNorm takes any number of dimensions: give an example input to see how many there are",
    ),
    (
        lambda folder: refused(Site("layer 1.bn", "BatchNorm1d", 8, spatial=()), "in"),
        "a group of one value per sample normalises to zero and erases the signal (channels=8, groups=8, "
        "values per channel=1); use fewer groups, or leave the layer as it is with --exclude 'layer 1.bn'",
        "a group of one value per sample normalises to zero and erases the signal (channels=8, groups=8, "
        "values per channel=1); use fewer groups, or leave the layer as it is with exclude='layer 1.bn'",
    ),
    (
        lambda folder: said(InputError, read_manifest, folder),
        "expected a bundle in {}, received a folder without normswap.json; make one with `normswap patch`",
        "expected a bundle in {}, received a folder without normswap.json; make one with `normswap.save`",
    ),
    (
        lambda folder: said(InputError, read_manifest, unfinished(folder)),
        "expected a bundle in {}/b, received a fine-tuning run that has not ended; repeat it with --resume",
        "expected a bundle in {}/b, received a fine-tuning run that has not ended; repeat it with resume=True",
    ),
    (
        lambda folder: said(InputError, load_reference, garbage(folder)),
        "expected a reference written by --save-reference in {}/r.npz, received File is not a zip file; write it again",
        "expected a reference written by save_reference= in {}/r.npz, received File is not a zip file; write it again",
    ),
    (
        lambda folder: refused(
            Site("bn", "BatchNorm2d", 8, has_statistics=False), SwitchNorm(batch_statistics="frozen")
        ),
        "--batch-statistics frozen needs running statistics to freeze",
        "batch_statistics='frozen' needs running statistics to freeze",
    ),
    (
        lambda folder: said(UnsupportedError, resolve_groups, GroupNorm(groups=3), 8, None, "bn"),
        "bn: expected groups to divide the 8 channels, received groups=3; use --groups 1, --groups auto, "
        "or in a recipe indivisible='gcd'",
        "bn: expected groups to divide the 8 channels, received groups=3; use groups=1, groups='auto', "
        "or indivisible='gcd'",
    ),
    (
        lambda folder: said(InputError, from_arrays, np.full((1, 8, 8, 3), 2.0), np.zeros(1, int), IMAGES),
        "expected floating-point `x` in 0..1, received 2 to 2; divide what is in 0..255 by 255 or make it uint8, and "
        "leave normalization to --mean and --std",
        "expected floating-point `x` in 0..1, received 2 to 2; divide what is in 0..255 by 255 or make it uint8, and "
        "leave normalization to mean and std",
    ),
    (
        lambda folder: not_finite(float("nan"), 3),
        "expected a finite loss, received loss=nan at step=3; lower --lr",
        "expected a finite loss, received loss=nan at step=3; lower lr",
    ),
    (
        lambda folder: str(StoppedError(15, 3)),
        "stopped by SIGTERM after step 3, which is saved; go on with --resume",
        "stopped by SIGTERM after step 3, which is saved; go on with resume=True",
    ),
]


def unfinished(folder: Path) -> Path:
    """A folder with a run that has come to no bundle."""
    (folder / "b" / "run").mkdir(parents=True, exist_ok=True)
    (folder / "b" / "run" / "run.toml").touch()
    return folder / "b"


def garbage(folder: Path) -> Path:
    """A file that is no reference."""
    (folder / "r.npz").write_text("x")
    return folder / "r.npz"


@pytest.mark.parametrize(("tell", "command", "python"), MESSAGES)
def test_both_voices(tmp_path, tell, command, python):
    """The same way out is told to someone at the command line and to a caller in Python."""
    with command_line():
        assert tell(tmp_path) == command.format(tmp_path)
    assert tell(tmp_path) == python.format(tmp_path)
