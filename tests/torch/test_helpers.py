"""Helpers for loops of one's own, and batch statistics over two processes."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import normswap
from normswap.errors import InputError, UnsupportedError
from normswap.finetune import convert_sync, param_groups, update_statistics
from normswap.layers.torch import BatchRenorm1d, BatchRenorm2d, SwitchNorm1d, SwitchNorm2d

from ..helpers import exactly
from .models import filled


class TestParamGroups:
    def test_who_decays(self, model):
        """Convolutions and matrices decay; norms, biases and gates do not, and gates may have their own rate."""
        normswap.patch(model, "sn")
        model.bn.bias.requires_grad_(False)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = param_groups(model, 0.1, gate_lr=1e-3)
        found = [sorted(names[id(p)] for p in group["params"]) for group in groups]

        assert found[0] == ["conv.weight", "head.weight", "stem.0.weight"]
        assert found[1] == ["bn.weight", "conv.bias", "head.bias", "stem.1.bias", "stem.1.weight"]
        assert found[2] == ["bn.mean_weight", "bn.var_weight", "stem.1.mean_weight", "stem.1.var_weight"]
        assert [group["weight_decay"] for group in groups] == [0.1, 0, 0]
        assert groups[2]["lr"] == 1e-3
        torch.optim.SGD(groups, lr=0.1)

    @pytest.mark.parametrize("wrapped", ["compiled", "distributed", "both"])
    def test_wrapped_models(self, model, wrapped, tmp_path):
        """A compiled or distributed model has the groups of the model in it."""
        normswap.patch(model, "sn")
        expected = [[id(p) for p in group["params"]] for group in param_groups(model, 0.1)]
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            outer = model if wrapped == "compiled" else nn.parallel.DistributedDataParallel(model)
            outer = outer if wrapped == "distributed" else torch.compile(outer)
            found = [[id(p) for p in group["params"]] for group in param_groups(outer, 0.1)]
        finally:
            dist.destroy_process_group()

        assert found == expected

    def test_empty_groups_are_left_out(self):
        """A model without norms has no group for gates."""
        assert len(param_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


class TestUpdateStatistics:
    @pytest.mark.parametrize("target", ["sn", "brn"])
    def test_statistics_are_those_of_all_the_data(self, model, target):
        """Uneven batches count by their size; layers, modes and counters are otherwise as before."""
        normswap.patch(model, target)
        batches = [torch.randn(n, 3, 12, 12) + n for n in (5, 2)]
        everything = torch.cat([model.stem[0](batch) for batch in batches])
        update_statistics(model, batches)

        torch.testing.assert_close(model.stem[1].running_mean, everything.mean((0, 2, 3)))
        torch.testing.assert_close(model.stem[1].running_var, everything.var((0, 2, 3), unbiased=False))
        assert not any(m.training for m in model.modules())
        assert model.bn.num_batches_tracked == 0

    def test_refusals(self, model):
        """A model without such layers, and no batches at all, are refused; statistics stay."""
        message = "expected a model with SN, BRN or BatchNorm layers that keep moving statistics, received one without"
        with pytest.raises(UnsupportedError, match=exactly(message)):
            update_statistics(nn.GroupNorm(2, 4), [])
        normswap.patch(model, "sn")
        before = model.bn.running_mean.clone()
        with pytest.raises(InputError, match="^expected batches that reach every layer, received none for some$"):
            update_statistics(model, [])

        assert torch.equal(model.bn.running_mean, before)

    def test_batch_norms_left_in_a_mixed_model(self, model):
        """A BatchNorm that was not replaced is re-estimated too, and all of it can be undone."""
        normswap.patch(model, "sn", exclude=["bn"])
        x, before = torch.randn(6, 3, 12, 12) + 2, copy.deepcopy(model.state_dict())
        undo = update_statistics(model, [x])
        seen = []
        model.conv.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
        model(x)

        torch.testing.assert_close(model.bn.running_mean, seen[0].mean((0, 2, 3)))
        torch.testing.assert_close(model.bn.running_var, seen[0].var((0, 2, 3), unbiased=False))
        undo()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def step(layer, x, weights):
    """One training step's output, input gradient and parameter gradients."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * weights).sum().backward()
    return y.detach(), x.grad, [p.grad for p in layer.parameters()]


def work(rank, path, cases, results):
    """One of two processes: its share of the batch through each layer."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    results[rank] = []
    found = []
    for shared, x, weights, first in cases:
        part = slice(first) if rank == 0 else slice(first, None)
        layer = copy.deepcopy(shared)  # what is passed to a process shares its memory with the others
        y, dx, gradients = step(convert_sync(layer), x[part], weights[part])
        for gradient in gradients:
            dist.all_reduce(gradient)
        moved = layer.running_mean.clone(), layer.running_var.clone()
        update_statistics(layer, [x[part], x[part] + 1])
        found.append((y, dx, gradients, *moved, layer.running_mean, layer.running_var))
    results[rank] = found
    dist.destroy_process_group()


def work_by_size(rank, path, layer, images, results):
    """One of two processes, whose images have a size of their own."""
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    layer = convert_sync(copy.deepcopy(layer.train()))
    layer(images[rank])
    results[rank] = layer.running_mean, layer.running_var
    dist.destroy_process_group()


def test_processes_may_have_images_of_different_sizes(tmp_path):
    """Each process's share of the batch statistics is weighted by how many values it has."""
    torch.manual_seed(0)
    images = [torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(3, 4, 2, 2, dtype=torch.float64) + 3]
    layer = filled(SwitchNorm2d, 4, momentum=1.0, dtype=torch.float64)
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work_by_size, (tmp_path / "rendezvous", layer, images, results), nprocs=2)
        shares = [results[0], results[1]]

    values = torch.cat([each.movedim(1, -1).flatten(0, 2) for each in images])
    for mean, var in shares:
        torch.testing.assert_close(mean, values.mean(0), atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(var, values.var(0, unbiased=False), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("first", [3, 5, 6])
def test_two_processes_are_one_on_the_whole_batch(first, tmp_path):
    """Outputs, gradients, running statistics and those re-estimated agree to 1e-10.

    Shares may be uneven, one may have no sample, and of two vectors each process may have one, which alone has no
    variance.
    """
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3, 5, dtype=torch.float64) * 2 + 1
    weights, vectors = torch.randn_like(x), (slice(2), slice(None), 0, 0)
    published = filled(SwitchNorm1d, 4, compat="switchablenorms", dtype=torch.float64)
    cases = [(filled(cls, 4, dtype=torch.float64), x, weights, first) for cls in (SwitchNorm2d, BatchRenorm2d)]
    cases += [
        (layer, x[vectors], weights[vectors], 1) for layer in (filled(BatchRenorm1d, 4, dtype=torch.float64), published)
    ]
    alone, estimated, expected = [], [], []
    for layer, images, scale, _ in cases:
        alone.append(copy.deepcopy(layer.train()))
        expected.append(step(alone[-1], images, scale))
        estimated.append(copy.deepcopy(layer))
        update_statistics(estimated[-1], [images, images + 1])
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(work, (tmp_path / "rendezvous", cases, results), nprocs=2)
        shares = [results[0], results[1]]

    for index, (y, dx, gradients) in enumerate(expected):
        both = [share[index] for share in shares]
        close = {"atol": 1e-10, "rtol": 1e-10}
        torch.testing.assert_close(torch.cat([share[0] for share in both]), y, **close)
        torch.testing.assert_close(torch.cat([share[1] for share in both]), dx, **close)
        for share in both:
            torch.testing.assert_close(share[2], gradients, **close)
            torch.testing.assert_close(share[3], alone[index].running_mean, **close)
            torch.testing.assert_close(share[4], alone[index].running_var, **close)
            torch.testing.assert_close(share[5], estimated[index].running_mean, **close)
            torch.testing.assert_close(share[6], estimated[index].running_var, **close)


def test_sync_without_processes_changes_nothing():
    """A layer set to sync works alone, and back again."""
    layer = filled(SwitchNorm2d, 4).train()
    x = torch.randn(2, 4, 3, 3)
    expected = copy.deepcopy(layer)(x)

    torch.testing.assert_close(convert_sync(copy.deepcopy(layer))(x), expected)
    assert convert_sync(layer, sync=False).sync is False


def test_statistics_are_those_of_the_samples_there_are():
    """A call without samples takes no part in what is re-estimated."""
    x = torch.randn(6, 3, 4, 4)
    layers = [filled(SwitchNorm2d, 3) for _ in range(2)]
    for layer, batches in zip(layers, ([x], [x[:0], x, x[:0]]), strict=True):
        update_statistics(layer, batches)

    assert torch.equal(layers[0].running_mean, layers[1].running_mean)
    assert torch.equal(layers[0].running_var, layers[1].running_var)
