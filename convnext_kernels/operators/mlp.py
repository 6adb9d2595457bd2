"""bias + GELU, and LayerNorm + MLP + layer scale + drop path + residual (ConvNeXt, sections 2.4 and 2.6; V2, 4)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .._cast import cast
from ..reference_backend import accumulation_dtype
from . import _arguments as arguments
from ._registration import differentiate, differentiate_once, fake

__all__ = ["BiasGeluFunction", "LayerNormMlpFunction", "bias_gelu", "layer_norm_mlp"]


# --- bias + GELU


@fake("bias_gelu")
def _(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    return x.new_empty(x.shape)


@fake("bias_gelu_backward")
def _(grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    shape = (0,) if bias is None else x.shape[-1:]
    return x.new_empty(x.shape), x.new_empty(shape, dtype=accumulation_dtype(x.dtype))


class BiasGeluFunction(torch.autograd.Function):
    """Saves the input and the bias. Arguments are those of the raw operator."""

    @staticmethod
    def forward(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        return backends.call("bias_gelu", x, bias, approximate)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, bias, ctx.approximate = inputs
        ctx.save_for_backward(x, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = torch.ops.convnext_kernels.bias_gelu_backward(grad.contiguous(), x, bias, ctx.approximate)
        needs_x, needs_bias = ctx.needs_input_grad[:2]
        return dx if needs_x else None, dbias.to(bias.dtype) if needs_bias else None, None


differentiate("bias_gelu", BiasGeluFunction, partial(backends.call, "bias_gelu"))
differentiate_once("bias_gelu_backward", partial(backends.call, "bias_gelu_backward"))


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU(x + bias), computed in fp32 (fp64 for fp64) and rounded once.

    Args:
        x: (..., K); fp32, fp64, fp16 or bf16. Copied once where it is not contiguous.
        bias: (K,) or None; x's dtype or fp32.
        approximate: 'none' (exact, by erf) or 'tanh'.

    Raises:
        TypeError: not a tensor, or an unsupported dtype.
        ValueError: a wrong rank, shape, device, or `approximate`.

    Source: Gaussian Error Linear Units (Hendrycks and Gimpel 2016, arXiv:1606.08415), section 2.
    """
    name = "bias_gelu"
    arguments.check_tensor(name, "x", x)
    if x.dim() < 1:
        arguments.wrong_value(name, "x", "a tensor of rank 1 or more", f"shape {tuple(x.shape)}")
    arguments.check_shape(name, "bias", bias, (x.shape[-1],))
    arguments.check_approximate(name, approximate)
    arguments.check_device(name, x, bias=bias)
    arguments.check_bias_dtype(name, "bias", bias, x)
    return torch.ops.convnext_kernels.bias_gelu(x.contiguous(), bias, approximate)


# --- LayerNorm + MLP + layer scale + drop path + residual


@fake("layer_norm_mlp")
def _(z: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fc1_weight, (out_dtype, keep_hidden) = rest[3], rest[-2:]
    rows, statistics = z.shape[:-1], accumulation_dtype(z.dtype)
    return (
        z.new_empty(z.shape, dtype=out_dtype),
        z.new_empty(rows, dtype=statistics),
        z.new_empty(rows, dtype=statistics),
        z.new_empty((*rows, fc1_weight.shape[0]) if keep_hidden else (0,)),
    )


@fake("layer_norm_mlp_backward")
def _(grad: Tensor, z: Tensor, mean: Tensor, rstd: Tensor, hidden: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *parameters, _, _, output_mask = rest
    dtype = accumulation_dtype(z.dtype)
    grads = [z.new_empty(z.shape) if output_mask & 1 else z.new_empty((0,), dtype=dtype)]
    for i, parameter in enumerate(parameters, start=1):
        wanted = parameter is not None and output_mask >> i & 1
        grads.append(z.new_empty(parameter.shape if wanted else (0,), dtype=dtype))
    return tuple(grads)


class LayerNormMlpFunction(torch.autograd.Function):
    """Saves z, the statistics of each row and the parameters; the hidden tensor only where it is kept.

    Arguments are those of the raw operator.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return backends.call("layer_norm_mlp", *inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        z, residual, *parameters = inputs[:12]
        _, mean, rstd, hidden = output
        ctx.save_for_backward(z, mean, rstd, hidden, *parameters)
        ctx.mark_non_differentiable(mean, rstd, hidden)
        ctx.approximate = inputs[13]
        ctx.residual_dtype = None if residual is None else residual.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        z, mean, rstd, hidden, *parameters, sample_scale = ctx.saved_tensors
        needs_z, needs_residual, *needs = ctx.needs_input_grad[:11]
        mask = mask_of((needs_z, *needs))
        grad = grad.contiguous()
        dz, *dparameters = torch.ops.convnext_kernels.layer_norm_mlp_backward(
            grad, z, mean, rstd, hidden, *parameters, sample_scale, ctx.approximate, mask
        )
        return (
            dz if needs_z else None,
            grad.to(ctx.residual_dtype) if needs_residual else None,
            *parameter_grads(dtypes_of(parameters), dparameters, needs),
            *(None,) * 5,
        )


def mask_of(needs: Any) -> int:
    """The output_mask of the backward operators: bit i asks for result i."""
    return sum(1 << i for i, needed in enumerate(needs) if needed)


def dtypes_of(parameters: Any) -> list[torch.dtype | None]:
    return [None if parameter is None else parameter.dtype for parameter in parameters]


def parameter_grads(dtypes: list[torch.dtype | None], grads: Any, needs: Any) -> list[Tensor | None]:
    """Gradients in the parameters' dtypes; None where none was asked for or computed."""
    return cast([grad if needed else None for grad, needed in zip(grads, needs, strict=True)], dtypes)


differentiate("layer_norm_mlp", LayerNormMlpFunction, partial(backends.call, "layer_norm_mlp"))
differentiate_once("layer_norm_mlp_backward", partial(backends.call, "layer_norm_mlp_backward"))


def check_mlp(
    operator: str,
    channels: int,
    samples: int,
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
) -> None:
    """Raises TypeError or ValueError where the MLP cannot take these arguments."""
    for argument, weight in (("fc1_weight", fc1_weight), ("fc2_weight", fc2_weight)):
        arguments.check_tensor(operator, argument, weight)
    if fc1_weight.dim() != 2 or fc1_weight.shape[0] == 0:
        arguments.wrong_value(operator, "fc1_weight", f"shape (K, {channels})", f"shape {tuple(fc1_weight.shape)}")
    hidden = fc1_weight.shape[0]
    arguments.check_shape(operator, "norm_weight", norm_weight, (channels,))
    arguments.check_shape(operator, "norm_bias", norm_bias, (channels,))
    arguments.check_shape(operator, "fc1_weight", fc1_weight, (hidden, channels))
    arguments.check_shape(operator, "fc1_bias", fc1_bias, (hidden,))
    arguments.check_shape(operator, "grn_weight", grn_weight, (hidden,))
    arguments.check_shape(operator, "grn_bias", grn_bias, (hidden,))
    if (grn_weight is None) != (grn_bias is None):
        missing = "grn_weight" if grn_weight is None else "grn_bias"
        arguments.wrong_value(operator, missing, "both of grn_weight and grn_bias, or neither", None)
    arguments.check_shape(operator, "fc2_weight", fc2_weight, (channels, hidden))
    arguments.check_shape(operator, "fc2_bias", fc2_bias, (channels,))
    arguments.check_shape(operator, "layer_scale", layer_scale, (channels,))
    arguments.check_shape(operator, "sample_scale", sample_scale, (samples,))
    arguments.check_eps(operator, eps)
    arguments.check_approximate(operator, approximate)


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
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    approximate: str = "none",
    recompute: bool = True,
) -> Tensor:
    """residual + sample_scale * layer_scale * (GRN(GELU(LayerNorm(z) W1^T + b1)) W2^T + b2).

    Args:
        z: (N, ..., C); fp32, fp64, fp16 or bf16. GRN's norms run over everything between N and C.
        residual: z's shape, or None.
        norm_weight, norm_bias: (C,), LayerNorm's, or None.
        fc1_weight, fc1_bias: (K, C) and (K,) or None.
        grn_weight, grn_bias: (K,) each (ConvNeXt V2), or both None.
        fc2_weight, fc2_bias: (C, K) and (C,) or None.
        layer_scale: (C,) or None.
        sample_scale: (N,), the drop-path vector: 0 where a sample is dropped, else usually 1 / keep; or None. Dropped
            samples cost next to nothing and contribute to no gradient. It gets no gradient itself.
        eps: LayerNorm's, at least 0.
        approximate: GELU's form, 'none' (exact) or 'tanh'.
        recompute: compute the hidden tensor again in backward. False keeps it: 4 C more values a row at K = 4 C.

    Returns:
        z's shape; in the dtype that eager PyTorch gives: residual's, promoted with the branch's and layer_scale's.

    Raises:
        TypeError: not a tensor, an unsupported dtype, or parameters of another dtype outside autocast.
        ValueError: a wrong rank, shape, eps, device, or `approximate`.

    Source: ConvNeXt (arXiv:2201.03545), sections 2.4 and 2.6; ConvNeXt V2 (arXiv:2301.00808), section 4.
    """
    name = "layer_norm_mlp"
    arguments.check_tensor(name, "z", z)
    if z.dim() < 2 or z.shape[-1] == 0:
        arguments.wrong_value(name, "z", "a tensor (N, ..., C) with C of at least 1", f"shape {tuple(z.shape)}")
    parameters = {
        "norm_weight": norm_weight,
        "norm_bias": norm_bias,
        "fc1_weight": fc1_weight,
        "fc1_bias": fc1_bias,
        "grn_weight": grn_weight,
        "grn_bias": grn_bias,
        "fc2_weight": fc2_weight,
        "fc2_bias": fc2_bias,
        "layer_scale": layer_scale,
    }
    check_mlp(name, z.shape[-1], z.shape[0], **parameters, sample_scale=sample_scale, eps=eps, approximate=approximate)
    arguments.check_shape(name, "residual", residual, tuple(z.shape))
    arguments.check_device(name, z, residual=residual, sample_scale=sample_scale, **parameters)
    autocast = arguments.autocast_dtype(z)
    arguments.check_dtypes(name, z.dtype, autocast is not None, residual=residual, **parameters)
    compute = autocast or z.dtype
    out_dtype = branch_dtype(compute, layer_scale)
    if residual is not None:
        out_dtype = torch.promote_types(residual.dtype, out_dtype)
        residual = residual.contiguous()
    if sample_scale is not None:
        sample_scale = sample_scale.detach().to(accumulation_dtype(compute)).contiguous()
    return torch.ops.convnext_kernels.layer_norm_mlp(
        z.to(compute).contiguous(),
        residual,
        *parameters.values(),
        sample_scale,
        eps,
        approximate,
        out_dtype,
        not recompute,
    )[0]


def branch_dtype(compute: torch.dtype, layer_scale: Tensor | None) -> torch.dtype:
    """The dtype eager's branch has before the residual sum: layer scale promotes it."""
    return compute if layer_scale is None else torch.promote_types(compute, layer_scale.dtype)
