"""How many groups a BatchNorm's channels are split into when it becomes a GroupNorm.

The fewer the groups, the closer each sample's statistics come to the running statistics the pretrained weights
were trained against, because more values are averaged. On the published CIFAR-10 ResNet-20 (81.35 % with
BatchNorm) 1, 4, 8 and 16 groups keep 79, 74, 68 and 56 %, so ``"auto"`` means one group.
"""

from math import gcd

from ..errors import UnsupportedError, option, spoken
from .targets import GroupNorm

FEW_ELEMENTS = 16
"""Below this many values, a group's mean and variance say little about the signal."""


def resolve_groups(target: GroupNorm, channels: int, elements: int | None, name: str) -> tuple[int, str]:
    """Return the number of groups for one site and a note for the report ("" where there is nothing to say).

    ``channels`` is C; ``elements`` the number of values per channel and sample (H*W), or None if unknown.

    Raises `UnsupportedError` if C does not divide and the target says so, or if a group would hold a single
    value per sample: normalising it would erase the signal.
    """
    groups, note = _requested(target, channels, name)
    per_group = channels // groups * (elements or 1)
    if per_group == 1 and (elements is not None or channels == 1):
        raise UnsupportedError(
            f"{name}: a group of one value per sample normalises to zero and erases the signal "
            f"(channels={channels}, groups={groups}, values per channel={elements or 'unknown'}); "
            f"use fewer groups, or leave the layer as it is with {option('exclude', name)}"
        )
    if elements is None and per_group == 1:
        example = spoken("--input-shape", "an example input")
        note = _join(note, f"one channel per group: give {example} to check that maps exceed 1x1")
    elif elements is not None and per_group < FEW_ELEMENTS:
        note = _join(note, f"only {per_group} values per group: expect noisy statistics")
    return groups, note


def _requested(target: GroupNorm, channels: int, name: str) -> tuple[int, str]:
    if target.channels_per_group is not None:
        wanted, label = target.channels_per_group, "channels_per_group"
    elif target.groups == "auto":
        return 1, "auto: one group averages most values, so its statistics stay nearest to the running ones"
    else:
        wanted, label = target.groups, "groups"
    used = wanted
    if channels % wanted:
        used = gcd(wanted, channels)
        if target.indivisible == "error":
            raise UnsupportedError(
                f"{name}: expected {label} to divide the {channels} channels, received {label}={wanted}; "
                f"use {option(label, used) if label == 'groups' else f'{label}={used}'}, {option('groups', 'auto')}, "
                f"or {spoken('in a recipe ', '')}indivisible='gcd'"
            )
    note = "" if used == wanted else f"{label}={wanted} does not divide {channels} channels: {used} taken"
    return (channels // used if label == "channels_per_group" else used), note


def _join(first: str, second: str) -> str:
    return f"{first}; {second}" if first else second
