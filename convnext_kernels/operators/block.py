"""The whole ConvNeXt block as one operator with one autograd.Function.

Saved for backward: x and the convolution's output z in the compute dtype, mean and rstd of each row, the drop-path
vector, and the parameters themselves: 2 * sizeof(dtype) + 8 / C + 4 / (H W C) bytes an input element, 4.1 in bf16 at
C = 96. `recompute=False` keeps the hidden tensor too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..reference_backend import accumulation_dtype
from . import _arguments as arguments
from ._registration import composed, dense_channels_last, differentiate, differentiate_once, fake
from .depthwise_conv import check_convolution, strided_as
from .mlp import branch_dtype, check_mlp, dtypes_of, mask_of, parameter_grads

__all__ = ["ConvNeXtBlockFunction", "convnext_block"]


def _split_backend(arguments: tuple[Any, ...], without: int) -> tuple[tuple[Any, ...], Callable[..., Any]]:
    """The arguments without the last, `backend`, and what calls an operator in that; the dispatcher drops defaults."""
    backend = arguments[without] if len(arguments) > without else None
    return arguments[:without], backends.call_in(backend)


def _forward(
    x: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    # mlp: the arguments of layer_norm_mlp from norm_weight to approximate.
    (*mlp, compute_dtype, out_dtype, recompute), call = _split_backend(rest, 15)
    sample_scale = mlp[-3]
    # x itself is saved where it is in the compute dtype; a result may not alias an argument, hence the empty tensor.
    if x.dtype == compute_dtype:
        x_copy, z = x.new_empty((0,)), call("depthwise_conv2d", x, conv_weight, conv_bias, 1, sample_scale)
    else:
        z, x_copy = call("depthwise_conv2d_cast", x, conv_weight, conv_bias, compute_dtype, sample_scale)
    y, mean, rstd, hidden = call(
        "layer_norm_mlp", z.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1), *mlp, out_dtype, not recompute
    )
    # No view, as autograd has it: a view that is one of several results could not be changed in place.
    with torch._C._ExcludeDispatchKeyGuard(_VIEW_TRACKING):
        y = y.permute(0, 3, 1, 2)
    return y, x_copy, z, mean, rstd, hidden


_VIEW_TRACKING = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)


@fake("convnext_block")
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    fc1_weight, (compute_dtype, out_dtype, recompute) = rest[4], rest[14:17]
    n, _, h, w = x.shape
    statistics = accumulation_dtype(compute_dtype)
    return (
        dense_channels_last(x, x.shape, out_dtype),
        x.new_empty((0,)) if x.dtype == compute_dtype else dense_channels_last(x, x.shape, compute_dtype),
        dense_channels_last(x, x.shape, compute_dtype),
        x.new_empty((n, h, w), dtype=statistics),
        x.new_empty((n, h, w), dtype=statistics),
        x.new_empty((0,) if recompute else (n, h, w, fc1_weight.shape[0]), dtype=compute_dtype),
    )


def block_mask(output_mask: int) -> tuple[int, int, int]:
    """Of convnext_block_backward's mask: whether x and the convolution need gradients; layer_norm_mlp_backward's mask.

    Bits 0 to 2: x, convolution weight and bias, all of which need the gradient of z; then the MLP's parameters.
    """
    return output_mask & 1, output_mask & 0b110, (output_mask >> 3 << 1) | (1 if output_mask & 0b111 else 0)


def _backward(
    grad: Tensor,
    x: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    conv_weight: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    # mlp: the arguments of layer_norm_mlp_backward from norm_weight to approximate.
    (*mlp, x_dtype, output_mask), call = _split_backend(rest, 13)
    sample_scale = mlp[-2]
    needs_x, needs_conv, mlp_mask = block_mask(output_mask)
    dz, *dparameters = call(
        "layer_norm_mlp_backward",
        grad.permute(0, 2, 3, 1),
        z.permute(0, 2, 3, 1),
        mean,
        rstd,
        hidden,
        *mlp,
        mlp_mask,
    )
    dtype = accumulation_dtype(z.dtype)
    dx, dweight, dbias = (z.new_empty((0,), dtype=dtype) for _ in range(3))
    if needs_x or needs_conv:
        dz = dz.permute(0, 3, 1, 2)
    if needs_x:
        dx = call("depthwise_conv2d_input_grad", dz, conv_weight, grad, 1, [0, 0], sample_scale).to(x_dtype)
    if needs_conv:
        dweight, dbias = call("depthwise_conv2d_weight_grad", dz, x, conv_weight.shape[-1], 1, sample_scale)
    return dx, dweight, dbias, *dparameters


@fake("convnext_block_backward")
def _(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    z, conv_weight, (x_dtype, output_mask) = rest[0], rest[4], rest[16:18]
    dtype = accumulation_dtype(z.dtype)
    channels = conv_weight.shape[0]

    def empty(shape: Any) -> Tensor:
        return grad.new_empty(shape, dtype=dtype)

    needs_conv = output_mask & 0b110
    return (
        dense_channels_last(grad, grad.shape, x_dtype) if output_mask & 1 else empty((0,)),
        empty(conv_weight.shape if needs_conv else (0,)),
        empty((channels,) if needs_conv else (0,)),
        *(
            empty(parameter.shape if parameter is not None and output_mask >> i & 1 else (0,))
            for i, parameter in enumerate(rest[5:14], start=3)
        ),
    )


# The composition serves every device: what differs is chosen inside, operator by operator.
_run_forward = composed("convnext_block", _forward)
_run_backward = composed("convnext_block_backward", _backward)


class ConvNeXtBlockFunction(torch.autograd.Function):
    """One node for the block. Arguments and results are those of the raw operator.

    x_copy and z, kept for the backward pass, are differentiable results too. That way what is saved stays connected to
    the inputs, so that a double backward reaches the error of the backward operator instead of a silent None.
    """

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return _run_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, conv_weight, conv_bias, *parameters, sample_scale = inputs[:13]
        _, x_copy, z, mean, rstd, hidden = output
        ctx.approximate = inputs[14]
        ctx.backend = inputs[18] if len(inputs) > 18 else None
        ctx.not_differentiable = len(inputs) - 12
        ctx.x_dtype = x.dtype
        ctx.dtypes = dtypes_of((conv_weight, conv_bias, *parameters))
        ctx.mark_non_differentiable(mean, rstd, hidden)
        # The public function drops every result but the first: no zeros in place of their gradients.
        ctx.set_materialize_grads(False)
        saved_x = x if x.dtype == z.dtype else x_copy
        ctx.save_for_backward(saved_x, z, mean, rstd, hidden, sample_scale, conv_weight, *parameters)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_x_copy: Tensor | None, grad_z: Tensor | None, *_: Any
    ) -> tuple[Tensor | None, ...]:
        x, z, mean, rstd, hidden, sample_scale, conv_weight, *parameters = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad[:12]
        dx, dparameters = None, [None] * len(needs)
        if grad is not None:
            dx, *dparameters = torch.ops.convnext_kernels.convnext_block_backward(
                grad.contiguous(memory_format=torch.channels_last),
                x,
                z,
                mean,
                rstd,
                hidden,
                conv_weight,
                *parameters,
                sample_scale,
                ctx.approximate,
                ctx.x_dtype,
                mask_of((needs_x, *needs)),
                ctx.backend,
            )
        if grad_z is not None:
            grad_z = grad_z.contiguous(memory_format=torch.channels_last)
            from_z = torch.ops.convnext_kernels.depthwise_conv2d_input_grad(
                grad_z, conv_weight, None, 1, [0, 0], sample_scale
            )
            dx = _sum(dx, from_z.to(ctx.x_dtype))
            from_z = torch.ops.convnext_kernels.depthwise_conv2d_weight_grad(
                grad_z, x, conv_weight.shape[-1], 1, sample_scale
            )
            dparameters[:2] = [_sum(total, more) for total, more in zip(dparameters[:2], from_z, strict=True)]
        if grad_x_copy is not None and x.dtype != ctx.x_dtype:
            dx = _sum(dx, grad_x_copy.to(ctx.x_dtype))
        if needs[0] and dparameters[0] is not None:
            dparameters[0] = strided_as(conv_weight, dparameters[0])
        return (
            dx if needs_x else None,
            *parameter_grads(ctx.dtypes, dparameters, needs),
            *(None,) * ctx.not_differentiable,
        )


def _sum(total: Tensor | None, more: Tensor) -> Tensor:
    """`total + more`, where `total` may be absent: None, or the empty tensor of a gradient not asked for."""
    return more if total is None or total.numel() == 0 else total + more


differentiate("convnext_block", ConvNeXtBlockFunction, _run_forward)
differentiate_once("convnext_block_backward", _run_backward)


def convnext_block(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
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
    backend: str | None = None,
) -> Tensor:
    """A ConvNeXt V1 or V2 block: x + sample_scale * layer_scale * MLP(LayerNorm(depthwise_conv2d(x))).

    Args:
        x: (N, C, H, W), N >= 0, C, H, W >= 1; fp32, fp64, fp16 or bf16. Channels-last memory is read as it is; any
            other layout is copied once.
        conv_weight, conv_bias: (C, 1, k, k) with k of 3, 5, 7, 9 or 11, and (C,) or None.
        norm_weight, norm_bias: (C,), LayerNorm's, or None.
        fc1_weight, fc1_bias: (K, C), or (K, C, 1, 1) of a 1x1 convolution, and (K,) or None.
        grn_weight, grn_bias: K values each in any shape (ConvNeXt V2), or both None.
        fc2_weight, fc2_bias: (C, K), or (C, K, 1, 1), and (C,) or None.
        layer_scale: C values in any shape, or None.
        sample_scale: (N,), the drop-path vector: 0 where a sample is dropped, else usually 1 / keep; or None. It gets
            no gradient.
        eps: LayerNorm's, at least 0.
        approximate: GELU's form, 'none' (exact) or 'tanh'.
        recompute: compute the hidden tensor again in backward. False keeps it: 4 C more values a pixel at K = 4 C.
        backend: what runs it, forward and backward (:mod:`convnext_kernels.backends`); None follows ``use_backend`` and
            CONVNEXT_KERNELS_BACKEND at each call.

    Returns:
        x's shape in channels-last memory, in the dtype eager PyTorch gives. Under autocast the branch is computed in
        the autocast dtype and the residual sum in x's dtype promoted with layer_scale's.

    Raises:
        TypeError: not a tensor, an unsupported dtype, or parameters of another dtype outside autocast.
        ValueError: a wrong rank, shape, kernel size, eps, device, `approximate`, or `backend`.
        RuntimeError: the forced backend cannot run it; or a double backward, which is not supported.

    Source: ConvNeXt (arXiv:2201.03545), figure 4 and sections 2.4 to 2.6; ConvNeXt V2 (arXiv:2301.00808), section 4.
    """
    name = "convnext_block"
    check_convolution(name, x, conv_weight, conv_bias, 1, prefix="conv_")
    if not isinstance(recompute, bool):
        arguments.wrong_type(name, "recompute", "a bool", type(recompute).__name__)
    parameters = mlp_parameters(
        name, norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias, layer_scale
    )
    check_mlp(name, x.shape[1], x.shape[0], **parameters, sample_scale=sample_scale, eps=eps, approximate=approximate)
    convolution = {"conv_weight": conv_weight, "conv_bias": conv_bias}
    arguments.check_device(name, x, **convolution, **parameters, sample_scale=sample_scale)
    if backend is not None:
        backends.checked(backend, f"{name}: argument 'backend'")
    autocast = arguments.autocast_dtype(x)
    arguments.check_dtypes(name, x.dtype, autocast is not None, **convolution, **parameters)
    compute = autocast or x.dtype
    out_dtype = torch.promote_types(x.dtype, branch_dtype(compute, layer_scale))
    if sample_scale is not None:
        sample_scale = sample_scale.detach().to(accumulation_dtype(compute)).contiguous()
    return torch.ops.convnext_kernels.convnext_block(
        x.contiguous(memory_format=torch.channels_last),
        conv_weight,
        conv_bias,
        *parameters.values(),
        sample_scale,
        eps,
        approximate,
        compute,
        out_dtype,
        recompute,
        backend,
    )[0]


_MLP_PARAMETERS = (
    *("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "grn_weight", "grn_bias", "fc2_weight", "fc2_bias"),
    "layer_scale",
)
_MATRICES, _VECTORS = ("fc1_weight", "fc2_weight"), ("grn_weight", "grn_bias", "layer_scale")


def mlp_parameters(operator: str, *parameters: Tensor | None) -> dict[str, Tensor | None]:
    """A block's parameters, from norm_weight to layer_scale, as layer_norm_mlp takes them: by name and in order."""
    named = dict(zip(_MLP_PARAMETERS, parameters, strict=True))
    # What is reshaped is checked here; the rest with the sizes.
    for name in _MATRICES:
        arguments.check_tensor(operator, name, named[name])
        named[name] = _matrix(named[name])
    for name in _VECTORS:
        if named[name] is not None:
            arguments.check_tensor(operator, name, named[name])
            named[name] = named[name].flatten()
    return named


def _matrix(weight: Tensor) -> Tensor:
    """(K, C) from a linear layer's weight or a 1x1 convolution's."""
    return weight.flatten(1) if weight.dim() == 4 and weight.shape[2:] == (1, 1) else weight
