"""Fusing the ConvNeXt blocks of a model that is there already, in place, and going back."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any, NamedTuple

from torch import nn

from ..backends import checked
from ..block import FusedConvNeXtBlock
from .blocks import FusedBlock, find_change, plan_block
from .inspection import NotCoveredError
from .layouts import find_layout
from .norms import FusedNorm, find_norms, plan_norm
from .swap import Fused, original_class, restore, swap

__all__ = ["CAN_BE_FUSED", "FusionEntry", "FusionReport", "fuse", "fusion_report", "unfuse"]


#: The reason in the entry of what has not been fused, and can be.
CAN_BE_FUSED = "can be fused"


class FusionEntry(NamedTuple):
    """What became of one module.

    `kind` is 'block' or 'norm'; `family` the library it is laid out as ('official' is facebookresearch's). `reason`
    says why it is not fused, or why a fused one runs its original forward at present; else it is empty.
    """

    name: str
    kind: str
    family: str
    fused: bool
    reason: str


class FusionReport(list[FusionEntry]):
    """The entries in the model's order. ``str()`` is a table."""

    def __str__(self) -> str:
        blocks = [entry for entry in self if entry.kind == "block"]
        if not blocks:
            return "no ConvNeXt block found"
        header = FusionEntry("module", "kind", "family", "fused", "reason")
        rows = [header, *(entry._replace(name=entry.name or "(the model)") for entry in self)]
        cells = [(*row[:3], {True: "yes", False: "no"}.get(row.fused, row.fused), row.reason) for row in rows]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        lines = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[4]]) for row in cells]
        norms = [entry for entry in self if entry.kind == "norm"]
        counts = (f"{sum(entry.fused for entry in group)} of {len(group)}" for group in (blocks, norms))
        lines.append("{} blocks and {} norms fused".format(*counts))
        return "\n".join(line.rstrip() for line in lines)


class _Finding(NamedTuple):
    """A module looked at: its entry, and the plan to fuse it by where it can be and is not."""

    module: nn.Module
    entry: FusionEntry
    plan: Any


def _survey(model: nn.Module) -> list[_Finding]:
    trials: dict[Any, str] = {}
    findings = [_look_at_block(name, module, trials) for name, module in model.named_modules() if _is_block(module)]
    blocks = {finding.module for finding in findings}
    findings += [_look_at_norm(name, norm) for name, norm in find_norms(model, blocks)]
    order = {module: position for position, module in enumerate(model.modules())}
    return sorted(findings, key=lambda finding: order[finding.module])


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, FusedConvNeXtBlock) or find_layout(module) is not None


def _look_at_block(name: str, block: nn.Module, trials: dict[Any, str]) -> _Finding:
    if isinstance(block, FusedConvNeXtBlock):
        return _Finding(block, FusionEntry(name, "block", "convnext_kernels", True, ""), None)
    family = find_layout(block).family
    if isinstance(block, FusedBlock):
        change = find_change(block, block._fused_plan)
        reason = f"runs unfused: since it was fused, {change}" if change else ""
        return _Finding(block, FusionEntry(name, "block", family, True, reason), block._fused_plan)
    try:
        plan, reason = plan_block(block, trials), CAN_BE_FUSED
    except NotCoveredError as error:
        plan, reason = None, str(error)
    return _Finding(block, FusionEntry(name, "block", family, False, reason), plan)


def _look_at_norm(name: str, norm: nn.Module) -> _Finding:
    library = original_class(norm).__module__.partition(".")[0]
    family = library if library in ("torch", "timm", "torchvision", "transformers") else "official"
    try:
        plan, reason = plan_norm(norm), CAN_BE_FUSED
    except NotCoveredError as error:
        plan, reason = None, str(error)
    fused = isinstance(norm, FusedNorm)
    return _Finding(norm, FusionEntry(name, "norm", family, fused, "" if fused else reason), plan)


def fuse(model: nn.Module, *, norms: bool = True, recompute: bool = True, backend: str | None = None) -> nn.Module:
    """Makes every ConvNeXt block of a model that the kernels cover run fused, in place.

    Recognised: facebookresearch's ConvNeXt and ConvNeXt-V2 (by structure), timm, torchvision, transformers (ConvNext,
    ConvNextV2, DINOv3 ConvNext). The module objects stay, and with them every parameter, name, state-dict key, hook on
    the block and optimizer; only their class changes, to a subclass of what it was. Fused models can be trained,
    moved, copied, pickled, compiled and loaded into like any other. ONNX export, ``torch.jit.trace`` and ``torch.fx``
    record the original forward, so that their graphs do not need this package; ``torch.export`` records our operators.

    A block that the kernels do not cover, or whose inner modules carry hooks, parametrizations or adapters, is left
    alone with a warning; :func:`fusion_report` lists all with the reasons. A part that is replaced or hooked after
    fusing makes its block run the original forward, which is logged. Fusing again changes nothing but `recompute` and
    `backend`.

    Args:
        model: a model, or a block itself.
        norms: also run the LayerNorms of stem, downsampling and head through our operator.
        recompute: compute the hidden tensor again in backward; False keeps it, for more memory and less work.
        backend: what runs the blocks (:mod:`convnext_kernels.backends`); None follows ``use_backend`` at each call, as
            the norms always do.

    Returns:
        `model`, the same object.

    Raises:
        TypeError: `model` is no module.
        ValueError: it holds no ConvNeXt block, or there is no such backend; nothing is changed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: argument 'model': expected a torch.nn.Module, got {type(model).__name__}")
    if backend is not None:
        checked(backend, "fuse: argument 'backend'")
    findings = _survey(model)
    blocks = [finding for finding in findings if finding.entry.kind == "block"]
    if not blocks:
        raise ValueError(f"fuse: argument 'model': found no ConvNeXt block in {type(model).__name__}; nothing changed")
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
    """Undoes :func:`fuse`, in place: every module has its own class and forward again. Returns `model`."""
    for module in model.modules():
        if isinstance(module, Fused):
            restore(module)
    return model


def fusion_report(model: nn.Module) -> FusionReport:
    """What :func:`fuse` did to a model, or would do: an entry for each ConvNeXt block and each norm around them."""
    return FusionReport(finding.entry for finding in _survey(model))
