"""The versions of modules' classes, which a state dict tells beside the tensors and some classes ask for."""

import copy

import pytest
import torch
from torch import nn

import normswap
from normswap.sources.torch.state_dict import load_state_dict, read_state_dict, write_state_dict


class Versioned(nn.Module):
    """A network that loads weights of a known version alone, as torchvision's MNASNet does."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        """Convolve and normalize."""
        return self.bn(self.conv(x))

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
        self.loaded = local_metadata.get("version")
        if self.loaded not in (1, 2):
            raise ValueError(f"version should be 1 or 2 instead of {self.loaded}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@pytest.mark.parametrize("target", ["sn", "brn", "gn"])
def test_a_bundle_tells_versions(target, tmp_path, images):
    """A network whose class asks for the version of its weights comes back from a bundle, and from one of that."""
    model, wrapped = Versioned().eval(), nn.Sequential(Versioned()).eval()
    for each, name in ((model, "a"), (wrapped, "b")):
        fresh = copy.deepcopy(each)
        normswap.save(normswap.patch(each, target), tmp_path / name)
        loaded = normswap.load(tmp_path / name, model=copy.deepcopy(fresh))
        normswap.save(loaded, tmp_path / f"{name} again")
        again = normswap.load(tmp_path / f"{name} again", model=fresh)

        assert torch.equal(again(images), each(images))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_tells_the_version_of_weights(suffix, tmp_path):
    """An older version in a file is what the class is told; where a file tells none, the class's own."""
    old, model, path = Versioned(), Versioned(), tmp_path / f"w{suffix}"
    type(old)._version = 1
    try:
        state = old.state_dict()
        if suffix == ".pth":
            torch.save({"state_dict": nn.DataParallel(old).state_dict()}, path)
        else:
            write_state_dict(old, path)
    finally:
        Versioned._version = 2
    load_state_dict(model, read_state_dict(path), "w")
    assert model.loaded == 1
    load_state_dict(model, dict(state), "w")
    assert model.loaded == 2
