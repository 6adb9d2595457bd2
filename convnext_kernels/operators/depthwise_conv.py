"""Depthwise convolution, kernel 3 to 11, stride 1 or 2 (ConvNeXt, section 2.5: 'Large Kernel Sizes')."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference import KERNEL_SIZES
from ..reference_backend import accumulation_dtype
from . import _arguments as arguments
from ._registration import dense_channels_last, differentiate, differentiate_once, fake

__all__ = ["DepthwiseConv2dFunction", "depthwise_conv2d"]


def output_size(size: int, stride: int) -> int:
    """Rows or columns that come out for `size` that go in; the padding is kernel_size // 2."""
    return (size - 1) // stride + 1


@fake("depthwise_conv2d")
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sample_scale: Tensor | None) -> Tensor:
    n, c, h, w = x.shape
    return dense_channels_last(x, (n, c, output_size(h, stride), output_size(w, stride)), x.dtype)


@fake("depthwise_conv2d_cast")
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, sample_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    return dense_channels_last(x, x.shape, dtype), dense_channels_last(x, x.shape, dtype)


@fake("depthwise_conv2d_input_grad")
def _(
    grad: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    output_padding: list[int],
    sample_scale: Tensor | None,
) -> Tensor:
    n, c, h, w = grad.shape
    shape = (n, c, (h - 1) * stride + 1 + output_padding[0], (w - 1) * stride + 1 + output_padding[1])
    return dense_channels_last(grad, shape, grad.dtype if residual is None else residual.dtype)


@fake("depthwise_conv2d_weight_grad")
def _(grad: Tensor, x: Tensor, kernel_size: int, stride: int, sample_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    c = x.shape[1]
    return x.new_empty((c, 1, kernel_size, kernel_size), dtype=dtype), x.new_empty((c,), dtype=dtype)


def strided_as(weight: Tensor, grad: Tensor) -> Tensor:
    """`grad`, which is dense, with the strides of a channels-last (C, 1, k, k) weight: the same memory.

    DistributedDataParallel compares a gradient's with its parameter's.
    """
    if grad.stride() == weight.stride() or not weight.permute(0, 2, 3, 1).is_contiguous():
        return grad
    return grad.as_strided(grad.shape, weight.stride())


def parameter_gradients(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_dtype: torch.dtype | None,
    stride: int,
    sample_scale: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Of the convolution's weight and bias, as autograd takes them; None where `needs` does not ask."""
    if not any(needs):
        return None, None
    dweight, dbias = torch.ops.convnext_kernels.depthwise_conv2d_weight_grad(
        grad, x, weight.shape[-1], stride, sample_scale
    )
    return (
        strided_as(weight, dweight.to(weight.dtype)) if needs[0] else None,
        dbias.to(bias_dtype) if needs[1] else None,
    )


class DepthwiseConv2dFunction(torch.autograd.Function):
    """Saves the input and the weight. Arguments are those of the raw operator."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sample_scale: Tensor | None) -> Tensor:
        return backends.call("depthwise_conv2d", x, weight, bias, stride, sample_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, stride, sample_scale = inputs
        ctx.save_for_backward(x, weight, sample_scale)
        ctx.stride = stride
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, sample_scale = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:3]
        operators = torch.ops.convnext_kernels
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = None
        if needs_x:
            padding = [(size - 1) % ctx.stride for size in x.shape[2:]]
            dx = operators.depthwise_conv2d_input_grad(grad, weight, None, ctx.stride, padding, sample_scale)
        parameters = parameter_gradients(grad, x, weight, ctx.bias_dtype, ctx.stride, sample_scale, needs)
        return dx, *parameters, None, None


class DepthwiseConv2dCastFunction(torch.autograd.Function):
    """Saves the rounded input, which is a result, and the weight. Arguments are those of the raw operator."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, sample_scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return backends.call("depthwise_conv2d_cast", x, weight, bias, dtype, sample_scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, _, sample_scale = inputs
        ctx.save_for_backward(output[1], weight, sample_scale)
        ctx.x_dtype = x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_x_copy: Tensor) -> tuple[Tensor | None, ...]:
        x_copy, weight, sample_scale = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:3]
        operators = torch.ops.convnext_kernels
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = None
        if needs_x:
            residual = grad_x_copy.to(ctx.x_dtype).contiguous(memory_format=torch.channels_last)
            dx = operators.depthwise_conv2d_input_grad(grad, weight, None, 1, [0, 0], sample_scale)
            dx = dx.to(ctx.x_dtype) + residual
        return dx, *parameter_gradients(grad, x_copy, weight, ctx.bias_dtype, 1, sample_scale, needs), None, None


differentiate("depthwise_conv2d", DepthwiseConv2dFunction, partial(backends.call, "depthwise_conv2d"))
differentiate("depthwise_conv2d_cast", DepthwiseConv2dCastFunction, partial(backends.call, "depthwise_conv2d_cast"))
differentiate_once("depthwise_conv2d_input_grad", partial(backends.call, "depthwise_conv2d_input_grad"))
differentiate_once("depthwise_conv2d_weight_grad", partial(backends.call, "depthwise_conv2d_weight_grad"))


def check_convolution(
    operator: str, x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, prefix: str = ""
) -> None:
    """Raises TypeError or ValueError where :func:`depthwise_conv2d` cannot take these arguments.

    `prefix` goes before 'weight' and 'bias' where the operator has other parameters too.
    """
    arguments.check_image(operator, "x", x)
    arguments.check_tensor(operator, f"{prefix}weight", weight)
    channels, size = x.shape[1], weight.shape[-1] if weight.dim() else 0
    if weight.dim() == 4 and size not in KERNEL_SIZES:
        expected = f"a kernel size of {KERNEL_SIZES}"
        arguments.wrong_value(operator, f"{prefix}weight", expected, f"shape {tuple(weight.shape)}")
    arguments.check_shape(operator, f"{prefix}weight", weight, (channels, 1, size, size))
    arguments.check_shape(operator, f"{prefix}bias", bias, (channels,))
    if not isinstance(stride, int) or stride not in (1, 2):
        arguments.wrong_value(operator, "stride", "1 or 2", repr(stride))


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    """Depthwise 2-d convolution with padding k // 2.

    Args:
        x: (N, C, H, W), N >= 0, C, H, W >= 1; fp32, fp64, fp16 or bf16. Channels-last memory is read as it is; any
            other layout is copied once.
        weight: (C, 1, k, k) with k of 3, 5, 7, 9 or 11.
        bias: (C,) or None.
        stride: 1 or 2.

    Returns:
        (N, C, ceil(H / stride), ceil(W / stride)) in channels-last memory, in x's dtype; under autocast in autocast's.

    Raises:
        TypeError: not a tensor, an unsupported dtype, or parameters of another dtype outside autocast.
        ValueError: a wrong rank, shape, kernel size, stride or device.

    Source: ConvNeXt (arXiv:2201.03545), section 2.5.
    """
    name = "depthwise_conv2d"
    check_convolution(name, x, weight, bias, stride)
    arguments.check_device(name, x, weight=weight, bias=bias)
    compute = arguments.autocast_dtype(x)
    arguments.check_dtypes(name, x.dtype, compute is not None, weight=weight, bias=bias)
    x = x.to(compute or x.dtype).contiguous(memory_format=torch.channels_last)
    return torch.ops.convnext_kernels.depthwise_conv2d(x, weight, bias, stride, None)
