"""The `reference` backend: every raw operator from PyTorch's own kernels, backwards included.

It runs where none of our kernels does (a device without them, or ``CONVNEXT_KERNELS_BACKEND=reference``), keeps the
same few activations, and is the second opinion that tests compare the compiled kernels with. Signatures are those of
csrc/operators.cpp. Autograd is not used here: these functions run below it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import GRN_EPS

__all__ = [
    "bias_gelu",
    "bias_gelu_backward",
    "depthwise_conv2d",
    "depthwise_conv2d_cast",
    "depthwise_conv2d_input_grad",
    "depthwise_conv2d_weight_grad",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_mlp",
    "layer_norm_mlp_backward",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 accumulates in fp64, everything else in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _live(sample_scale: Tensor, tensor: Tensor) -> Tensor:
    """True where a sample is kept, shaped to broadcast over `tensor` (N, ...)."""
    return (sample_scale != 0).view(-1, *[1] * (tensor.dim() - 1))


def _keep(tensor: Tensor, sample_scale: Tensor | None) -> Tensor:
    """Zeros in place of dropped samples, by selection: what they held may be NaN."""
    return tensor if sample_scale is None else tensor.masked_fill(~_live(sample_scale, tensor), 0)


def _samples(tensor: Tensor) -> Tensor:
    """(N, L, K) from (N, ..., K); the product also where there are no elements."""
    return tensor.reshape(tensor.shape[0], math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


def _none_wanted(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_empty((0,), dtype=dtype)


# --- depthwise convolution


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sample_scale: Tensor | None
) -> Tensor:
    y = F.conv2d(
        _keep(x, sample_scale),
        weight.to(x.dtype),
        _to(bias, x.dtype),
        stride=stride,
        padding=weight.shape[-1] // 2,
        groups=weight.shape[0],
    )
    return _keep(y, sample_scale).contiguous(memory_format=torch.channels_last)


def depthwise_conv2d_cast(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, sample_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    x_copy = x.to(dtype, copy=True, memory_format=torch.channels_last)
    return depthwise_conv2d(x_copy, weight, bias, 1, sample_scale), x_copy


def _convolution_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    channels, padding = weight.shape[0], weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad, x, weight, [channels], [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], channels, mask
    )


def depthwise_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    output_padding: list[int],
    sample_scale: Tensor | None,
) -> Tensor:
    n, c, height, width = grad.shape
    shape = (n, c, (height - 1) * stride + 1 + output_padding[0], (width - 1) * stride + 1 + output_padding[1])
    dtype = grad.dtype if residual is None else residual.dtype
    if n == 0:
        return grad.new_empty(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    # Only the shape of the input matters for its own gradient.
    x = grad.new_empty((1,)).expand(shape)
    dx = _convolution_backward(_keep(grad, sample_scale), x, weight.to(grad.dtype), stride, [True, False, False])[0]
    dx = _keep(dx, sample_scale)
    dx = dx.to(dtype) if residual is None else (dx.to(accumulation_dtype(dx.dtype)) + residual).to(dtype)
    return dx.contiguous(memory_format=torch.channels_last)


def depthwise_conv2d_weight_grad(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, sample_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    weight = x.new_zeros((x.shape[1], 1, kernel_size, kernel_size))
    if x.shape[0] == 0:
        return weight.to(dtype), weight.new_zeros((x.shape[1],), dtype=dtype)
    grad, x = _keep(grad, sample_scale), _keep(x, sample_scale)
    dweight = _convolution_backward(grad, x, weight, stride, [False, True, False])[1]
    return dweight.to(dtype).contiguous(), grad.sum(dim=(0, 2, 3), dtype=dtype)


# --- layer normalisation


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    y, mean, rstd = torch.ops.aten.native_layer_norm(
        x.to(dtype), [x.shape[-1]], _to(weight, dtype), _to(bias, dtype), eps
    )
    return y.to(out_dtype), mean.squeeze(-1).contiguous(), rstd.squeeze(-1).contiguous()


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    grad = grad.to(dtype)
    normalised = (x.to(dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    dx, dweight, dbias = (_none_wanted(x, dtype) for _ in range(3))
    if needs_x:
        scaled = grad if weight is None else grad * weight.to(dtype)
        projection = (scaled * normalised).mean(-1, keepdim=True)
        dx = rstd.unsqueeze(-1) * (scaled - scaled.mean(-1, keepdim=True) - normalised * projection)
        dx = dx.to(x.dtype)
    if needs_weight:
        dweight = _rows(grad * normalised).sum(0)
    if needs_bias:
        dbias = _rows(grad).sum(0)
    return dx, dweight, dbias


# --- bias + GELU


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    dtype = accumulation_dtype(x.dtype)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return F.gelu(h, approximate=approximate).to(x.dtype)


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    h = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    dx = torch.ops.aten.gelu_backward(grad.to(dtype), h, approximate=approximate)
    return dx.to(x.dtype), _none_wanted(x, dtype) if bias is None else _rows(dx).sum(0)


# --- LayerNorm + MLP + layer scale + drop path + residual


def _grn_factors(g: Tensor, eps: float = GRN_EPS) -> tuple[Tensor, Tensor]:
    """The norms G and the normalised responses N of g (N, L, K), both (N, 1, K) in fp32 (fp64 for fp64)."""
    norm = torch.linalg.vector_norm(g, dim=1, keepdim=True, dtype=accumulation_dtype(g.dtype))
    return norm, norm / (norm.mean(-1, keepdim=True) + eps)


def _grn(g: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    dtype = accumulation_dtype(g.dtype)
    _, response = _grn_factors(g)
    return (g * (1 + weight.to(dtype) * response) + bias.to(dtype)).to(g.dtype)


def layer_norm_mlp(
    z: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
    approximate: str,
    out_dtype: torch.dtype,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    compute, dtype = z.dtype, accumulation_dtype(z.dtype)
    a, mean, rstd = layer_norm(_keep(z, sample_scale), norm_weight, norm_bias, eps, compute)
    hidden = F.linear(a, fc1_weight.to(compute), _to(fc1_bias, compute))
    g = F.gelu(hidden, approximate=approximate)
    if grn_weight is not None and grn_bias is not None:
        g = _grn(_samples(g), grn_weight, grn_bias).view_as(g)
    y = F.linear(g, fc2_weight.to(compute), _to(fc2_bias, compute)).to(dtype)
    if layer_scale is not None:
        y = y * layer_scale.to(dtype)
    if sample_scale is not None:
        y = _keep(y * sample_scale.view(-1, *[1] * (z.dim() - 1)), sample_scale)
    if residual is not None:
        y = y + residual
    return (
        y.to(out_dtype).contiguous(),
        _keep(mean, sample_scale),
        _keep(rstd, sample_scale),
        _keep(hidden, sample_scale) if keep_hidden else _none_wanted(z, compute),
    )


def layer_norm_mlp_backward(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    approximate: str,
    output_mask: int,
) -> tuple[Tensor, ...]:
    compute, dtype = z.dtype, accumulation_dtype(z.dtype)
    wanted = [bool(output_mask >> i & 1) for i in range(10)]
    out = [_none_wanted(z, dtype) for _ in range(10)]
    z, grad = _keep(z, sample_scale), _keep(grad, sample_scale)

    # Forward again.
    normalised = (z.to(dtype) - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)
    a = normalised
    if norm_weight is not None:
        a = a * norm_weight.to(dtype)
    if norm_bias is not None:
        a = a + norm_bias.to(dtype)
    a = a.to(compute)
    if hidden.numel() == 0:
        hidden = F.linear(a, fc1_weight.to(compute), _to(fc1_bias, compute))
    g = _samples(F.gelu(hidden, approximate=approximate))
    has_grn = grn_weight is not None and grn_bias is not None
    g_out = _grn(g, grn_weight, grn_bias) if has_grn else g

    # The branch's output, scaled by the sample and the layer.
    scaled = grad.to(dtype)
    if sample_scale is not None:
        scaled = scaled * sample_scale.view(-1, *[1] * (z.dim() - 1))
    if layer_scale is not None:
        if wanted[9]:
            branch = F.linear(g_out, fc2_weight.to(compute), _to(fc2_bias, compute))
            out[9] = (_rows(scaled) * _rows(branch)).sum(0)
        scaled = scaled * layer_scale.to(dtype)
    d_out = scaled.to(compute)
    if wanted[7]:
        out[7] = (_rows(d_out).t() @ _rows(g_out)).to(dtype)
    if wanted[8] and fc2_bias is not None:
        out[8] = _rows(d_out).sum(0, dtype=dtype)

    dg = F.linear(d_out, fc2_weight.to(compute).t()).view_as(g)
    if has_grn:
        weight = grn_weight.to(dtype)
        norm, response = _grn_factors(g)
        correlation = (dg.to(dtype) * g).sum(1, keepdim=True)
        if wanted[5]:
            out[5] = (response * correlation).sum((0, 1))
        if wanted[6]:
            out[6] = _rows(dg).sum(0, dtype=dtype)
        d_response = weight * correlation
        denominator = norm.mean(-1, keepdim=True) + GRN_EPS
        d_norm = d_response / denominator - (d_response * norm).mean(-1, keepdim=True) / denominator**2
        d_norm = torch.where(norm > 0, d_norm / norm, 0)
        dg = (dg * (1 + weight * response) + g * d_norm).to(compute)
    dh = torch.ops.aten.gelu_backward(dg.view_as(hidden), hidden, approximate=approximate)
    dh = _keep(dh, sample_scale)
    if wanted[3]:
        out[3] = (_rows(dh).t() @ _rows(a)).to(dtype)
    if wanted[4] and fc1_bias is not None:
        out[4] = _rows(dh).sum(0, dtype=dtype)
    if wanted[0] or wanted[1] or wanted[2]:
        da = F.linear(dh, fc1_weight.to(compute).t())
        needs = wanted[0], wanted[1] and norm_weight is not None, wanted[2] and norm_bias is not None
        out[0:3] = layer_norm_backward(_keep(da, sample_scale), z, mean, rstd, norm_weight, *needs)
    return tuple(out)
