"""Fusing the ConvNeXt blocks of a model that is there already, in place, and going back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from .. import _flops
from ..backends import checked
from ..block import FusedConvNeXtBlock
from .blocks import FusedBlock, find_change, plan_block
from .convolutions import FusedConvolution, find_convolutions, plan_convolution
from .inspection import NotCoveredError
from .layouts import find_layout
from .norms import FusedNorm, find_norms, plan_norm
from .swap import Fused, extended, original_class, restore, swap

__all__ = ["CAN_BE_FUSED", "FusionEntry", "FusionReport", "fuse", "fusion_report", "unfuse"]


#: The reason in the entry of what has not been fused, and can be.
CAN_BE_FUSED = "can be fused"


class FusionEntry(NamedTuple):
    """What became of one module.

    `kind` is 'block', 'norm' or 'convolution'; `family` the library it is laid out as ('official' is
    facebookresearch's). `reason` says why it is not fused, or why a fused one runs its original forward at present;
    else it is empty.
    """

    name: str
    kind: str
    family: str
    fused: bool
    reason: str


class FusionReport(list[FusionEntry]):
    """The entries in the model's order. ``str()`` is a table."""

    def __str__(self) -> str:
        if not self:
            return "no ConvNeXt block found"
        header = FusionEntry("module", "kind", "family", "fused", "reason")
        rows = [header, *(entry._replace(name=entry.name or "(the model)") for entry in self)]
        cells = [(*row[:3], {True: "yes", False: "no"}.get(row.fused, row.fused), row.reason) for row in rows]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[4]]) for row in cells]
        counts = []
        for kind in ("block", "norm", "convolution"):
            group = [entry.fused for entry in self if entry.kind == kind]
            if group or kind != "convolution":
                counts.append(f"{sum(group)} of {len(group)} {kind}s")
        lines.append(f"{', '.join(counts[:-1])} and {counts[-1]} fused")
        return "\n".join(line.rstrip() for line in lines)


class _Finding(NamedTuple):
    """A module looked at: its entry, and the plan to fuse it by where it can be and is not."""

    module: nn.Module
    entry: FusionEntry
    plan: Any


@_disable_current_modes()  # trials compare values, which a FakeTensorMode has none of
def _survey(model: nn.Module, convolutions: bool) -> list[_Finding]:
    """All of the model's blocks and norms, and its other depthwise convolutions: all of these too, or the fused."""
    trials: dict[Any, str] = {}
    findings = [_look_at_block(name, module, trials) for name, module in model.named_modules() if _is_block(module)]
    blocks = {finding.module for finding in findings}
    covered = {finding.module for finding in findings if finding.entry.fused or finding.plan is not None}
    findings += [_look_at_norm(name, norm) for name, norm in find_norms(model, blocks)]
    findings += [
        _look_at_convolution(name, conv)
        for name, conv in find_convolutions(model, covered)
        if convolutions or isinstance(conv, FusedConvolution)
    ]
    order = {module: position for position, module in enumerate(model.modules())}
    return sorted(findings, key=lambda finding: order[finding.module])


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, FusedConvNeXtBlock) or find_layout(module) is not None


def _look_at_block(name: str, block: nn.Module, trials: dict[Any, str]) -> _Finding:
    if isinstance(block, FusedConvNeXtBlock):
        return _Finding(
            block, FusionEntry(name, "block", "convnext_kernels", True, _unfused(block.find_change())), None
        )
    family = find_layout(block).family
    if isinstance(block, FusedBlock):
        reason = _unfused(find_change(block, block._fused_plan))
        return _Finding(block, FusionEntry(name, "block", family, True, reason), block._fused_plan)
    try:
        plan, reason = plan_block(block, trials), CAN_BE_FUSED
    except NotCoveredError as error:
        plan, reason = None, str(error)
    return _Finding(block, FusionEntry(name, "block", family, False, reason), plan)


def _unfused(change: str | None) -> str:
    return "" if change is None else f"runs unfused: {change}"


def _look_at_norm(name: str, norm: nn.Module) -> _Finding:
    library = original_class(norm).__module__.partition(".")[0]
    family = library if library in ("torch", "timm", "torchvision", "transformers") else "official"
    return _look_at_layer(name, norm, "norm", family, plan_norm)


def _look_at_convolution(name: str, conv: nn.Module) -> _Finding:
    return _look_at_layer(name, conv, "convolution", "torch", plan_convolution)


def _look_at_layer(name: str, layer: nn.Module, kind: str, family: str, plan_layer: Callable[..., Any]) -> _Finding:
    try:
        plan, reason = plan_layer(layer), CAN_BE_FUSED
    except NotCoveredError as error:
        plan, reason = None, str(error)
    fused = isinstance(layer, Fused)
    if fused:
        reason = _unfused(layer.find_change(in_call=False))
    return _Finding(layer, FusionEntry(name, kind, family, fused, reason), plan)


def fuse(
    model: nn.Module,
    *,
    norms: bool = True,
    convolutions: bool = False,
    recompute: bool = True,
    backend: str | None = None,
) -> nn.Module:
    """Makes every ConvNeXt block of a model that the kernels cover run fused, in place.

    Recognised: facebookresearch's ConvNeXt and ConvNeXt-V2 (by structure), timm, torchvision, transformers (ConvNext,
    ConvNextV2, DINOv3 ConvNext). The module objects stay, and with them every parameter, name, state-dict key, hook on
    the block and optimizer; only their class changes, to a subclass of what it was. Fused models can be trained,
    moved, copied, pickled, compiled and loaded into like any other. ONNX export, ``torch.jit.trace`` and ``torch.fx``
    record the original forward, so that their graphs do not need this package; ``torch.export`` records our operators.
    ``torch.jit.script`` needs :func:`unfuse`.

    A block that the kernels do not cover, or whose inner modules carry hooks, parametrizations or adapters, is left
    alone with a warning; :func:`fusion_report` lists all with the reasons. A part that is replaced or hooked after
    fusing makes its block run the original forward, a hook on all modules makes all of them; that is logged. Fusing
    again changes nothing but `recompute` and `backend`.

    Args:
        model: a model, or a block itself.
        norms: also run the LayerNorms of stem, downsampling and head through our operator.
        convolutions: also run every other depthwise convolution through it that it covers (kernel 3 to 11, stride 1 or
            2, padding k // 2), in any network. Its result is channels-last: so should the model be. Fold BatchNorm
            (``torch.fx.experimental.optimization.fuse``, ``fuse_modules``) and quantize before fusing, or
            :func:`unfuse` for it: those look layers up by their exact type.
        recompute: compute the hidden tensor again in backward; False keeps it, for more memory and less work.
        backend: what runs the blocks (:mod:`convnext_kernels.backends`); None follows ``use_backend`` at each call, as
            norms and convolutions always do.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: `model` is no module.
        ValueError: it holds no ConvNeXt block (nor, with `convolutions`, any such convolution), or there is no such
            backend; nothing is changed.
    """
    _check_module("fuse", model)
    _flops.register()
    if backend is not None:
        checked(backend, "fuse: argument 'backend'")
    findings = _survey(model, convolutions)
    blocks = [finding for finding in findings if finding.entry.kind == "block"]
    layers = [finding for finding in findings if finding.entry.kind == "convolution" and finding.plan is not None]
    if not blocks and not layers:
        sought = "ConvNeXt block" + (" or depthwise convolution that is covered" if convolutions else "")
        raise ValueError(f"fuse: argument 'model': found no {sought} in {type(model).__name__}; nothing changed")
    for block in blocks:
        if block.plan is not None:
            swap(block.module, FusedBlock, dataclasses.replace(block.plan, recompute=recompute, backend=backend))
        elif isinstance(block.module, FusedConvNeXtBlock):
            block.module.recompute, block.module.backend = recompute, backend
    left_alone = [block.entry for block in blocks if block.plan is None and not block.entry.fused]
    if norms and len(left_alone) < len(blocks):
        for finding in findings:
            if finding.entry.kind == "norm" and finding.plan is not None:
                swap(finding.module, FusedNorm, finding.plan)
    if convolutions:
        for finding in layers:
            swap(finding.module, FusedConvolution, finding.plan)
    if left_alone:
        warnings.warn(_describe(left_alone, len(blocks)), stacklevel=2)
    return model


def _describe(left_alone: list[FusionEntry], total: int) -> str:
    names: dict[str, list[str]] = {}
    for entry in left_alone:
        names.setdefault(entry.reason, []).append(entry.name or "the model")
    reasons = (
        f"{', '.join(group[:3])}{f' and {len(group) - 3} more' if len(group) > 3 else ''}: {reason}"
        for reason, group in names.items()
    )
    return f"fuse left {len(left_alone)} of {total} ConvNeXt blocks alone. {'; '.join(reasons)}"


def unfuse(model: nn.Module) -> nn.Module:
    """Undoes :func:`fuse`, in place: every module has its own class and forward again. Returns `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: a fused module's class has since been extended, by a parametrization or FSDP, say; nothing is
            changed.
    """
    _check_module("unfuse", model)
    fused = [(name, module) for name, module in model.named_modules() if isinstance(module, Fused)]
    for name, module in fused:
        if extended(module):
            raise ValueError(
                f"unfuse: argument 'model': '{name}' has become a {type(module).__name__} since it was fused (by a "
                "parametrization or FSDP, say): undo that first; nothing changed"
            )
    for _, module in fused:
        restore(module)
    return model


def _check_module(function: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: argument 'model': expected a torch.nn.Module, got {type(model).__name__}")


def fusion_report(model: nn.Module, *, convolutions: bool = False) -> FusionReport:
    """What :func:`fuse` did to a model, or would do: an entry for each ConvNeXt block and each norm around them.

    Args:
        model: fused or not.
        convolutions: list every other depthwise convolution too, not only the fused.

    Raises:
        TypeError: `model` is no module.
    """
    _check_module("fusion_report", model)
    return FusionReport(finding.entry for finding in _survey(model, convolutions))
