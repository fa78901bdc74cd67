"""What a BatchNorm can become, and the way back to one: frozen configurations and their names."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from ..errors import InputError
from ..formats.fields import read
from ..formats.place import Place, shown

Start = Literal["warm", "exact", "even"]
BatchStatistics = Literal["moving", "frozen", "none"]
Compat = Literal["switchablenorms"]
Mode = Literal["full", "scale"]
"""What the layer in front of a norm takes to equalize it: a scale and a shift, or a scale alone."""


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"expected `{name}` out of {', '.join(choices)}, received {name}={value!r}")


def _positive_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class SwitchNorm:
    """Switchable Normalization: a learned mix of instance, layer and batch statistics.

    Args:
        start: The gates to begin with. ``"warm"`` leans on the batch statistics but lets every gate learn, ``"exact"``
            takes the batch statistics alone (the original function to the last bit, with gates that no longer learn),
            ``"even"`` is the paper's equal mix.
        batch_statistics: Where the batch component comes from. ``"moving"``: from batches in training and running
            averages at inference (the paper). ``"frozen"``: always from the pretrained running averages, so that no
            sample sees another. ``"none"``: there is no batch component.
        gates: The gates to begin with themselves, in place of those of ``start``: shares of instance, layer and batch,
            or of instance and layer without batch statistics, that sum to 1. A plan fills in those of ``"warm"``, which
            go by the model.
        compat: ``"switchablenorms"``, for PyTorch, to compute by the formulas of that system (see
            `normswap.layers.torch.SwitchNorm2d`), which its checkpoints were trained with: `normswap.load_weights` sets
            it.

    Raises:
        InputError: If one of them is another word.

    Example:
        >>> import normswap
        >>> normswap.SwitchNorm(batch_statistics="frozen").batch_statistics
        'frozen'

    Source: Luo et al., "Differentiable Learning-to-Normalize via Switchable Normalization", section 3.
    """

    start: Start = "warm"
    batch_statistics: BatchStatistics = "moving"
    compat: Compat | None = None
    gates: tuple[float, ...] | None = None
    kind: ClassVar[str] = "sn"

    def __post_init__(self) -> None:
        _one_of("start", self.start, get_args(Start))
        _one_of("batch_statistics", self.batch_statistics, get_args(BatchStatistics))
        if self.compat not in (None, *get_args(Compat)):
            raise InputError(f"expected `compat` to be None or 'switchablenorms', received compat={self.compat!r}")
        if self.gates is not None:
            object.__setattr__(self, "gates", tuple(self.gates))
            count = 2 if self.batch_statistics == "none" else 3
            if len(self.gates) != count or not (min(self.gates) >= 0 and abs(sum(self.gates) - 1) <= 1e-6):
                raise InputError(f"expected `gates` as {count} shares that sum to 1, received gates={self.gates}")


@dataclass(frozen=True)
class BatchRenorm:
    """Batch Renormalization: batch statistics corrected towards the running ones within limits.

    It is the BatchNorm at inference. The defaults are the paper's final limits.

    Args:
        r_max: Largest correction of the scale, as a factor of at least 1; 1 is none.
        d_max: Largest correction of the shift, in running standard deviations, at least 0; 0 is none.

    Raises:
        InputError: If a limit is below its least value.

    Example:
        >>> import normswap
        >>> normswap.BatchRenorm(r_max=2.0)
        BatchRenorm(r_max=2.0, d_max=5.0)

    Source: Ioffe, "Batch Renormalization", section 3.
    """

    r_max: float = 3.0
    d_max: float = 5.0
    kind: ClassVar[str] = "brn"

    def __post_init__(self) -> None:
        if not self.r_max >= 1:
            raise InputError(f"expected `r_max` of at least 1, received r_max={self.r_max}")
        if not self.d_max >= 0:
            raise InputError(f"expected `d_max` of at least 0, received d_max={self.d_max}")


@dataclass(frozen=True)
class GroupNorm:
    """Group Normalization: each sample's statistics over groups of channels.

    One group is a LayerNorm over channels and positions, one channel a group an InstanceNorm.

    Args:
        groups: Number of groups of every layer, or ``"auto"``: one, which keeps most of a pretrained function.
        channels_per_group: Number of channels of a group, in place of ``groups``.
        indivisible: What happens where the channels do not divide: ``"error"`` refuses the layer, ``"gcd"`` takes the
            greatest common divisor.

    Raises:
        InputError: If a number is not positive, or both are given.

    Example:
        >>> import normswap
        >>> normswap.GroupNorm(channels_per_group=16, indivisible="gcd")
        GroupNorm(groups='auto', channels_per_group=16, indivisible='gcd')

    Source: Wu and He, "Group Normalization", section 3.
    """

    groups: int | Literal["auto"] = "auto"
    channels_per_group: int | None = None
    indivisible: Literal["error", "gcd"] = "error"
    kind: ClassVar[str] = "gn"

    def __post_init__(self) -> None:
        _one_of("indivisible", self.indivisible, ("error", "gcd"))
        if self.groups != "auto" and not _positive_integer(self.groups):
            raise InputError(f"expected `groups` to be a positive integer or 'auto', received groups={self.groups!r}")
        if self.channels_per_group is not None:
            if not _positive_integer(self.channels_per_group):
                raise InputError(
                    "expected `channels_per_group` to be a positive integer, "
                    f"received channels_per_group={self.channels_per_group!r}"
                )
            if self.groups != "auto":
                raise InputError(
                    "expected one of `groups` and `channels_per_group`, received "
                    f"groups={self.groups} and channels_per_group={self.channels_per_group}"
                )


@dataclass(frozen=True)
class BatchNorm:
    """Batch Normalization: the way back, from norms that take statistics of each sample to constants that fold.

    GroupNorms, InstanceNorms, LayerNorms over channels, SwitchNorms and BatchRenorms become BatchNorms that compute,
    for each channel, the line through the norm's output over its input (see `normswap.patch`).

    Args:
        reestimate: True also measures the running statistics of BatchNorms anew that the model still has. Their scale
            and shift stay.

    Raises:
        InputError: If ``reestimate`` is no truth value.

    Example:
        >>> import normswap
        >>> normswap.BatchNorm()
        BatchNorm(reestimate=False)

    Source: Ioffe and Szegedy, "Batch Normalization", section 3.1.
    """

    reestimate: bool = False
    kind: ClassVar[str] = "bn"

    def __post_init__(self) -> None:
        if not isinstance(self.reestimate, bool):
            raise InputError(f"expected `reestimate` to be True or False, received reestimate={self.reestimate!r}")


Target = SwitchNorm | BatchRenorm | GroupNorm | BatchNorm

SHORTHANDS: Mapping[str, Target] = {
    "sn": SwitchNorm(),
    "brn": BatchRenorm(),
    "gn": GroupNorm(),
    "ln": GroupNorm(groups=1),
    "in": GroupNorm(channels_per_group=1),
    "bn": BatchNorm(),
}

_KINDS: Mapping[str, type[Target]] = {cls.kind: cls for cls in (SwitchNorm, BatchRenorm, GroupNorm, BatchNorm)}


def as_target(target: str | Target) -> Target:
    """Return the configuration for a shorthand (``"sn" | "brn" | "gn" | "ln" | "in" | "bn"``) or pass one through.

    Raises `InputError` for any other string or type.
    """
    if isinstance(target, Target):
        return target
    if isinstance(target, str) and target in SHORTHANDS:
        return SHORTHANDS[target]
    raise InputError(
        f"expected a target out of {', '.join(SHORTHANDS)}, or a SwitchNorm, BatchRenorm, GroupNorm or BatchNorm; "
        f"received target={target!r}"
    )


def as_mode(equalize: object) -> Mode | None:
    """Return the mode that an ``equalize`` of True, "full", "scale" or False stands for; `InputError` for another."""
    known: Mapping[object, Mode | None] = {True: "full", False: None, "full": "full", "scale": "scale"}
    if not isinstance(equalize, bool | str) or equalize not in known:
        raise InputError(f"expected `equalize` out of True, 'scale' and False, received equalize={equalize!r}")
    return known[equalize]


KINDS: Mapping[str, str] = {
    "sn": "Switchable Normalization",
    "brn": "Batch Renormalization",
    "gn": "Group Normalization",
    "bn": "Batch Normalization",
}
"""What the kinds of targets are called in full."""


def described(target: Target) -> str:
    """Return a target in words, with what is not its default."""
    if isinstance(target, GroupNorm) and target.groups == 1:
        return f"{KINDS['gn']}, 1 group"
    said = [
        f"{each.name.replace('_', ' ')} {value}"
        for each in fields(target)
        if each.name != "gates" and (value := getattr(target, each.name)) != each.default
    ]
    return ", ".join([KINDS[target.kind], *said])


def target_to_dict(target: Target) -> dict[str, Any]:
    """Return the target as plain data, ``{"kind": ..., **fields}``, for a recipe file."""
    return {"kind": target.kind, **asdict(target)}


def target_from_dict(data: Any, place: Place = Place()) -> Target:  # noqa: B008 - it never changes
    """Return the target that `target_to_dict` wrote; raises `InputError`, which names the ``place``, for other data."""
    fields = dict(read(dict[str, Any], data, place))
    kind = fields.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        received = "none" if kind is None else shown(kind)
        raise InputError(place.of("kind").said(f"a kind of target out of {', '.join(_KINDS)}", received))
    return read(_KINDS[kind], fields, place)
