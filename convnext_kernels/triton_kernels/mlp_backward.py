"""layer_norm_mlp_backward in Triton: what is computed, in which order, and the operator. mlp_backward_call.py runs a
call; the kernels are in mlp_backward_products.py (matrix products), mlp_backward_rows.py (products of whole rows),
mlp_backward_passes.py (rows without a product) and mlp_backward_weights.py (the parameters, before and after).

With hat = (z - mean) rstd, omega and theta LayerNorm's weight and bias, s the sample scale, gamma the layer scale and
u = s dY, of every live row r, in the order it is computed:

    hat,  u                                                 pass, gathers the live rows
    h = hat (W1 omega)^T + (b1 + W1 theta),  dg = u (gamma W2)   products, one loop over C
    g = GELU(h),  dh = dg GELU'(h)                          in their epilogue
      with GRN: sums over the image in the epilogue, the image's factors, then g' = GRN(g) and dh in a pass
    G = u^T g,  T = dh^T hat,  db1 = sum_r dh               products, fp32; the last beside T, from the same dh
    dhat = dh (W1 omega),  dz = LayerNorm's backward        product; in its epilogue where a row fits the registers
    (up to 128 channels, without GRN, one kernel makes all of hat, u, g, dh and dz, before G and T)
    dW1_kc = omega_c T_kc + theta_c db1_k,  domega_c = sum_k W1_kc T_kc,  dtheta_c = sum_k W1_kc db1_k
    dW2_jk = gamma_j G_jk,  dgamma_j = sum_k W2_jk G_jk + b2_j sum_r u_rj,  db2_j = gamma_j sum_r u_rj

So LayerNorm's affine part and the layer scale are in the weights of the products, and their gradients come from the
fp32 sums T and G: neither the branch's output nor da is needed for them, row by row. (domega = sum_r da hat with
da = dh W1: the sum over r is done first.) u is rounded without gamma, so that dgamma keeps its digits; in fp16 it
overflows where s dY does, beyond 65504.

Rows go through in chunks whose hat, u, g and dh fit the workspace (with GRN whole images, at least one). The live
samples come first in the order of rows, the kernels read their number on the device: tiles beyond it end at once. Sums
over rows are parts in memory, each written by one program at a time, and added up in a fixed order: no atomics.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from . import launch
from .mlp_backward_call import MlpBackward
from .mlp_backward_config import WORKSPACE_BYTES

__all__ = ["WORKSPACE_BYTES", "layer_norm_mlp_backward", "why_not"]

_OPERATOR = "layer_norm_mlp_backward"

_PARAMETERS = (
    "norm_weight",
    "norm_bias",
    "fc1_weight",
    "fc1_bias",
    "grn_weight",
    "grn_bias",
    "fc2_weight",
    "fc2_bias",
    "layer_scale",
)


# --- the operator


def why_not(operator: str, *arguments: Any) -> str | None:
    """Why these arguments cannot be taken, dtype and device apart; None where they can."""
    return launch.why_not_mlp(operator, arguments[1], arguments[7])


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
    *,
    workspace_bytes: int | None = None,
) -> tuple[Tensor, ...]:
    """The raw operator: the gradients of z and of the nine parameters; an empty tensor where none was asked for.

    Args:
        grad: (N, ..., C), fp32, fp16 or bf16. z: the same shape, fp32, fp16 or bf16: the compute dtype.
        mean, rstd: (N, ...) fp32. hidden: (N, ..., K) in the compute dtype, or (0,): h is computed again.
        sample_scale: (N,) fp32. The parameters may be of any of the dtypes. C and K are multiples of 8.
        workspace_bytes: what buffers and parts may take together (with GRN at least an image's rows); by default what
            the configuration says, at most WORKSPACE_BYTES.

    Raises:
        RuntimeError: an argument that the kernels cannot take, by name.
    """
    parameters = (norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias, layer_scale)
    _check(grad, z, mean, rstd, hidden, parameters, sample_scale, approximate, output_mask)
    exists = [True, *(parameter is not None for parameter in parameters)]
    wanted = [there and bool(output_mask >> i & 1) for i, there in enumerate(exists)]
    results = [
        z.new_empty(like.shape if want else (0,), dtype=z.dtype if want and i == 0 else torch.float32)
        for i, (like, want) in enumerate(zip((z, *parameters), wanted))
    ]
    if mean.numel() == 0:
        for result in results:
            result.zero_()
    elif any(wanted):
        with launch.device_guard(z):
            MlpBackward(grad, z, mean, rstd, hidden, *parameters, sample_scale, approximate, wanted, results).run(
                workspace_bytes
            )
    return tuple(results)


def _check(
    grad: Tensor,
    z: Tensor,
    mean: Tensor,
    rstd: Tensor,
    hidden: Tensor,
    parameters: tuple[Tensor | None, ...],
    sample_scale: Tensor | None,
    approximate: str,
    output_mask: int,
) -> None:
    fail = functools.partial(launch.fail, _OPERATOR)
    if z.dim() < 2:
        fail("z", "a tensor of rank 2 or more", f"rank {z.dim()}")
    fc1_weight = parameters[2]
    if fc1_weight is None or fc1_weight.dim() != 2:
        fail("fc1_weight", "a tensor of rank 2", "another")
    c, k = z.shape[-1], fc1_weight.shape[0]
    shapes = [(c,), (c,), (k, c), (k,), (k,), (k,), (c, k), (c,), (c,)]
    expected = {name: (parameter, shape) for name, parameter, shape in zip(_PARAMETERS, parameters, shapes)}
    expected |= {"grad": (grad, z.shape), "mean": (mean, z.shape[:-1]), "rstd": (rstd, z.shape[:-1])}
    expected["sample_scale"] = sample_scale, z.shape[:1]
    if hidden.dim() != 1:
        expected["hidden"] = hidden, (*z.shape[:-1], k)
    launch.check_tensors(_OPERATOR, "z", z=z, **{name: tensor for name, (tensor, _) in expected.items()})
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            fail(name, f"shape {tuple(shape)}", f"shape {tuple(tensor.shape)}")
    for name, tensor in {"mean": mean, "rstd": rstd, "sample_scale": sample_scale}.items():
        if tensor is not None and tensor.dtype != torch.float32:
            fail(name, "dtype float32", tensor.dtype)
    if hidden.dtype != z.dtype:
        fail("hidden", f"dtype {z.dtype}", hidden.dtype)
    if (parameters[4] is None) != (parameters[5] is None):
        fail("grn_weight", "both of grn_weight and grn_bias, or neither", "one")
    if approximate not in ("none", "tanh"):
        fail("approximate", "'none' or 'tanh'", repr(approximate))
    if output_mask < 0 or output_mask >> 10:
        fail("output_mask", "bits 0 to 9", output_mask)
    launch.check_mlp(_OPERATOR, z, fc1_weight)
