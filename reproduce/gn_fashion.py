"""Group Normalization on Fashion-MNIST in Keras, one image a step: where BatchNorm has no batch to look at.

The seed reports .761 with BN, .901 with GN and .903 with IN after 13 epochs of one image a step, and .921 with AMSGrad
(.927 with 128 images a step).
"""

from functools import partial
from typing import Any

from ..data.preprocessing import Preprocessing
from .data import fashion_mnist
from .experiment import Curve, Experiment, Finding, Outcomes, Scale

NORMS = {"BN": "bn", "GN": "gn", "IN": "in", "SN": "sn", "SN, anchored": "anchored", "BRN": "brn"}
DECAY = "no decay of the convolutions' weights, which had one of 1e-5"
ABOVE = 3.0
"""By how many points a curve has to be above BN's to be clearly above it."""


def curves(scale: Scale) -> list[Curve]:
    """Return every norm at one image a step with Adam, and GN with AMSGrad at one and at 128."""
    images, epochs = (None, 13) if scale == "full" else (20_000, 1)
    adam = {"optimizer": "adam", "lr": 1e-3, "warmup": 0.0, "schedule": "plateau"}
    adam |= {"factor": 0.2, "patience": 3, "min_lr": 1e-5, "steady_statistics": False, "max_grad_norm": 0.0}
    amsgrad = {**adam, "optimizer": "amsgrad"}
    many = 39 if scale == "full" else 3
    return [
        *(Curve(name, partial(network, norm=norm), epochs, 1, images, adam) for name, norm in NORMS.items()),
        Curve("GN, AMSGrad", partial(network, norm="gn"), epochs, 1, images, amsgrad),
        Curve("GN, AMSGrad, 128 a step", partial(network, norm="gn"), many, 128, images, amsgrad),
    ]


def network(seed: int, norm: str) -> Any:
    """Return the published network with a norm; the anchored SN looks at no batch but the running statistics."""
    import keras

    from ..layers.keras import SwitchNormalization
    from ..models.keras import fashion_mnist_net

    keras.utils.set_random_seed(seed)
    if norm != "anchored":
        return fashion_mnist_net(norm)
    return fashion_mnist_net(lambda channels: SwitchNormalization(batch_statistics="frozen"))


def judge(outcomes: Outcomes, scale: Scale) -> list[Finding]:
    """Compare all with BN, and IN with GN."""
    bn = outcomes["BN"]
    found = ", ".join(f"{each.name} {each.last:.2f} %" for each in outcomes.values())
    clearly = [outcomes[name] for name in ("GN", "SN")]
    between = bn.last < outcomes["IN"].last <= outcomes["GN"].last + 1
    above = all(each.last >= bn.last + ABOVE for each in clearly)
    return [
        Finding("GN and SN are clearly above BN at one image a step", found, above),
        Finding("IN is between BN and GN, or as good as GN", f"IN {outcomes['IN'].last:.2f} %", between),
    ]


EXPERIMENT = Experiment(
    name="gn-fashion",
    title="Group Normalization on Fashion-MNIST, one image a step",
    source="shaoanlu/GroupNormalization-keras, the notebook",
    preprocessing=Preprocessing((28, 28, 1), "channels_last"),
    data=fashion_mnist,
    curves=curves,
    judge=judge,
    differs={"full": (DECAY,), "small": ("1 epoch of 20,000 of the 60,000 images (3 at 128 a step)", DECAY)},
)
