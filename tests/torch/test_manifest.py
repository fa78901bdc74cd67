"""What a bundle's manifest has to say for the bundle to be read: all of it, of the right kinds, of the files there."""

import json
import shutil

import pytest
from torch import nn

import normswap
from normswap.data.preprocessing import Preprocessing
from normswap.errors import InputError
from normswap.formats.seal import sealed

from ..helpers import exactly

AGAIN = "take the bundle from where it came once more, or patch the model again"


def build():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A bundle with its original."""
    folder = tmp_path_factory.mktemp("saved") / "b"
    preprocessing = Preprocessing((3, 8, 8), "channels_first")
    normswap.save(normswap.patch(build(), "gn"), folder, original=build(), preprocessing=preprocessing)
    return folder


@pytest.fixture
def bundle(saved, tmp_path):
    """A copy of it to be changed."""
    return shutil.copytree(saved, tmp_path / "b")


def rewrite(folder, *way, value, seal=True):
    """Give a field of the manifest another value, or take it away where that is ``...``."""
    data = json.loads((folder / "normswap.json").read_text())
    found = data
    for step in way[:-1]:
        found = found[step]
    if value is ...:
        del found[way[-1]]
    else:
        found[way[-1]] = value
    del data["seal"]
    (folder / "normswap.json").write_text(json.dumps(sealed(data) if seal else data))


def refused(folder, message):
    with pytest.raises(InputError, match=exactly(message.format(folder=folder, file=folder / "normswap.json"))):
        normswap.load(folder, model=build())


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        (["framework"], "jax", "'torch' or 'keras' at framework in {file}, received 'jax'"),
        (["framework"], ["torch"], "'torch' or 'keras' at framework in {file}, received ['torch']"),
        (["framework"], "keras", "'keras' at recipe.framework in {file}, received 'torch'"),
        (["source"], 1, "text at source in {file}, received 1"),
        (["source"], ..., "a value at source in {file}, received none"),
        (["recipe"], [], "an object at recipe in {file}, received []"),
        (["recipe", "sites"], {}, "a list at recipe.sites in {file}, received {{}}"),
        (["recipe", "sites", 0, "channels"], float("inf"),
         "an integer at recipe.sites[0].channels in {file}, received inf"),
        (["recipe", "sites", 0, "channels"], "4", "an integer at recipe.sites[0].channels in {file}, received '4'"),
        (["recipe", "sites", 0, "target", "groups"], 1.5,
         "an integer or 'auto' at recipe.sites[0].target.groups in {file}, received 1.5"),
        (["recipe", "sites", 0, "target", "kind"], "pn",
         "a kind of target out of sn, brn, gn, bn at recipe.sites[0].target.kind in {file}, received 'pn'"),
        (["recipe", "sites", 0, "equalize"], {"front": "0", "mode": "half"},
         "'full' or 'scale' at recipe.sites[0].equalize.mode in {file}, received 'half'"),
        (["preprocessing", "layout"], "/etc/passwd",
         "'channels_first' or 'channels_last' at preprocessing.layout in {file}, received '/etc/passwd'"),
        (["preprocessing", "shape"], [3, 8], None),
        (["normswap"], None, "text at normswap in {file}, received None"),
        (["more"], 1, "no field but schema_version, normswap, framework, source, recipe, preprocessing, sha256, drift "
         "at more in {file}, received 1"),
        (["drift", "measured"], {"1": "much"}, "a number at drift.measured.1 in {file}, received 'much'"),
        (["sha256"], {}, "the hash of model.safetensors at sha256 in {file}, received none"),
        (["sha256"], ..., "a value at sha256 in {file}, received none"),
        (["sha256", "model.safetensors"], ...,
         "the hash of model.safetensors at sha256 in {file}, received original.safetensors"),
        (["sha256", "original.safetensors"], ...,
         "every file beside it at sha256 in {file}, received original.safetensors, which is there and not listed"),
        (["sha256", "../model.safetensors"], "0", "names of files at sha256 in {file}, received "
         "'../model.safetensors'"),
        (["sha256", "/etc/passwd"], "0", "names of files at sha256 in {file}, received '/etc/passwd'"),
        (["sha256", ".."], "0", "names of files at sha256 in {file}, received '..'"),
        (["sha256", "model.safetensors"], None, "text at sha256.model.safetensors in {file}, received None"),
    ],
)  # fmt: skip
def test_a_field_of_another_kind(bundle, way, value, message):
    """Each is refused by its name, also where whoever changed it has sealed the manifest again."""
    rewrite(bundle, *way, value=value)
    if message is None:
        refused(
            bundle,
            "expected an input shape of three sizes for images, received shape=(3, 8) (at preprocessing in {file})",
        )
    else:
        refused(bundle, f"expected {message}; {AGAIN}")


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (["source"], "payload.py:build"),
        (["recipe", "sites", 0, "target", "groups"], 2),
        (["preprocessing", "mean"], [0.5]),
        (["normswap"], "9"),
    ],
)
def test_a_changed_manifest(bundle, way, value):
    """A value that could have been written is told by the seal over all the others."""
    before = json.loads((bundle / "normswap.json").read_text())
    rewrite(bundle, *way, value=value)
    changed = json.loads((bundle / "normswap.json").read_text())
    (bundle / "normswap.json").write_text(json.dumps({**changed, "seal": before["seal"]}))

    refused(bundle, f"expected a file as it was written in {{file}}, received one that has changed; {AGAIN}")

    rewrite(bundle, *way, value=value, seal=False)
    refused(bundle, f"expected a file as it was written in {{file}}, received one without its seal; {AGAIN}")


@pytest.mark.parametrize("name", ["model.keras", "original.keras"])
def test_a_file_that_was_put_in(bundle, name):
    """Weights that nothing tells of are refused, whatever framework would read them; other files are nobody's."""
    (bundle / "README.md").write_text("what it is")
    normswap.load(bundle, model=build())
    (bundle / name).write_bytes(b"weights")

    refused(
        bundle,
        f"expected every file beside it at sha256 in {{file}}, received {name}, which is there and not listed; {AGAIN}",
    )


def test_weights_behind_a_link(bundle):
    """What a bundle holds is its own: a link is no file that was saved."""
    (bundle / "model.safetensors").rename(bundle.parent / "elsewhere")
    (bundle / "model.safetensors").symlink_to(bundle.parent / "elsewhere")

    refused(
        bundle,
        "expected {folder}/model.safetensors as it was saved, received a file that is missing or has changed; take the "
        "bundle from where it came once more, or patch the model again",
    )


def test_a_recipe_out_of_a_changed_manifest(bundle):
    """A recipe is people's to edit: read as one, a manifest need not be as it was written."""
    rewrite(bundle, "recipe", "sites", 0, "target", "groups", value=2, seal=False)
    recipe = normswap.Recipe.from_json((bundle / "normswap.json").read_bytes())

    assert normswap.patch(build(), recipe).model[1].num_groups == 2


@pytest.mark.parametrize("value", [-0.5, float("nan"), float("inf")])
def test_a_drift_that_is_none(bundle, value):
    """A drift is a share: one below 0, or that is no number, is refused by the layer's name."""
    rewrite(bundle, "drift", "measured", value={"1": value})

    message = f"expected a drift of 0 or more, received {value} for 1 (at drift in {bundle}/normswap.json)"
    with pytest.raises(InputError, match=exactly(message)):
        normswap.load(bundle, model=build())
