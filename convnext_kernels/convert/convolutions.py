"""Depthwise convolutions, in a block or outside of one: which are covered, and running the latter by our operator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..operators import depthwise_conv2d
from ..parts import find_subclass, is_traced, log_unfused
from ..reference import KERNEL_SIZES
from .inspection import NotCoveredError, check_tensors
from .swap import Fused, original_class, pop_input, settings_of, unexpected

__all__ = ["FusedConvolution", "check_convolution", "find_convolutions", "plan_convolution"]


class FusedConvolution(Fused):
    """A depthwise convolution that runs :func:`convnext_kernels.depthwise_conv2d`.

    The result is channels-last in memory, whatever the input was. If the layer has since been set differently
    (dilation, say) or its weight been quantised, it runs as before, which is logged once.
    """

    def forward(self, x: Tensor | None = None, **named: Tensor) -> Tensor:
        if x is None:
            x = pop_input(self, named)
        if is_traced(x):
            return super().forward(x)
        if named:
            raise unexpected(self, named)
        if x.dim() != 4:  # PyTorch's takes a single image too
            return super().forward(x)
        reason = self.find_change()
        if reason is not None:
            log_unfused(self, reason)
            return super().forward(x)
        return depthwise_conv2d(x, self.weight, self.bias, self.stride[0])

    def find_change(self, in_call: bool = True) -> str | None:
        if settings_of(self) != self._fused_plan:
            return "since it was fused, it was set differently"
        return find_subclass(self.weight, self.bias, in_call=in_call)


def find_convolutions(model: nn.Module, blocks: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """The depthwise convolutions outside of `blocks`."""
    inside = {module for block in blocks for module in block.modules()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module not in inside and 1 < module.in_channels == module.groups:
            yield name, module


def plan_convolution(conv: nn.Module) -> tuple[tuple[str, Any], ...]:
    """How `conv` is set: what must stay so for our operator to stand in for it.

    Raises:
        NotCoveredError: our operator cannot.
    """
    if original_class(conv) is not nn.Conv2d:
        raise NotCoveredError(f"it is a {type(conv).__module__}.{type(conv).__name__}, not a torch.nn.Conv2d")
    if "forward" in vars(conv):
        raise NotCoveredError("it has a forward assigned to the instance")
    check_tensors(conv, {"weight", "bias"})
    check_convolution(conv, strides=((1, 1), (2, 2)))
    return settings_of(conv)


def check_convolution(conv: nn.Conv2d, strides: tuple[tuple[int, int], ...] = ((1, 1),)) -> None:
    """Raises NotCoveredError where `conv` is another convolution than our operator's, or has none of the strides."""
    size = conv.kernel_size[0]
    if size not in KERNEL_SIZES or conv.kernel_size != (size, size):
        raise NotCoveredError(f"its convolution has kernel size {conv.kernel_size}")
    for setting, wanted in {
        "stride": strides,
        "dilation": ((1, 1),),
        "padding_mode": ("zeros",),
        "out_channels": (conv.in_channels,),
        "groups": (conv.in_channels,),
    }.items():
        if getattr(conv, setting) not in wanted:
            expected = " or ".join(repr(value) for value in wanted)
            raise NotCoveredError(f"its convolution has {setting} {getattr(conv, setting)!r}, not {expected}")
    if conv.padding not in ((size // 2, size // 2), "same"):
        raise NotCoveredError(f"its convolution has padding {conv.padding!r}, not {size // 2}")
