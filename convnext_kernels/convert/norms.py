"""The LayerNorms around the blocks: which ones belong to a ConvNeXt, and running them through our operator."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators import layer_norm
from ..operators._arguments import autocast_dtype
from ..parts import find_subclass, is_traced, log_unfused
from .inspection import NotCoveredError, agrees, check_tensors, random_input, random_twin, try_forward
from .layouts import CONVNEXT_FILES
from .swap import Fused, original_class, pop_input, unexpected

__all__ = ["FusedNorm", "NormPlan", "find_norms", "is_convnext", "plan_norm", "trial_tolerance"]


@dataclass(frozen=True)
class NormPlan:
    """How to run a LayerNorm.

    `output` names the rule for the result's dtype: 'torch' is ``F.layer_norm``'s, 'promoted' that of arithmetic with
    the parameters, 'input' the input's, 'autocast' the autocast dtype (timm's fast norm).
    """

    channels_first: bool
    output: str

    def out_dtype(self, x: Tensor, weight: Tensor | None) -> torch.dtype | None:
        if self.output == "torch":
            return None
        if self.output == "input":
            return x.dtype
        autocast = autocast_dtype(x)
        if self.output == "autocast":
            return autocast or x.dtype
        if autocast is not None and x.device.type == "cuda":
            return torch.float32  # autocast runs pow, with which the variance is written, in fp32 there
        return x.dtype if weight is None else torch.promote_types(x.dtype, weight.dtype)


class FusedNorm(Fused):
    """A LayerNorm over the channels that runs :func:`convnext_kernels.layer_norm`."""

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None:
            x = pop_input(self, named)
        if is_traced(x):
            return super().forward(x)
        if named:
            raise unexpected(self, named)
        reason = self.find_change()
        if reason is not None:
            log_unfused(self, reason)
            return super().forward(x)
        plan, weight = self._fused_plan, self.weight
        out_dtype = plan.out_dtype(x, weight)
        return layer_norm(x, weight, self.bias, self.eps, channels_first=plan.channels_first, out_dtype=out_dtype)

    def find_change(self, in_call: bool = True) -> str | None:
        return find_subclass(self.weight, self.bias, in_call=in_call)


_NORMS = {
    ("torch.nn.modules.normalization", "LayerNorm"): NormPlan(False, "torch"),
    ("timm.layers.norm", "LayerNorm"): NormPlan(False, "torch"),
    ("timm.layers.norm", "LayerNormFp32"): NormPlan(False, "input"),
    ("timm.layers.norm", "LayerNorm2d"): NormPlan(True, "torch"),
    ("timm.layers.norm", "LayerNorm2dFp32"): NormPlan(True, "input"),
    ("torchvision.models.convnext", "LayerNorm2d"): NormPlan(True, "torch"),
}


def _declared(norm: nn.Module) -> NormPlan | None:
    """What the class, or the official classes' `data_format`, says; None where neither is a LayerNorm's we know."""
    cls = original_class(norm)
    plan = _NORMS.get((cls.__module__, cls.__name__))
    data_format = getattr(norm, "data_format", None)
    if plan is None and data_format in ("channels_first", "channels_last"):
        channels_first = data_format == "channels_first"
        # transformers' class calls F.layer_norm; the official one spells channels-first out in arithmetic.
        return NormPlan(channels_first, "promoted" if channels_first and not issubclass(cls, nn.LayerNorm) else "torch")
    if plan is not None and getattr(norm, "_fast_norm", False):
        return NormPlan(plan.channels_first, "autocast")
    return plan


def plan_norm(norm: nn.Module) -> NormPlan:
    """How to run `norm`.

    Raises:
        NotCoveredError: it is no LayerNorm over the channels, or one that our operator cannot stand in for.
    """
    if isinstance(norm, Fused):
        return norm._fused_plan
    plan = _declared(norm)
    if plan is None:
        raise NotCoveredError(f"{type(norm).__module__}.{type(norm).__name__} is no LayerNorm that the kernels cover")
    if "forward" in vars(norm):
        raise NotCoveredError("it has a forward assigned to the instance")
    if len(norm.normalized_shape) != 1:
        raise NotCoveredError(f"it normalises over {len(norm.normalized_shape)} dimensions")
    check_tensors(norm, {"weight", "bias"})
    twin = random_twin(norm)
    channels = norm.normalized_shape[0]
    x = random_input(2, 3, 4, channels)
    y = try_forward(lambda: twin(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if plan.channels_first else twin(x))
    if not agrees(y, F.layer_norm(x, (channels,), twin.weight, twin.bias, twin.eps), trial_tolerance(norm)):
        raise NotCoveredError("its forward computes something else than layer normalisation over the channels")
    return plan


def trial_tolerance(norm: nn.Module) -> float:
    """How closely a trial in fp64 can agree: timm's fp32 norms compute in fp32 whatever they are given."""
    return 1e-5 if _declared(norm).output == "input" else 1e-9


def find_norms(model: nn.Module, blocks: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The normalisation layers of the model's ConvNeXt parts, outside the blocks.

    A part is a module of a ConvNeXt's own file, or one with the official stem and stages, or one that holds blocks and
    otherwise nothing but convolutions, linear layers and LayerNorms. A LayerNorm over the last dimension counts only as
    the direct child of one of the first two: elsewhere it may be a transformer's.
    """
    yield from _walk(model, "", blocks, inside=_is_part(model, blocks), in_root=False)


def _walk(
    module: nn.Module, path: str, blocks: set[nn.Module], *, inside: bool, in_root: bool
) -> Iterator[tuple[str, nn.Module]]:
    if module in blocks:
        return
    if inside and _is_norm(module):
        plan = _declared(module)
        if in_root or plan is None or plan.channels_first:
            yield path, module
        return
    is_root = is_convnext(module)
    for name, child in module.named_children():
        child_path = f"{path}.{name}" if path else name
        yield from _walk(child, child_path, blocks, inside=inside or _is_part(child, blocks), in_root=is_root)


def _is_norm(module: nn.Module) -> bool:
    named = re.search("norm", original_class(module).__name__, re.IGNORECASE) is not None
    return named and not module._modules and bool(module._parameters)


def is_convnext(module: nn.Module) -> bool:
    """Whether it is a module of a ConvNeXt's own file, or one with the official stem and stages."""
    if any(cls.__module__ in CONVNEXT_FILES for cls in type(module).__mro__):
        return True
    return {"downsample_layers", "stages"} <= module._modules.keys()


def _is_part(module: nn.Module, blocks: set[nn.Module]) -> bool:
    if is_convnext(module):
        return True
    others = list(_outside(module, blocks))
    holds_blocks = any(child in blocks for other in others for child in other.children())
    return holds_blocks and all(
        isinstance(other, (nn.Conv2d, nn.Linear)) or _declared(other) is not None
        for other in others
        if other._parameters
    )


def _outside(module: nn.Module, blocks: set[nn.Module]) -> Iterator[nn.Module]:
    if module not in blocks:
        yield module
        for child in module.children():
            yield from _outside(child, blocks)
