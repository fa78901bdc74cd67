"""Batch Renormalization in a wide ResNet on CIFAR-10 in Keras: how accurate it is beside BN, and what it costs.

The seed's curves were of unlike settings, and its published BRN curve is plain BN: its limits were read once, before
training. Here every curve has the same settings; BRN's limits follow the paper's schedule (as shares of the training),
or the seed's sigmoid growth.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from ..data.preprocessing import Preprocessing
from .data import cifar10
from .experiment import Curve, Experiment, Finding, Outcomes, Scale

ALIKE = "batches of 128, momentum .99 and ε = 1e-5 for all, where the published had other ones for either"
PAPER, SEED = "BRN, the paper's limits", "BRN, the seed's limits"


def curves(scale: Scale) -> list[Curve]:
    """Return BN, and BRN under either schedule of its limits."""
    epochs, width = (100, 4) if scale == "full" else (10, 2)
    settings: dict[str, Any] = {"optimizer": "adam", "lr": 1e-3, "warmup": 0.0, "schedule": "constant"}
    settings |= {"steady_statistics": False, "max_grad_norm": 0.0}
    limits = {"BN": {}, PAPER: {"limits": "paper"}, SEED: {"limits": "sigmoid"}}
    return [
        Curve(name, partial(network, norm=norm, width=width), epochs, 128, settings={**settings, **own})
        for (name, own), norm in zip(limits.items(), ("bn", "brn", "brn"), strict=True)
    ]


def network(seed: int, norm: str, width: int) -> Any:
    """Return WRN-16-``width`` with a norm."""
    import keras

    from ..models.keras import wide_resnet

    keras.utils.set_random_seed(seed)
    return wide_resnet(16, width, norm)


def judge(outcomes: Outcomes, scale: Scale) -> list[Finding]:
    """Compare accuracies and seconds."""
    bn, rest = outcomes["BN"], [outcomes[PAPER], outcomes[SEED]]
    return [
        Finding(
            "BRN is as accurate as BN, to a point",
            f"best {_list([bn, *rest], lambda each: f'{each.best:.2f} %')}",
            all(each.best >= bn.best - 1 for each in rest),
        ),
        Finding(
            "a step of BRN takes at most 1.15 of one of BN (the seed's: 1.11)",
            _list(rest, lambda each: f"{each.seconds / bn.seconds:.2f}"),
            all(each.seconds <= 1.15 * bn.seconds for each in rest),
        ),
    ]


def _list(outcomes: Sequence[Any], told: Any) -> str:
    return ", ".join(f"{each.name} {told(each)}" for each in outcomes)


EXPERIMENT = Experiment(
    name="renorm-wrn",
    title="Batch Renormalization in a wide ResNet on CIFAR-10",
    source="titu1994/BatchRenormalization, wrn_renorm.py and wrn_batchnorm.py",
    preprocessing=Preprocessing((32, 32, 3), "channels_last"),
    data=cifar10,
    curves=curves,
    judge=judge,
    differs={"full": (ALIKE,), "small": ("WRN-16-2 in place of WRN-16-4, 10 epochs in place of 100", ALIKE)},
)
