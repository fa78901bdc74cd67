"""Damaged and forged files of every kind: refused as input, or read as what was written; never an error of ours.

`benchmarks/fuzz.py` does the same through the command line, for more formats and as many inputs as one likes.
"""

import json
import random
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from normswap.bundles.manifest import MANIFEST, manifest_of, read_manifest
from normswap.convert.recipe import Choice, Recipe, recipe_from_json
from normswap.convert.targets import BatchRenorm, GroupNorm, SwitchNorm
from normswap.data.dataset import open_data
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError
from normswap.finetune.run.checkpoints import Checkpoints
from normswap.finetune.run.folder import Progress
from normswap.finetune.run.settings import Settings
from normswap.formats.seal import SEAL, sealed
from normswap.sources.named_arrays import read_inputs

from .mutations import bytes_of, json_of

RECIPE = Recipe(
    "torch",
    (
        Choice("conv.bn1", "BatchNorm2d", 8, GroupNorm(groups=2), (4, 4), "conv", "full"),
        Choice("bn2", "BatchNorm2d", 8, SwitchNorm(gates=(0.25, 0.25, 0.5))),
        Choice("bn3", "BatchNorm1d", 4, BatchRenorm(), ()),
    ),
)
PREPROCESSING = Preprocessing((3, 8, 8), "channels_first", (0.5,), (0.25, 0.25, 0.5))

seeds = given(st.integers(0, 2**32).map(random.Random))


def tries(count):
    """So many inputs, the same in every run."""
    suppressed = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=suppressed
    )


def sealed_again(data):
    """What someone would write who knows of the seal."""
    return sealed({key: value for key, value in data.items() if key != SEAL})


def read_or_refused(read, *arguments):
    """What is read, or None where it is refused; any other error is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return read(*arguments)
        except InputError:
            return None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """What a bundle's folder holds, with any bytes as weights."""
    folder = tmp_path_factory.mktemp("bundle")
    for name in ("model", "original"):
        (folder / f"{name}.safetensors").write_bytes(name.encode() * 9)
    (folder / MANIFEST).write_text(manifest_of(folder, folder, RECIPE, "net.py:build", PREPROCESSING))
    return folder


@tries(120)
@seeds
def test_bundles(bundle, tmp_path, draw):
    """A byte or field that is another one is told by hash or seal, whichever file it is in."""
    folder = shutil.copytree(bundle, tmp_path / "b", dirs_exist_ok=True)
    before = read_manifest(folder)
    file = draw.choice(sorted(folder.iterdir()))
    json_too = file.suffix == ".json" and draw.random() < 0.5
    file.write_bytes((json_of if json_too else bytes_of)(file.read_bytes(), draw))

    assert read_or_refused(read_manifest, folder) in (None, before)


@tries(150)
@seeds
def test_forged_manifests(bundle, tmp_path, draw):
    """Fields of any kind under a right seal are refused, or are what a manifest may say."""
    folder = shutil.copytree(bundle, tmp_path / "b", dirs_exist_ok=True)
    content = json_of((folder / MANIFEST).read_bytes(), draw, sealed_again)
    (folder / MANIFEST).write_bytes(content)
    found = read_or_refused(read_manifest, folder)
    if found is not None:
        manifest, recipe = found
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).write_text(manifest_of(folder, folder, recipe, manifest.source, manifest.preprocessing))

        assert read_manifest(folder)[1] == recipe


@tries(150)
@seeds
def test_recipes(draw):
    """What is read as a recipe or rules can be written and read again."""
    rules = {"schema_version": 1, "rules": [{"match": "a.*", "depth": [0, 0.5], "stage": 1, "target": {"kind": "sn"}}]}
    text = draw.choice([RECIPE.to_json(), json.dumps(rules)]).encode()
    found = read_or_refused(recipe_from_json, draw.choice([json_of, bytes_of])(text, draw))
    if isinstance(found, Recipe):
        assert repr(recipe_from_json(found.to_json())) == repr(found)  # NaN is not itself


@tries(80)
@seeds
def test_run_folders(tmp_path, draw):
    """Checkpoints that are not as they were saved are passed over, settings of other kinds refused."""
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    checkpoints = Checkpoints(folder, Progress)
    for step in (1, 2):
        with checkpoints.writing(step, Progress(step, [0.5, 0.25], lr=0.1, data="d", model="m")) as temporary:
            (temporary / "state.safetensors").write_bytes(b"state" * step)
    file = draw.choice(sorted((folder / "step-000002").iterdir()))
    seal = draw.choice([dict, sealed_again])
    change = json_of if file.suffix == ".json" else bytes_of
    file.write_bytes(change(file.read_bytes(), draw, *([seal] if change is json_of else [])))
    found = read_or_refused(checkpoints.newest)
    assert found is not None
    assert found.log.step in (1, 2) or seal is sealed_again

    (tmp_path / "run.toml").write_bytes(bytes_of(Settings(steps=7, milestones=None).to_toml({}).encode(), draw))
    settings_found = read_or_refused(Settings.from_toml, tmp_path / "run.toml")
    assert settings_found is None or type(settings_found.steps) is int


@tries(100)
@seeds
def test_arrays(tmp_path, draw):
    """Arrays come out of an .npz as they were packed, or not at all."""
    arrays = {"x": np.arange(2 * 8 * 8 * 3, dtype=np.uint8).reshape(2, 8, 8, 3), "y": np.arange(2)}
    path = tmp_path / "x.npz"
    draw.choice([np.savez, np.savez_compressed])(path, **arrays)
    wanted = open_data(str(path), PREPROCESSING).identity()
    path.write_bytes(bytes_of(path.read_bytes(), draw))
    found, named = read_or_refused(open_data, str(path), PREPROCESSING), read_or_refused(read_inputs, path)

    assert found is None or found.identity() == wanted
    if named is not None:
        assert all(np.array_equal(named.kwargs[name], arrays[name]) for name in named.kwargs)


@pytest.mark.torch
@tries(60)
@seeds
def test_tensors(tmp_path, draw):
    """Safetensors have no checksum: what is read is of the tensors' number and size, or refused."""
    import safetensors.torch
    import torch

    from normswap.sources.torch.state_dict import load_state_dict, read_state_dict

    model = torch.nn.Linear(2, 3)
    path = tmp_path / "w.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    path.write_bytes(bytes_of(path.read_bytes(), draw))
    found = read_or_refused(read_state_dict, path)
    if found is not None:
        read_or_refused(load_state_dict, model, found, str(path))
        assert [tuple(each.shape) for each in model.state_dict().values()] == [(3, 2), (3,)]


@pytest.mark.torch
@tries(60)
@seeds
def test_pickles(tmp_path, draw):
    """PyTorch's archives have checksums, which are looked at."""
    import torch

    from normswap.sources.torch.state_dict import read_state_dict

    state = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
    path = tmp_path / "w.pth"
    torch.save({"state_dict": state}, path)
    path.write_bytes(bytes_of(path.read_bytes(), draw))
    found = read_or_refused(read_state_dict, path)

    assert found is None or all(torch.equal(found[name], state[name]) for name in state)
