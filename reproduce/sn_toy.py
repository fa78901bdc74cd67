"""Switchable Normalization on CIFAR-10 in Keras: whether SN matches BN, and what its momentum does.

The seed claims 87 % after 25 epochs, and that training collapses at epochs 22 to 25 with momentum .99 and .997 where it
does not with .98. Moving statistics take no part in training; so the momentum may change what is evaluated, and by that
when the rate falls.
"""

from functools import partial
from typing import Any

from ..data.preprocessing import Preprocessing
from .data import cifar10
from .experiment import Curve, Experiment, Finding, Outcomes, Scale

MOMENTA = (0.98, 0.99, 0.997)
FALL = 10.0
"""By how many points an epoch has to be below the best so far to be called a collapse."""


def _name(momentum: float) -> str:
    return f"SN {str(momentum)[1:]}"


BEST = _name(MOMENTA[0])


def curves(scale: Scale) -> list[Curve]:
    """Return BN, and SN at each momentum."""
    epochs, width = (25, 64) if scale == "full" else (16, 32)
    settings = {
        "optimizer": "adam",
        "lr": 1e-3,
        "warmup": 0.0,
        "schedule": "plateau",
        "factor": 0.5**0.5,
        "patience": 5,
        "min_lr": 1e-4,
        "augment": "crop",
        "steady_statistics": False,
        "max_grad_norm": 0.0,
    }
    named = {"BN": None, **{_name(momentum): momentum for momentum in MOMENTA}}
    return [
        Curve(name, partial(network, momentum=momentum, width=width), epochs, 200, settings=settings)
        for name, momentum in named.items()
    ]


def network(seed: int, momentum: float | None, width: int) -> Any:
    """Return the published network with SN of a momentum, or with BN."""
    import keras

    from ..layers.keras import SwitchNormalization
    from ..models.keras import cifar10_net

    keras.utils.set_random_seed(seed)
    if momentum is None:
        return cifar10_net("bn", width=width)
    return cifar10_net(lambda channels: SwitchNormalization(momentum=momentum, epsilon=1e-3), width=width)


def judge(outcomes: Outcomes, scale: Scale) -> list[Finding]:
    """Compare SN with BN, and look for a collapse."""
    sn, bn = outcomes[BEST], outcomes["BN"]
    falls = {outcome.name: deepest_fall(outcome.accuracies) for outcome in outcomes.values()}
    slow = [falls[_name(momentum)] for momentum in MOMENTA[1:]]
    steps = [*zip(*(outcomes[_name(momentum)].losses for momentum in MOMENTA), strict=True)]
    same = next((step for step, losses in enumerate(steps) if len({*losses}) > 1), len(steps))
    told = ", ".join(f"{name} {fall:.1f}" for name, fall in falls.items())
    return [
        Finding(
            "SN is as accurate as BN, to a point", f"{sn.best:.2f} % beside {bn.best:.2f} %", sn.best >= bn.best - 1
        ),
        Finding(
            "with momentum .99 and .997 training collapses, with .98 it does not",
            f"deepest fall of an evaluation below the best so far in points: {told}; the three trainings have the same "
            f"losses, bit for bit, in their first {same} of {len(steps)} steps",
            min(slow) > FALL >= falls[BEST],
        ),
    ]


def deepest_fall(accuracies: list[float]) -> float:
    """Return by how much any epoch is below the best one before it."""
    best, deepest = 0.0, 0.0
    for accuracy in accuracies:
        deepest, best = max(deepest, best - accuracy), max(best, accuracy)
    return deepest


DIFFERS = (
    "images are shifted by up to 4 pixels and not rotated",
    "the rate falls by the loss on the images to evaluate on, not by the accuracy",
)

EXPERIMENT = Experiment(
    name="sn-toy",
    title="Switchable Normalization on CIFAR-10, and its momentum",
    source="titu1994/keras-switchnorm, cifar.py and cifar_bn.py",
    preprocessing=Preprocessing((32, 32, 3), "channels_last", mean=(0.5,), std=(0.5,)),
    data=cifar10,
    curves=curves,
    judge=judge,
    differs={"full": DIFFERS, "small": ("half the channels, 16 epochs", *DIFFERS)},
)
