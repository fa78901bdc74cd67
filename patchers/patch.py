"""The library's two verbs, `plan` and `patch`, for a model of either framework."""

import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from ..convert.recipe import Recipe, Rules
from ..convert.targets import Mode, Target, as_mode, as_target
from ..errors import InputError, NormswapWarning, UsageError, listed, option, spoken
from ..frameworks.detect import get_framework
from ..frameworks.several import texts
from . import way_back
from .contract import norm_patcher_of, patcher_of
from .plan import Plan, Report

Equalize = bool | Literal["full", "scale"]
"""What the layers in front of norms take: a scale and a shift, a scale alone, or nothing."""

Patterns = str | Iterable[str] | None
"""One pattern of names, several, or none."""


def plan(
    model: Any,
    target: str | Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Callable[[Any, str], bool] | None = None,
    equalize: Equalize = True,
) -> Plan:
    """Decide what `patch` would do to every BatchNorm of ``model``, touching nothing.

    ``print(plan)`` is a table of the decisions. Each says what the replacement is expected to change (``drift``, a
    share of the output's root mean square) and whether an exported file is rid of it (``folds``, None where no example
    shows it).

    Args:
        model: A `torch.nn.Module`, a `torch.export.ExportedProgram` or a Keras 3 model.
        target: What BatchNorms become: ``"sn"``, ``"brn"``, ``"gn"``, ``"ln"`` (one group) or ``"in"`` (a group for
            each channel), a `SwitchNorm`, `BatchRenorm` or `GroupNorm`, a `Recipe` made from the same model, or
            `Rules`. ``"bn"`` or a `BatchNorm`: what other norms become.
        example: What the model takes: a tensor or array, such as (N, C, H, W) for PyTorch or (N, H, W, C) for Keras, a
            tuple of arguments, a mapping of keyword arguments, or `normswap.Inputs`. With it the plan knows every
            layer's shape, and can refuse what a shape rules out.
        include: Replace only layers whose name fits a pattern: a glob such as ``"layer4.*"``, or a regular expression
            after ``re:``. One pattern or several; None for all.
        exclude: Leave layers alone whose name fits a pattern; as ``include``, None for none.
        where: A function of layer and name, asked last: a layer is left for which it returns False.
        equalize: As for `patch`.

    Returns:
        The `Plan`, with ``decisions``, ``having("replace")``, ``recipe()`` and ``table(all=True)``.

    Raises:
        InputError: For a target, pattern, recipe or example that does not fit the model.

    Example:
        >>> import normswap, torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8)).eval()
        >>> print(normswap.plan(model, normswap.GroupNorm(groups=2), example=torch.randn(2, 3, 8, 8)))
        plan for 1 BatchNorm
        name  type         C  shape  becomes      drift  folds  in front
        -----------------------------------------------------------------
        1     BatchNorm2d  8  6x6    gn groups=2  0.16   no     scaled
        drift: expected change of the layer's output, as a share of its root mean square
        in front: what becomes of the layer there; equalize=False leaves it as it is
    """
    chosen = {"include": include, "exclude": exclude, "where": where, "equalize": equalize}
    return plans(model, [target], example=example, **chosen)[0]  # type: ignore[arg-type]


def plans(
    model: Any,
    targets: Sequence[str | Target | Recipe | Rules],
    *,
    example: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Callable[[Any, str], bool] | None = None,
    equalize: Equalize = True,
) -> list[Plan]:
    """Return what `plan` decides for each of ``targets``, on one look at the model."""
    model = as_module(model)
    resolved = [_resolved(target) for target in targets]
    chosen = _chosen(include, exclude, where)
    mode = _mode(equalize, resolved)
    back = [way_back.is_way_back(each) for each in resolved]
    if any(back):
        return [
            way_back.plan(model, each, example=example, **chosen)
            if is_back
            else patcher_of(model).plans(model, [each], example=example, mode=mode, **chosen)[0]
            for each, is_back in zip(resolved, back, strict=True)
        ]
    return patcher_of(model).plans(model, resolved, example=example, mode=mode, **chosen)


def patch(
    model: Any,
    target: str | Target | Recipe | Rules,
    *,
    example: Any = None,
    include: Patterns = None,
    exclude: Patterns = None,
    where: Callable[[Any, str], bool] | None = None,
    data: Any = None,
    inplace: bool = True,
    equalize: Equalize = True,
) -> Report:
    r"""Replace the BatchNorms of ``model`` with the weights carried over, and return what was done.

    Either every planned layer is replaced or, on any error, none. Patching again with the same target changes nothing.

    With ``"bn"`` it goes the other way: GroupNorms, InstanceNorms, LayerNorms over channels, SwitchNorms and
    BatchRenorms become BatchNorms, which fold to nothing at export. Over all positions of the inputs in ``data`` each
    computes, per channel, a line through the norm's output y over its input x that keeps mean and deviation,

    .. math:: s = \mathrm{sign}(\mathrm{cov}(x, y)) \sqrt{\mathrm{var}(y)/\mathrm{var}(x)}, \qquad
              \gamma = s\sqrt{\mathrm{var}(x)+\epsilon}, \qquad \beta = \mathrm{mean}(y)

    with running statistics mean(x) and var(x); less steep where the two hardly correlate. A BatchRenorm, and a
    SwitchNorm of the batch statistics alone, need no data: they are BatchNorms at inference. Sums in float64 are all
    that is kept of the data.

    Args:
        model: A `torch.nn.Module`, a `torch.export.ExportedProgram` or a Keras 3 model. A program is not changed:
            ``report.model`` is a module made from it, which shares the weights that are no norm's unless
            ``inplace=False``.
        target: What BatchNorms become: ``"sn"``, ``"brn"``, ``"gn"``, ``"ln"`` (one group) or ``"in"`` (a group for
            each channel), a `SwitchNorm`, `BatchRenorm` or `GroupNorm`, a `Recipe` made from the same model, or
            `Rules`. ``"bn"`` or a `BatchNorm`: what other norms become.
        example: An input the model accepts, such as an array (N, C, H, W) for PyTorch or (N, H, W, C) for Keras. It
            shows every layer's shape, builds what is lazy, and finds calls of ``batch_norm`` that no layer makes.
        include: Replace only layers whose name fits a pattern: a glob such as ``"layer4.*"``, or a regular expression
            after ``re:``. One pattern or several; None for all.
        exclude: Leave layers alone whose name fits a pattern; as ``include``, None for none.
        where: A function of layer and name, asked last: a layer is left for which it returns False.
        data: For ``"bn"``: batches of inputs as the model takes them, without labels; 256 images are good. They are
            iterated over two or three times; an iterator is held in memory, and an array is one batch.
        inplace: False leaves ``model`` as it is and patches a copy, ``report.model``.
        equalize: Whether the linear layer in front of a norm by a sample's statistics takes a scale and a shift per
            channel, with which those statistics vary little: that keeps most of the function. It needs an example,
            which shows what nothing else reads, and may give the layer a bias, a new parameter. ``"scale"`` adds none
            and keeps less, False leaves all other layers alone. A recipe says it itself, and
            stands alone.

    Returns:
        The `Report`: ``model``, ``replaced``, ``skipped``, ``recipe``, ``drift(example)``, ``undo()``.
        ``print(report)`` is a table of it. With ``"bn"`` also ``drops``: for each norm the share of its output's
        deviation that the line does not explain, ``before`` and ``after`` the others are replaced.

    Raises:
        UnsupportedError: If a selected layer cannot be replaced, or there is none; each is named with the reason.
        InputError: For a target, pattern, recipe or example that does not fit the model, for weights that are not
            finite and negative variances, and for data that are too few, not finite or all the same.
        UsageError: Without ``data`` where they are needed, and with them or ``equalize`` where they are not read.

    Example:
        >>> import normswap, torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
        >>> x = torch.randn(2, 3, 8, 8)
        >>> before = model(x)
        >>> report = normswap.patch(model, normswap.SwitchNorm(batch_statistics="frozen"), example=x)
        >>> report.summary
        '1 replaced, 0 already patched, 0 skipped'
        >>> report.drift(x)[-1].rms < 0.2
        True
        >>> report.undo()
        >>> torch.equal(model(x), before)
        True

        And the way back:

        >>> report = normswap.patch(model, "gn")
        >>> report = normswap.patch(model, "bn", data=[torch.randn(32, 3, 8, 8)])
        >>> type(model[1]).__name__, report.drops[0].after < 0.5
        ('BatchNorm2d', True)

    Source: the algebra is in docs/design.md; Luo et al., "Differentiable Learning-to-Normalize via Switchable
    Normalization"; Ioffe, "Batch Renormalization"; Wu and He, "Group Normalization".
    """
    model, resolved = as_module(model), _resolved(target)
    mode = _mode(equalize, [resolved])
    chosen = _chosen(include, exclude, where)
    require_usable(model)
    if way_back.is_way_back(resolved):
        model = model if inplace else norm_patcher_of(model).copied(model)
        return way_back.patch(model, resolved, data, example=example, **chosen)
    if data is not None:
        raise UsageError(
            "expected data beside the target 'bn', whose BatchNorms are fitted to them, received data beside "
            f"target={target!r}; leave them out"
        )
    report = patcher_of(model).patch(model, resolved, example=example, inplace=inplace, mode=mode, **chosen)
    _warn(report.plan)
    return report


def require_usable(model: Any) -> None:
    """Raise `InputError`, which lists them, for weights that nothing can be carried over from."""
    if problem := problem_of(model):
        raise InputError(problem)


def problem_of(model: Any) -> str:
    """Return which weights of a model nothing can be carried over from, "" if there are none."""
    if not (found := get_framework(model).unusable(model)):
        return ""
    return (
        f"expected weights that are finite and variances of at least 0, received {len(found)} that are not:\n"
        f"{listed([f'{name}: {problem}' for name, problem in found.items()])}"
    )


def _warn(plan: Plan) -> None:
    """Warn of what is carried over as it is, and may not be what was meant.

    That are layers without running statistics, channels that never varied, like which no statistics of a sample will
    be, and channels that say nothing.
    """
    if unknown := [d.site.name for d in plan.having("replace") if not d.site.has_statistics]:
        warnings.warn(
            f"expected BatchNorms with running statistics, received {len(unknown)} without, whose gamma and beta are "
            f"copied; train the model before it is used:\n{listed(unknown)}",
            NormswapWarning,
            stacklevel=3,
        )
    for part, expected, why in (
        ("constant", "running variances above 0", "hold nothing or were never trained"),
        ("muted", "gammas other than 0", "are beta alone, whatever comes in"),
    ):
        found = [(d.site, getattr(d, part)) for d in plan.having("replace") if getattr(d, part)]
        if found:
            names = listed([f"{site.name}: {count} of {site.channels}" for site, count in found])
            warnings.warn(
                f"expected {expected}, received 0 for channels of {len(found)} "
                f"layer{'' if len(found) == 1 else 's'}, which {why}:\n{names}",
                NormswapWarning,
                stacklevel=3,
            )


def as_module(model: Any) -> Any:
    """Return the module that an exported program becomes, and any other model as it is."""
    exporting = sys.modules.get("torch.export")
    if exporting is None or not isinstance(model, exporting.ExportedProgram):
        return model
    from .torch import programs

    return programs.as_module(model)


def _chosen(include: Patterns, exclude: Patterns, where: Callable[[Any, str], bool] | None) -> dict[str, Any]:
    if where is not None and not callable(where):
        raise InputError(f"expected `where` as a function of layer and name, or None, received where={where!r}")
    return {"include": texts(include, "a pattern"), "exclude": texts(exclude, "a pattern"), "where": where}


def _mode(equalize: Equalize, targets: Sequence[Target | Recipe | Rules]) -> Mode | None:
    """Return what ``equalize`` stands for; raises `UsageError` beside a recipe, which tells that itself."""
    mode = as_mode(equalize)
    if mode != "full" and any(isinstance(target, Recipe) for target in targets):
        given = option("equalize", equalize) if equalize else spoken("--no-equalize", "equalize=False")
        raise UsageError(
            f"expected a recipe alone, which tells what layers in front of norms take, received {given} beside it; "
            "leave that out"
        )
    return mode


def _resolved(target: str | Target | Recipe | Rules) -> Target | Recipe | Rules:
    return target if isinstance(target, Recipe | Rules) else as_target(target)
