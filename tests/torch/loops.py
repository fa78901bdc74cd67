"""One short training run, by hand and with hooks of every kind, that other loops have to repeat."""

import copy

import torch
import torch.nn.functional as F

import normswap
from normswap.finetune import Blend, Freeze, GateSchedule, Hook, RenormLimits, Statistics, StopAtNaN

from .models import Residual, trained_

STEPS = 4
LR = 0.05


def batches(count=STEPS, size=4):
    """Images and labels of so many batches."""
    generator = torch.Generator().manual_seed(5)
    return [
        (torch.randn(size, 3, 8, 8, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


HOOKS = {
    "limits": ("brn", lambda model, original: RenormLimits(model, STEPS)),
    "gates": ("sn", lambda model, original: GateSchedule(model, STEPS, freeze=0.5, temperature=(1.0, 0.1))),
    "harden": ("sn", lambda model, original: GateSchedule(model, STEPS, harden=True)),
    "freeze": ("sn", lambda model, original: Freeze(model, "last:2")),
    "blend": ("gn", lambda model, original: Blend(model, original, STEPS - 1)),
    "statistics": ("sn", lambda model, original: Statistics(model, batches(2, 8))),
    "nan": ("gn", lambda model, original: StopAtNaN()),
}
"""A target for every hook, and what makes it."""

RUNS = {
    "sn": lambda model, original: [
        GateSchedule(model, STEPS, freeze=0.5, temperature=(1.0, 0.1), harden=True),
        StopAtNaN(),
        Statistics(model, batches(2, 8)),
    ],
    "brn": lambda model, original: [RenormLimits(model, STEPS), Statistics(model, batches(2, 8))],
    "gn": lambda model, original: [Blend(model, original, STEPS - 1), StopAtNaN()],
}
"""Every hook, with those it goes together with, by target."""


class Noting(Hook):
    """A hook that notes what it is told."""

    def __init__(self):
        self.told = []

    def on_step(self, step):
        self.told.append(step)

    def on_loss(self, step, loss):
        assert isinstance(loss, float)
        self.told.append(("loss", step))

    def on_evaluate(self):
        self.told.append("evaluate")

    def on_end(self):
        self.told.append("end")

    def state_dict(self):
        return {"told": len(self.told)}

    def load_state_dict(self, state):
        self.told.append(("resumed after", state["told"]))


def network(target):
    """A patched network, and the original it was."""
    torch.manual_seed(0)
    original = trained_(Residual())
    model = copy.deepcopy(original)
    normswap.patch(model, target)
    return model, original


def optimizer_of(model):
    """The optimizer of every run, whose momentum would show what a frozen parameter learned."""
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def by_hand(model, hooks, data=None, accumulate=1, evaluate_after=(), loss_of=None):
    """Train as a plain loop does, and return the model."""
    optimizer = optimizer_of(model)
    data = batches(STEPS * accumulate) if data is None else data
    loss_of = loss_of or (lambda x, y: F.cross_entropy(model(x), y))
    for step in range(len(data) // accumulate):
        model.train()
        for hook in hooks:
            hook.on_step(step)
        optimizer.zero_grad()
        for x, y in data[step * accumulate : (step + 1) * accumulate]:
            loss = loss_of(x, y) / accumulate
            for hook in hooks:
                hook.on_loss(step, loss.item())
            loss.backward()
        optimizer.step()
        if step + 1 in evaluate_after:
            for hook in hooks:
                hook.on_evaluate()
    for hook in hooks:
        hook.on_end()
    return model


def run_by_hand(name, **options):
    """The network that a hook's run leaves behind."""
    target, make = HOOKS[name]
    model, original = network(target)
    return by_hand(model, [make(model, original)], **options)


def assert_same(model, other):
    """Both have the same weights and buffers under the same names."""
    torch.testing.assert_close(dict(model.state_dict()), dict(other.state_dict()), rtol=1e-5, atol=1e-6)


def assert_the_run_by_hand(model, target, **options):
    """A run with the hooks of `RUNS` has left behind what it leaves by hand."""
    expected, original = network(target)
    by_hand(expected, RUNS[target](expected, original), **options)
    assert_same(model, expected)
