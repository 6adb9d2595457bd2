"""Layer normalisation over the channels of channels-last maps (ConvNeXt, section 2.6: 'Substituting BN with LN')."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference_backend import accumulation_dtype
from . import _arguments as arguments
from ._registration import differentiate, differentiate_once, fake

__all__ = ["LayerNormFunction", "layer_norm"]


@fake("layer_norm")
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = accumulation_dtype(x.dtype)
    rows = x.shape[:-1]
    return (
        x.new_empty(x.shape, dtype=out_dtype),
        x.new_empty(rows, dtype=statistics),
        x.new_empty(rows, dtype=statistics),
    )


@fake("layer_norm_backward")
def _(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype, channels = accumulation_dtype(x.dtype), x.shape[-1:]
    return (
        x.new_empty(x.shape) if needs_x else x.new_empty((0,), dtype=dtype),
        x.new_empty(channels if needs_weight else (0,), dtype=dtype),
        x.new_empty(channels if needs_bias else (0,), dtype=dtype),
    )


class LayerNormFunction(torch.autograd.Function):
    """Saves the input, the statistics of each row and the weight. Arguments are those of the raw operator."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        return backends.call("layer_norm", x, weight, bias, eps, out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, bias, _, _ = inputs
        _, mean, rstd = output
        ctx.save_for_backward(x, mean, rstd, weight)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        x, mean, rstd, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dx, dweight, dbias = torch.ops.convnext_kernels.layer_norm_backward(
            grad.contiguous(), x, mean, rstd, weight, *needs
        )
        return (
            dx if needs[0] else None,
            dweight.to(weight.dtype) if needs[1] else None,
            dbias.to(ctx.bias_dtype) if needs[2] else None,
            None,
            None,
        )


differentiate("layer_norm", LayerNormFunction, partial(backends.call, "layer_norm"))
differentiate_once("layer_norm_backward", partial(backends.call, "layer_norm_backward"))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    channels_first: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Layer normalisation over the channels, statistics in fp32 (fp64 for fp64).

    Args:
        x: (..., C), or (N, C, ...) where `channels_first`; fp32, fp64, fp16 or bf16. Read as it is where C is the
            innermost dimension of dense memory (channels-last for `channels_first`); copied once otherwise.
        weight, bias: (C,) or None; x's dtype or fp32.
        eps: added to the variance, at least 0.
        channels_first: C is dimension 1; the result has x's logical layout in channels-last memory.
        out_dtype: the result's dtype. By default what ``torch.nn.functional.layer_norm`` gives: x's dtype, and fp32
            under CUDA autocast.

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: a wrong rank, shape, eps or device.

    Source: Layer Normalization (Ba et al. 2016, arXiv:1607.06450); ConvNeXt (arXiv:2201.03545), section 2.6.
    """
    name = "layer_norm"
    arguments.check_tensor(name, "x", x)
    if x.dim() < (2 if channels_first else 1):
        arguments.wrong_value(name, "x", "a tensor with a channel dimension", f"shape {tuple(x.shape)}")
    channels = x.shape[1 if channels_first else -1]
    if channels == 0:
        arguments.wrong_value(name, "x", "at least one channel", f"shape {tuple(x.shape)}")
    arguments.check_shape(name, "weight", weight, (channels,))
    arguments.check_shape(name, "bias", bias, (channels,))
    arguments.check_eps(name, eps)
    arguments.check_device(name, x, weight=weight, bias=bias)
    autocast = arguments.autocast_dtype(x) is not None
    for argument, parameter in (("weight", weight), ("bias", bias)):
        if not autocast:
            arguments.check_bias_dtype(name, argument, parameter, x)
    if out_dtype is not None and out_dtype not in arguments.SUPPORTED_DTYPES:
        arguments.wrong_type(name, "out_dtype", "float32, float64, float16 or bfloat16 of torch", repr(out_dtype))
    if out_dtype is None:
        # CUDA's autocast runs layer_norm in fp32; the CPU's leaves it alone.
        out_dtype = torch.float32 if autocast and x.device.type == "cuda" else x.dtype
    rows = (x.movedim(1, -1) if channels_first else x).contiguous()
    y = torch.ops.convnext_kernels.layer_norm(rows, weight, bias, eps, out_dtype)[0]
    return y.movedim(-1, 1) if channels_first else y
