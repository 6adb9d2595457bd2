"""What layer_norm_mlp's backward does to the parameters: the weights of its products before, their gradients after.

A launch takes microseconds of the host and of the GPU, however little it does: what waits for nothing in between is
one. Sums are in a fixed order.
"""

import triton
import triton.language as tl

from .device import load_columns

__all__ = ["fold_weights_kernel", "parameter_gradients_kernel"]


# --- the weights of the products. A factor in front of a row or column of a weight goes into the weight; in fp16
#     divided by the largest factor: it would lose a layer scale of 1e-6, which training starts with, below its least
#     number; beside the largest it loses only what does not count. The product's fp32 result is multiplied by it.


@triton.jit
def _largest(scale, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """max |scale|, or 1 where that is 0 or not finite."""
    index = tl.arange(0, BLOCK)
    largest = tl.max(tl.abs(tl.load(scale + index, mask=index < COUNT, other=0.0).to(tl.float32)), 0)
    return tl.where((largest > 1e-30) & (largest < 1e30), largest, 1.0)


@triton.jit
def _fold_norm(
    tile, weight, bias, norm_weight, norm_bias, folded, factor, folded_bias,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    hidden = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.arange(0, COLUMNS)
    mask = (hidden < K)[:, None] & (channel < C)[None, :]
    offset = hidden[:, None] * C + channel[None, :]
    values = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32)
    shift = tl.zeros((BLOCK_K,), tl.float32)
    if bias is not None:
        shift = tl.load(bias + hidden, mask=hidden < K, other=0.0).to(tl.float32)
    if norm_bias is not None:
        shift += tl.sum(values * load_columns(norm_bias, 0, COLUMNS, C), 1)
    tl.store(folded_bias + hidden, shift, mask=hidden < K)
    if norm_weight is not None:
        scale = load_columns(norm_weight, 0, COLUMNS, C)
        if factor is not None:
            largest = _largest(norm_weight, C, COLUMNS)
            if tile == 0:
                tl.store(factor, largest)
            scale = scale / largest
        values *= scale
    tl.store(folded + offset, values.to(folded.dtype.element_ty), mask=mask)


@triton.jit
def _fold_layer_scale(
    tile, weight, layer_scale, folded, factor,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    channel = tile // tiles_k * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (channel < C)[:, None] & (column < K)[None, :]
    offset = channel[:, None] * K + column[None, :]
    scale = tl.load(layer_scale + channel, mask=channel < C, other=0.0).to(tl.float32)
    if factor is not None:
        largest = _largest(layer_scale, C, COLUMNS)
        if tile == 0:
            tl.store(factor, largest)
        scale = scale / largest
    values = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(folded + offset, values.to(folded.dtype.element_ty), mask=mask)


@triton.jit
def fold_weights_kernel(
    fc1_weight, fc1_bias, norm_weight, norm_bias, folded_fc1, fc1_factor, folded_bias,
    fc2_weight, layer_scale, folded_fc2, fc2_factor,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, FC1_TILES: tl.constexpr, FC1_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm's affine part in the product after it: folded_fc1 (K, C) = fc1_weight * norm_weight / fc1_factor in the
    compute dtype, fc1_factor (1) = max |norm_weight|, folded_bias (K) = fc1_bias + fc1_weight norm_bias in fp32. And
    layer scale in the product before it: folded_fc2 (C, K) = layer_scale / fc2_factor * fc2_weight, fc2_factor (1) =
    max |layer_scale|. A factor that is None is 1.

    Without FC1_TILES, or without a layer_scale, only the other. C K (E + the bytes of a weight) bytes for each.
    """
    tile = tl.program_id(0)
    if tile < FC1_TILES:
        if folded_fc1 is not None:
            _fold_norm(
                tile, fc1_weight, fc1_bias, norm_weight, norm_bias, folded_fc1, fc1_factor, folded_bias, C, K, COLUMNS,
                FC1_ROWS,
            )  # fmt: skip
    else:
        if folded_fc2 is not None:
            _fold_layer_scale(
                tile - FC1_TILES, fc2_weight, layer_scale, folded_fc2, fc2_factor, C, K, COLUMNS, BLOCK_C, BLOCK_K
            )


# --- from parts to results


@triton.jit
def _sum_splits(parts, offset, mask, splits, SIZE: tl.constexpr):
    """The sum over parts (splits, SIZE) of the values at `offset`; eight loads wait for memory together."""
    total = tl.load(parts + offset, mask=mask, other=0.0)
    for first in range(1, splits, 8):
        for i in tl.static_range(8):
            split = first + i
            pointers = parts + tl.cast(split, tl.int64) * SIZE + offset
            total += tl.load(pointers, mask=mask & (split < splits), other=0.0)
    return total


@triton.jit
def _fc1_gradients(
    tile, parts, grad_bias, fc1_weight, norm_weight, norm_bias, grad_weight, norm_weight_parts, norm_bias_parts, splits,
    C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    tiles_c: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    tile_k, first = tile // tiles_c, tile % tiles_c * BLOCK_C
    k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    c = first + tl.arange(0, BLOCK_C)
    mask = (k < K)[:, None] & (c < C)[None, :]
    offset = k[:, None] * C + c[None, :]
    if grad_bias is not None:
        bias = tl.load(grad_bias + k, mask=k < K, other=0.0)[:, None]
    if parts is not None:
        total = _sum_splits(parts, offset, mask, splits, C * K)
        if grad_weight is not None:
            gradient = total
            if norm_weight is not None:
                gradient = total * load_columns(norm_weight, first, BLOCK_C, C)
            if norm_bias is not None:
                gradient += load_columns(norm_bias, first, BLOCK_C, C) * bias
            tl.store(grad_weight + offset, gradient, mask=mask)
    if norm_weight_parts is not None or norm_bias_parts is not None:
        weight = tl.load(fc1_weight + offset, mask=mask, other=0.0).to(tl.float32)
        if norm_weight_parts is not None:
            tl.store(norm_weight_parts + tile_k * C + c, tl.sum(weight * total, 0), mask=c < C)
        if norm_bias_parts is not None:
            tl.store(norm_bias_parts + tile_k * C + c, tl.sum(weight * bias, 0), mask=c < C)


@triton.jit
def _fc2_gradients(
    channel, parts, branch_sums, fc2_weight, fc2_bias, layer_scale, grad_weight, grad_bias, grad_layer_scale, splits,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if layer_scale is not None:
        scale = tl.load(layer_scale + channel).to(tl.float32)
    if parts is not None:
        dot = tl.zeros((COLUMNS,), tl.float32)
        for k in range(0, K, COLUMNS):
            column = k + tl.arange(0, COLUMNS)
            mask = column < K
            offset = channel * K + column
            total = _sum_splits(parts, offset, mask, splits, C * K)
            if grad_layer_scale is not None:
                dot += total * tl.load(fc2_weight + offset, mask=mask, other=0.0).to(tl.float32)
            if grad_weight is not None:
                gradient = total
                if layer_scale is not None:
                    gradient = total * scale
                tl.store(grad_weight + offset, gradient, mask=mask)
    if branch_sums is not None:
        branch_sum = tl.load(branch_sums + channel)
        if grad_bias is not None:
            tl.store(grad_bias + channel, branch_sum * scale)
    if grad_layer_scale is not None:
        gradient = tl.sum(dot, 0)
        if fc2_bias is not None:
            gradient += tl.load(fc2_bias + channel).to(tl.float32) * branch_sum
        tl.store(grad_layer_scale + channel, gradient)


@triton.jit(do_not_specialize=["splits"])
def parameter_gradients_kernel(
    fc1_parts, fc1_bias_sums, fc1_weight, norm_weight, norm_bias, grad_fc1_weight, norm_weight_parts, norm_bias_parts,
    fc2_parts, branch_sums, fc2_weight, fc2_bias, layer_scale, grad_fc2_weight, grad_fc2_bias, grad_layer_scale, splits,
    C: tl.constexpr, K: tl.constexpr, FC1_TILES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """What LayerNorm's affine part is folded into: from T = dh^T hat, the sum of fc1_parts (splits, K, C), and db1,
    fc1_bias_sums (K),

    dW1_kc = norm_weight_c T_kc + norm_bias_c db1_k;  the norm's parts (tiles of K, C) get the sums over a tile's k of
    W1_kc T_kc and of W1_kc db1_k, for the gradients of norm_weight and norm_bias: sum_r da_rc hat_rc and sum_r da_rc
    with da = dh W1 and the sum over r done first.

    What layer scale's channel j multiplies: from G = u^T g, the sum of fc2_parts (splits, C, K), and branch_sums (C) =
    sum u, a program for each j,

    dW2_j = layer_scale_j G_j,  db2_j = layer_scale_j sum u_j,  dlayer_scale_j = W2_j . G_j + b2_j sum u_j.

    What is not needed may be None, and FC1_TILES 0; all sums are fp32. A gradient may be its parts, of one split: no
    two threads may have the same element then, so COLUMNS and BLOCK_K * BLOCK_C are no less than the threads.
    4 C K (splits + 2) bytes for each of the weights.
    """
    program = tl.program_id(0)
    if program < FC1_TILES:
        if FC1_TILES > 0:
            _fc1_gradients(
                program, fc1_parts, fc1_bias_sums, fc1_weight, norm_weight, norm_bias, grad_fc1_weight,
                norm_weight_parts, norm_bias_parts, splits, C, K, BLOCK_K, BLOCK_C,
            )  # fmt: skip
    else:
        _fc2_gradients(
            program - FC1_TILES, fc2_parts, branch_sums, fc2_weight, fc2_bias, layer_scale, grad_fc2_weight,
            grad_fc2_bias, grad_layer_scale, splits, C, K, COLUMNS,
        )  # fmt: skip
