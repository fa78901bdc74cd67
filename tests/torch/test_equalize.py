"""The layer in front of a norm: where it takes a scale and a shift, what it then holds, and the way back."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normswap
from normswap import GroupNorm, SwitchNorm
from normswap.errors import InputError, UnsupportedError

from ..helpers import exactly
from .models import trained_


class Net(nn.Module):
    """A linear layer of any kind, what may lie between, and a BatchNorm behind it."""

    def __init__(self, front, norm, between=None):
        super().__init__()
        self.front, self.norm, self.between = front, norm, between or nn.Identity()

    def forward(self, x):
        return self.norm(self.between(self.front(x))).relu()


class Padded(nn.Conv2d):
    """A convolution that pads by itself, as timm's and efficientnet's "same" ones do."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


class Swapped(nn.Module):
    """Move an axis, keeping channels together."""

    def forward(self, x):
        return x.transpose(1, 2)


class Mixed(nn.Module):
    """Tear channels apart."""

    def forward(self, x):
        return x.flatten(1).reshape(len(x), -1, 8).transpose(1, 2).contiguous()


def noise(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def fronts(model, example, target="gn", **options):
    """The layer in front of each site, or why there is none, as the plan has it."""
    plan = normswap.plan(model, target, example=example, **options)
    return [d.front or d.site.unequal for d in plan.decisions]


LAYERS = [
    (nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), (4, 3, 20)),
    (nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), (4, 3, 9, 9)),
    (nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), (4, 3, 4, 5, 6)),
    (nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8), (4, 8, 9, 9)),
    (nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), (4, 8, 9, 9)),
    (nn.ConvTranspose1d(3, 8, 3), nn.BatchNorm1d(8), (4, 3, 9)),
    (nn.ConvTranspose2d(4, 8, 3, groups=2, bias=False), nn.BatchNorm2d(8), (4, 4, 5, 5)),
    (nn.ConvTranspose3d(3, 8, 2, stride=2), nn.BatchNorm3d(8), (4, 3, 3, 3, 3)),
    (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), (16, 6)),
    (Padded(3, 8, 3, stride=2), nn.BatchNorm2d(8), (4, 3, 9, 9)),
]


class TestWhere:
    @pytest.mark.parametrize(("front", "norm", "shape"), LAYERS)
    @pytest.mark.parametrize("target", ["gn", "in", SwitchNorm("even")])
    def test_layers_of_every_kind(self, front, norm, shape, target):
        """The layer returns a line of what it did, channel by channel, ‖W‖ stays, and undo brings back each bit."""
        if target == "in" and len(shape) == 2:
            return
        model = trained_(Net(copy.deepcopy(front), copy.deepcopy(norm)))
        original, x = copy.deepcopy(model), noise(*shape)
        report = normswap.patch(model, target, example=torch.zeros(shape))

        assert [d.front for d in report.replaced] == ["front"]
        with torch.no_grad():
            y, z = original.front(x), model.front(x)
        axis = [1] + [d for d in range(y.ndim) if d != 1]
        old, new = (each.permute(axis).flatten(1) for each in (y, z))
        for channel in range(8):  # a line for each channel
            line = np.polyfit(old[channel].numpy(), new[channel].numpy(), 1)
            np.testing.assert_allclose(np.polyval(line, old[channel].numpy()), new[channel].numpy(), atol=1e-4)
        kept = model.front.weight.norm() / original.front.weight.norm()
        assert float(kept) == pytest.approx(1, rel=1e-4)
        report.undo()
        assert model.state_dict().keys() == original.state_dict().keys()
        assert all(map(torch.equal, model.state_dict().values(), original.state_dict().values()))
        assert torch.equal(model(x), original(x))

    @pytest.mark.parametrize(
        ("between", "norm", "found"),
        [
            (nn.Identity(), nn.BatchNorm2d(8), "front"),
            (nn.Dropout2d(0.5), nn.BatchNorm2d(8), "front"),
            (nn.Flatten(2), nn.BatchNorm1d(8), "front"),
            (nn.Unflatten(2, (7, 1)), nn.BatchNorm3d(8), "front"),
            (nn.Sequential(nn.Flatten(2), Swapped(), Swapped()), nn.BatchNorm1d(8), "front"),
            (nn.ReLU(), nn.BatchNorm2d(8), "no linear layer in front"),
            (nn.MaxPool2d(2), nn.BatchNorm2d(8), "no linear layer in front"),
            (nn.Sequential(nn.Flatten(2), Mixed()), nn.BatchNorm1d(8), "no linear layer in front"),
        ],
    )
    def test_what_may_lie_between(self, between, norm, found):
        """Identity, Dropout and reshapes that keep channels together may, what computes or tears them apart may not."""
        model = trained_(Net(nn.Conv2d(3, 8, 3), norm, between))

        assert fronts(model, torch.zeros(2, 3, 9, 9)) == [found]

    def test_a_linear_layer_of_sequences(self):
        """A Linear with its features last, transposed to the BatchNorm's channels, is in front of that."""
        model = trained_(Net(nn.Linear(6, 8), nn.BatchNorm1d(8), Swapped()))

        assert fronts(model, torch.zeros(2, 5, 6)) == ["front"]
        assert fronts(trained_(Net(nn.Linear(6, 8), nn.BatchNorm1d(5))), torch.zeros(2, 5, 6)) == [
            "no linear layer in front"
        ]

    def test_what_else_reads_the_output(self):
        """Whoever reads it besides the norm is named, however it reads: the layer then stays what it is."""

        class Read(nn.Module):
            def __init__(self, how):
                super().__init__()
                self.front, self.norm, self.how = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), how
                self.other = nn.BatchNorm2d(8)
                self.gate = nn.Parameter(torch.zeros(()))

            def forward(self, x):
                y = self.front(x)
                return self.how(self, y)

        def kept(m, y):
            m.last = y
            return m.norm(y)

        cases = {
            "front: its output is also read by aten.mul.Tensor": lambda m, y: m.norm(y) + m.gate * y,
            "front: its output is also read by aten.add.Tensor": lambda m, y: m.norm(y) + y,
            "front: its output is also read by aten.mean.dim": lambda m, y: m.norm(y) * y.mean((2, 3), keepdim=True),
            "front: its output is one of the model's": lambda m, y: {"a": m.norm(y), "b": [y]},
            "front: its output is kept by code of the model": kept,
            "front: several norms read its output": lambda m, y: m.norm(y) + m.other(y),
            "front: its parameters are read elsewhere, by aten.mul.Tensor": lambda m, y: (
                m.norm(y) + (m.front.bias * 2).sum()
            ),
        }
        for reason, how in cases.items():
            model = trained_(Read(how))
            assert fronts(model, torch.zeros(2, 3, 9, 9), include=["norm"])[0] == reason
            before = copy.deepcopy(model.front.state_dict())
            normswap.patch(model, "gn", example=torch.zeros(2, 3, 9, 9), include=["norm"])
            assert all(map(torch.equal, model.front.state_dict().values(), before.values()))

    def test_layers_that_cannot_take_a_scale(self):
        """Shared, frozen, tied, parametrized, hooked and standardized layers are left, each with the reason."""

        class Standardized(nn.Conv2d):
            def forward(self, x):
                weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
                return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)

        class Twice(Net):
            def forward(self, x):
                return self.norm(self.front(x)) + self.front(x).relu()

        def net(front, cls=Net):
            return trained_(cls(front, nn.BatchNorm2d(8)))

        frozen, hooked = nn.Conv2d(3, 8, 3).requires_grad_(False), nn.Conv2d(3, 8, 3)
        hooked.register_forward_hook(lambda *_: None)
        tied = net(nn.Conv2d(3, 8, 3))
        tied.twin = nn.Conv2d(3, 8, 3)
        tied.twin.weight = tied.front.weight
        cases = [
            (
                net(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))),
                "its weight is computed, by a parametrization or a hook",
            ),
            (net(frozen), "it is frozen"),
            (net(hooked), "hooks watch it"),
            (tied, "its parameters are those of another layer, too"),
            (
                net(Standardized(3, 8, 3)),
                "its output is no linear function of its weights and bias, as with weights that are standardized",
            ),
            (net(nn.Conv2d(3, 8, 3), Twice), "it runs several times"),
        ]
        for model, reason in cases:
            assert fronts(model, torch.zeros(2, 3, 9, 9)) == [f"front: {reason}"]

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_layers_of_half_precision(self, dtype):
        """Their roundings do not pass for weights that are standardized, nor those for roundings."""

        class Standardized(nn.Conv2d):
            def forward(self, x):
                weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
                return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)

        class Nearly(nn.Conv2d):
            def forward(self, x):
                y = F.conv2d(x, self.weight, self.bias)
                return y + 0.1 * y.abs()

        refused = (
            "front: its output is no linear function of its weights and bias, as with weights that are standardized"
        )
        for cls, found in ((nn.Conv2d, "front"), (Padded, "front"), (Standardized, refused), (Nearly, refused)):
            model = trained_(Net(cls(3, 8, 3), nn.BatchNorm2d(8))).to(dtype)
            before = copy.deepcopy(model.state_dict())

            assert fronts(model, torch.zeros(2, 3, 9, 9, dtype=dtype)) == [found]
            torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)

    def test_a_layer_that_computes_in_half_precision(self):
        """Under autocast within the model the layer is tried without."""

        class Cast(Net):
            def forward(self, x):
                with torch.autocast("cpu", torch.bfloat16):
                    return super().forward(x)

        model = trained_(Cast(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))

        assert fronts(model, torch.zeros(2, 3, 9, 9)) == ["front"]

    def test_without_an_example(self):
        """Nothing shows what is in front, so nothing but the norm changes."""
        model = trained_(Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))

        assert fronts(model, None) == ["no example shows what is in front"]

    @pytest.mark.parametrize("target", ["brn", SwitchNorm("exact")])
    def test_targets_without_statistics_of_a_sample(self, target):
        """They are the original already, and change no other layer."""
        model = trained_(Net(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))

        assert not any(d.front for d in normswap.plan(model, target, example=torch.zeros(2, 3, 9, 9)).decisions)


@pytest.fixture
def net():
    return trained_(Net(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)))


X = torch.zeros(2, 3, 9, 9)


class TestModes:
    def test_what_changes_is_told(self, net):
        """Plan, JSON and recipe name the layer in front, and whether it gets a bias that it did not have."""
        (decision,) = normswap.plan(net, "gn", example=X).decisions

        assert decision.to_dict()["equalize"] == {"front": "front", "mode": "full", "new_bias": True}
        assert "scaled, new bias" in str(normswap.plan(net, "gn", example=X))
        assert normswap.patch(net, "gn", example=X).recipe.to_dict()["sites"][0]["equalize"] == {
            "front": "front",
            "mode": "full",
        }

    def test_a_scale_adds_no_parameter(self, net):
        """With "scale" there is none but the norm's and the weights."""
        names = list(net.state_dict())
        normswap.patch(net, "gn", example=X, equalize="scale")

        assert [n for n in names if not n.startswith("norm.")] == ["front.weight"]
        assert sorted(net.state_dict()) == ["front.weight", "norm.bias", "norm.weight"]

    def test_false_leaves_all_other_layers(self, net):
        """The carry-over alone is what it was before there was equalizing."""
        before = net.front.weight.clone()
        twin = copy.deepcopy(net)
        normswap.patch(net, "gn", example=X, equalize=False)
        normswap.patch(twin, "gn")

        assert torch.equal(net.front.weight, before)
        assert torch.equal(net.norm.weight, twin.norm.weight)

    def test_another_word(self, net):
        """Anything else is refused."""
        message = "expected `equalize` out of True, 'scale' and False, received equalize='bias'"
        with pytest.raises(InputError, match=exactly(message)):
            normswap.plan(net, "gn", example=X, equalize="bias")


class TestLife:
    def test_the_weight_stays_the_parameter_it_is(self, net):
        """An optimizer made before goes on training it."""
        weight = net.front.weight
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        normswap.patch(net, "gn", example=X)
        assert net.front.weight is weight
        before = weight.clone()
        net(noise(4, 3, 9, 9)).square().sum().backward()
        optimizer.step()

        assert not torch.equal(weight, before)

    @pytest.mark.parametrize("target", ["gn", "sn", GroupNorm(groups=2)])
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_batch_norm_checkpoint_is_equalized_on_the_way(self, net, target, nested):
        """Loaded by `load_state_dict` it gives what a patch of that network gives, from any module above."""
        other = trained_(copy.deepcopy(net), seed=7)
        with torch.no_grad():
            other.front.weight += 0.1 * noise(*other.front.weight.shape)
        state = copy.deepcopy(other.state_dict())
        normswap.patch(other, target, example=X)
        model = copy.deepcopy(net)
        normswap.patch(model, target, example=X)
        model = copy.deepcopy(model)
        if nested:
            model = nn.Sequential(model)
            state = {f"0.{name}": value for name, value in state.items()}
        model.load_state_dict(state)
        x = noise(4, 3, 9, 9)

        torch.testing.assert_close(model(x), other(x), rtol=1e-4, atol=1e-5)

    def test_its_own_checkpoint_loads_as_it_is(self, net):
        """A patched model's state goes into another patched one bit for bit."""
        other = copy.deepcopy(net)
        for each in (net, other):
            normswap.patch(each, "sn", example=X)
        with torch.no_grad():
            for parameter in net.parameters():
                parameter += 0.1
        other.load_state_dict(net.state_dict())

        assert all(map(torch.equal, net.state_dict().values(), other.state_dict().values()))

    def test_a_batch_norm_alone_is_refused(self, net):
        """Its weights without those of the layer in front would be a wrong number."""
        state = copy.deepcopy(net.norm.state_dict())
        normswap.patch(net, "gn", example=X)
        message = (
            "expected a BatchNorm's weights together with those of front, which is equalized for it, received those of "
            "the norm alone: load them into a module with both"
        )
        with pytest.raises(InputError, match=exactly(message)):
            net.norm.load_state_dict(state)

    @pytest.mark.parametrize("target", ["gn", "sn"])
    def test_bundles(self, net, target, tmp_path):
        """A bundle of an equalized model loads into a fresh copy of the source, and saves again."""
        fresh = copy.deepcopy(net)
        report = normswap.patch(net, target, example=X)
        normswap.save(report, tmp_path / "b")
        model = normswap.load(tmp_path / "b", model=copy.deepcopy(fresh))
        x = noise(4, 3, 9, 9)
        assert torch.equal(model(x), net(x))

        normswap.save(model, tmp_path / "again")
        assert torch.equal(normswap.load(tmp_path / "again", model=fresh)(x), net(x))

    def test_a_bundle_that_went_back(self, net, tmp_path):
        """Equalized, then made a BatchNorm again and saved: the bias that was added comes back with it."""
        fresh = copy.deepcopy(net)
        normswap.save(normswap.patch(net, "gn", example=X), tmp_path / "b")
        model = normswap.load(tmp_path / "b", model=copy.deepcopy(fresh))
        data = [noise(32, 3, 9, 9)]
        report = normswap.patch(model, "bn", data=data)
        normswap.save(report, tmp_path / "back", original=fresh)
        x = noise(4, 3, 9, 9)

        assert torch.equal(normswap.load(tmp_path / "back", model=fresh)(x), model(x))

    def test_trained_layers_in_front_are_not_undone(self, net):
        """Training of the layer in front counts as training of the norm."""
        report = normswap.patch(net, "gn", example=X)
        with torch.no_grad():
            net.front.weight += 1

        with pytest.raises(UnsupportedError, match="expected untrained replacements"):
            report.undo()

    def test_the_original_is_there_while_it_is_not_trained(self, net):
        """`report.original()` is a copy of the model before the patch, and the patched model stays what it is."""
        original = copy.deepcopy(net)
        report = normswap.patch(net, "sn", example=X)
        x, before = noise(4, 3, 9, 9), copy.deepcopy(net.state_dict())
        y = net(x)
        again = report.original()

        assert torch.equal(again(x), original(x))
        assert torch.equal(net(x), y)
        torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        report.undo()
        assert torch.equal(net(x), original(x))

    def test_the_file_is_right(self, net, tmp_path):
        """An equalized model exports and verifies."""
        normswap.patch(net, "gn", example=X)
        report = normswap.to_onnx(net, tmp_path / "m.onnx", example=noise(4, 3, 9, 9))

        assert report.verdict
