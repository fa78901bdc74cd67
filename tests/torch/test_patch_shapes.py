"""Shapes, widths and what surrounds a norm."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from click.testing import CliRunner
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.cli import main
from normswap.errors import UnsupportedError

from ..helpers import exactly, refusal
from .models import TARGETS, Residual, trained_


def test_vectors_have_single_values():
    """An example shows single values: one channel per group is refused, few values are noted."""
    model = trained_(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    example = torch.randn(3, 6)
    message = refusal(
        "1 (BatchNorm1d): a group of one value per sample normalises to zero and erases the signal "
        "(channels=4, groups=4, values per channel=1); use fewer groups, or leave the layer as it is with exclude='1'"
    )
    with pytest.raises(UnsupportedError, match=exactly(message)):
        normswap.patch(model, "in", example=example)
    report = normswap.patch(model, "gn", example=example)

    assert report.replaced[0].site.spatial == ()
    assert report.replaced[0].note == (
        "auto: one group averages most values, so its statistics stay nearest to the running ones; "
        "only 4 values per group: expect noisy statistics"
    )
    assert model(example).std() > 0.1


@pytest.mark.parametrize("start", ["warm", "even"])
def test_switch_norm_on_1x1_maps_allows_for_its_instance_gate(start):
    """On 1x1 maps the carry-over allows for the instance gate; the example says which they are."""
    model = trained_(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(64)))
    generator = torch.Generator().manual_seed(0)
    norm = model[1]
    x = torch.randn(256, 64, 1, 1, generator=generator) * norm.running_var.sqrt().view(-1, 1, 1)
    x = x + norm.running_mean.view(-1, 1, 1)
    expected = model(x)
    normswap.patch(model, SwitchNorm(start), example=x)

    assert (model(x) - expected).abs().mean() < 0.1 * expected.std()


@pytest.mark.parametrize("target", ["sn", "gn", "brn"])
@pytest.mark.parametrize("shape", [(1, 4, 5, 5), (2, 4, 1, 1)])
def test_single_samples_and_single_values_are_finite(target, shape):
    """A batch of one and maps of one value train without a NaN, forward and backward."""
    model = trained_(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    x = torch.randn(*shape)
    normswap.patch(model, target, example=x)
    y = model.train()(x)
    y.square().sum().backward()

    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("channels", [16, 24, 40, 72, 112, 728, 17])
def test_indivisible_channels_take_the_common_divisor(channels):
    """With indivisible="gcd" real widths are patched, a prime one with a single group."""
    model = trained_(nn.Sequential(nn.BatchNorm2d(channels)))
    report = normswap.patch(model, GroupNorm(groups=32, indivisible="gcd"))
    groups = np.gcd(32, channels)

    assert model[0].num_groups == groups
    assert report.replaced[0].note.startswith(f"groups=32 does not divide {channels} channels: {groups} taken")


class Reparameterizable(nn.Module):
    """A block that folds its BatchNorm into its convolution by itself, as RepVGG's does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))

    @torch.no_grad()
    def fuse(self):
        """Return scale over deviation."""
        return self.conv[1].weight / (self.conv[1].running_var + self.conv[1].eps).sqrt()

    def forward(self, x):
        """Convolve and normalize."""
        return self.conv(x)


@pytest.mark.parametrize("target", TARGETS)
def test_a_block_that_reads_running_statistics_is_noted(target):
    """The plan names the method that would fold what is no BatchNorm any more; a BatchRenorm it may fold."""
    model = nn.Sequential(nn.BatchNorm2d(3), Reparameterizable())
    first, second = normswap.plan(model, target).decisions
    note = "1 (Reparameterizable.fuse) reads running statistics: fuse or reparameterize before the patch, not after"

    assert (first.note, second.note.partition(";")[0]) == (
        second.note.partition("; ")[2],
        note if target != "brn" else "",
    )


@pytest.mark.parametrize("target", TARGETS)
def test_an_activation_in_place_trains_as_another(images, target):
    """An activation that overwrites the replacement's output trains as one that does not."""
    gradients = []
    for inplace in (True, False):
        torch.manual_seed(0)
        model = trained_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=inplace)))
        normswap.patch(model, target)
        for training in (False, True):
            model.train(training)(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])

    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("target", TARGETS)
def test_zero_gammas_stay(model, target):
    """A zero-initialised last norm of a block still closes the branch."""
    nn.init.zeros_(model.bn.weight)
    normswap.patch(model, target)

    assert torch.count_nonzero(model.bn.weight) == 0


def work(rank, path, models, x, results):
    """One of two processes: two steps of each model, its own samples, with and without broadcast buffers."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = []
    for shared in models:
        for broadcast in (True, False):
            wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(shared), broadcast_buffers=broadcast)
            optimizer = torch.optim.SGD(wrapped.parameters(), 0.01)
            for batch in x[rank]:
                wrapped(batch).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            parameters = torch.cat([p.detach().flatten() for p in wrapped.parameters()])
            buffers = [b for name, b in wrapped.module.named_buffers() if name.startswith("bn.running")]
            wrapped.eval()(x[rank][0])  # what has been broadcast is broadcast here
            found.append((parameters, torch.cat(buffers) if buffers else torch.zeros(0)))
    results[rank] = found
    dist.destroy_process_group()


def test_two_processes_keep_one_model(tmp_path):
    """Parameters agree over processes; running statistics do where buffers are broadcast, and GN has none."""
    models = [normswap.patch(trained_(Residual()), target).model.train() for target in ("gn", "sn", "brn")]
    x = torch.randn(2, 2, 3, 3, 12, 12) * torch.tensor([1.0, 3.0]).view(2, 1, 1, 1, 1, 1)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (tmp_path / "rendezvous", models, x, results), nprocs=2)
        first, second = results[0], results[1]

    for index, ((parameters, buffers), (others, theirs)) in enumerate(zip(first, second, strict=True)):
        has_statistics, broadcast = index >= 2, index % 2 == 0
        torch.testing.assert_close(parameters, others)
        assert (buffers.numel() > 0) is has_statistics
        assert torch.equal(buffers, theirs) is (broadcast or not has_statistics)


CODE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
"""


def test_the_command_line_plans_and_overwrites_nothing(tmp_path):
    """A dry run exits 0 with the plan and writes nothing; an output that exists is refused, a pickle unread."""
    (tmp_path / "net.py").write_text(CODE)
    model = f"{tmp_path}/net.py:build"

    def run(*arguments):
        result = CliRunner().invoke(main, ["patch", model, "--to", "gn", *arguments])
        return result.exit_code, result.stdout, result.stderr

    before = sorted(tmp_path.iterdir())
    code, out, _ = run("--dry-run", "--json", "--input-shape", "3,8,8", "-o", f"{tmp_path}/bundle")
    assert code == 0
    assert [(row["name"], row["action"]) for row in json.loads(out)["plan"]] == [("1", "replace")]
    assert sorted(tmp_path.iterdir()) == before

    code, _, error = run("-o", f"{tmp_path}/net.py")
    assert (code, f"{tmp_path}/net.py" in error.replace("\n", "")) == (2, True)
    assert (tmp_path / "net.py").read_text() == CODE

    torch.save(nn.BatchNorm2d(3), tmp_path / "whole.pt")
    code, _, error = run("--weights", f"{tmp_path}/whole.pt", "-o", f"{tmp_path}/bundle")
    assert (code, "a pickle that holds more and could run code" in " ".join(error.split())) == (3, True)
    assert not (tmp_path / "bundle").exists()
