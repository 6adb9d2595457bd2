"""The passes around the matrix products of layer_norm_mlp's backward: elementwise work and sums in a fixed order.

P is the number of live rows, E the bytes of an element of the compute dtype, E_grad of the gradient that came.
"""

import triton
import triton.language as tl

from .device import gelu_and_derivative, live_rows, load_columns, row_position
from .mlp_backward_products import norm_sums, store_dz

__all__ = [
    "column_sums_kernel",
    "fc1_gradients_kernel",
    "fc2_gradients_kernel",
    "fold_layer_scale_kernel",
    "fold_norm_kernel",
    "grn_activation_kernel",
    "grn_factors_kernel",
    "norm_backward_kernel",
    "prepare_kernel",
]


# --- the weights of the products. A factor in front of a row or column of a weight goes into the weight, divided by the
#     largest factor: fp16 would lose a layer scale of 1e-6, which training starts with, below its least number; beside
#     the largest it loses only what does not count. The product's fp32 result is multiplied by the largest.


@triton.jit
def _largest(scale, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """max |scale|, or 1 where that is 0 or not finite."""
    index = tl.arange(0, BLOCK)
    largest = tl.max(tl.abs(tl.load(scale + index, mask=index < COUNT, other=0.0).to(tl.float32)), 0)
    return tl.where((largest > 1e-30) & (largest < 1e30), largest, 1.0)


@triton.jit
def fold_layer_scale_kernel(
    weight, layer_scale, folded, factor,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """folded (C, K) = layer_scale / factor * weight in the compute dtype, factor (1) = max |layer_scale|.

    C K (E + the bytes of a weight) bytes.
    """
    largest = _largest(layer_scale, C, COLUMNS)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(factor, largest)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (channel < C)[:, None] & (column < K)[None, :]
    offset = channel[:, None] * K + column[None, :]
    scale = tl.load(layer_scale + channel, mask=channel < C, other=0.0).to(tl.float32) / largest
    values = tl.load(weight + offset, mask=mask, other=0.0).to(tl.float32) * scale[:, None]
    tl.store(folded + offset, values.to(folded.dtype.element_ty), mask=mask)


@triton.jit
def fold_norm_kernel(
    weight, bias, norm_weight, norm_bias, folded, factor, folded_bias,
    C: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm's affine part in the product after it: folded (K, C) = weight * norm_weight / factor in the compute
    dtype, factor (1) = max |norm_weight|, folded_bias (K) = bias + weight norm_bias in fp32.

    C K (E + the bytes of a weight) bytes.
    """
    hidden = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
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
        largest = _largest(norm_weight, C, COLUMNS)
        if tl.program_id(0) == 0:
            tl.store(factor, largest)
        values *= load_columns(norm_weight, 0, COLUMNS, C) / largest
    tl.store(folded + offset, values.to(folded.dtype.element_ty), mask=mask)


# --- the rows of the products


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample", "accumulate"])
def prepare_kernel(
    z, mean, rstd, grad, sample_scale, order, live_count, hat, u, sum_parts, dz,
    first, rows, rows_per_sample, accumulate, C: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The live rows of a chunk, gathered: hat = (z - mean) rstd and u = sample_scale * grad.

    z, grad, dz (N, ..., C); hat, u (rows, C) in the compute dtype; sum_parts (tiles of rows, C) (+)= the sums of
    sample_scale * grad. Any of the three may be None. Dropped rows are not read; their dz, where given, becomes 0.

    P C (3 E + E_grad) bytes with all results; 3 FLOP an element.
    """
    tile = tl.program_id(0)
    live = live_rows(live_count, first, rows, rows_per_sample)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_live = (row < live)[:, None]
    sample, position = row_position(first + tl.minimum(row, rows - 1), order, rows_per_sample)
    place, packed = position[:, None] * C, row.to(tl.int64)[:, None] * C
    if hat is not None:
        centre = tl.load(mean + position, mask=row < live, other=0.0)[:, None]
        scale = tl.load(rstd + position, mask=row < live, other=0.0)[:, None]
    if sample_scale is not None:
        factor = tl.load(sample_scale + sample, mask=row < live, other=0.0)[:, None]
    for c in range(0, C, BLOCK_C):
        column = c + tl.arange(0, BLOCK_C)
        mask = is_live & (column < C)[None, :]
        if hat is not None:
            values = (tl.load(z + place + column[None, :], mask=mask, other=0.0).to(tl.float32) - centre) * scale
            tl.store(hat + packed + column[None, :], values.to(hat.dtype.element_ty), mask=mask)
        if u is not None or sum_parts is not None:
            values = tl.load(grad + place + column[None, :], mask=mask, other=0.0).to(tl.float32)
            if sample_scale is not None:
                values *= factor
            if u is not None:
                tl.store(u + packed + column[None, :], values.to(u.dtype.element_ty), mask=mask)
            if sum_parts is not None:
                part = sum_parts + tile.to(tl.int64) * C + column
                before = tl.load(part, mask=(column < C) & (accumulate != 0), other=0.0)
                tl.store(part, before + tl.sum(values, 0), mask=column < C)
        if dz is not None:
            dropped = (row >= live) & (row < rows)
            zeros = tl.zeros((BLOCK_M, BLOCK_C), dz.dtype.element_ty)
            tl.store(dz + place + column[None, :], zeros, mask=dropped[:, None] & (column < C)[None, :])


# --- GRN. Through N = G / (mean_k G + eps), which has G twice:
#       dG_k = dN_k / (mean + eps) - mean_j(dN_j G_j) / (mean + eps)^2,  dN_k = weight_k * sum over rows of dg' g,
#     and the gradient of g gets g dG / G, with 0 at G = 0 (as csrc/mlp/cpu_grn.h).


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample", "accumulate"])
def grn_factors_kernel(
    square_parts, product_parts, grad_parts, grn_weight, live_count, factors, feedback, weight_sums, bias_sums, first,
    rows, rows_per_sample, accumulate, K: tl.constexpr, EPS: tl.constexpr, PART_ROWS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One image: factors = 1 + weight * N and feedback = dG / G, (images, K), from the parts of its rows, PART_ROWS of
    them in a tile; part t + i is image i's in tile t. weight_sums, bias_sums (images, K) (+)= N * sum dg g, sum dg.

    What is not needed may be None. 12 K bytes a part.
    """
    image = tl.program_id(0)
    live = live_rows(live_count, first, rows, rows_per_sample)
    column = tl.arange(0, BLOCK_K)
    mask = column < K
    row = image.to(tl.int64) * K + column
    if image * rows_per_sample >= live:
        empty = mask & (accumulate == 0)
        if weight_sums is not None:
            tl.store(weight_sums + row, tl.zeros((BLOCK_K,), tl.float32), mask=empty)
        if bias_sums is not None:
            tl.store(bias_sums + row, tl.zeros((BLOCK_K,), tl.float32), mask=empty)
        return
    squares = tl.zeros((BLOCK_K,), tl.float32)
    products = tl.zeros((BLOCK_K,), tl.float32)
    grads = tl.zeros((BLOCK_K,), tl.float32)
    first_tile = image * rows_per_sample // PART_ROWS
    last_tile = ((image + 1) * rows_per_sample - 1) // PART_ROWS
    for tile in range(first_tile, last_tile + 1, PARTS):  # each turn waits for memory: PARTS tiles in one
        tiles = tile + tl.arange(0, PARTS)
        part = (tiles + image).to(tl.int64)[:, None] * K + column[None, :]
        inside = (tiles <= last_tile)[:, None] & mask[None, :]
        squares += tl.sum(tl.load(square_parts + part, mask=inside, other=0.0), 0)
        if product_parts is not None:
            products += tl.sum(tl.load(product_parts + part, mask=inside, other=0.0), 0)
            grads += tl.sum(tl.load(grad_parts + part, mask=inside, other=0.0), 0)
    weight = tl.load(grn_weight + column, mask=mask, other=0.0).to(tl.float32)
    norm = tl.sqrt_rn(squares)
    denominator = tl.sum(norm, 0) * (1.0 / K) + EPS
    response = norm / denominator
    tl.store(factors + row, 1.0 + weight * response, mask=mask)
    if feedback is not None:
        shared = tl.sum(weight * products * norm, 0) * (1.0 / K) / denominator
        gradient = (weight * products - shared) / denominator
        # A channel that is 0 in the whole image: no division, and no NaN from one.
        zero = norm == 0.0
        tl.store(feedback + row, tl.where(zero, 0.0, gradient / tl.where(zero, 1.0, norm)), mask=mask)
    if weight_sums is not None:
        before = tl.load(weight_sums + row, mask=mask & (accumulate != 0), other=0.0)
        tl.store(weight_sums + row, before + response * products, mask=mask)
    if bias_sums is not None:
        before = tl.load(bias_sums + row, mask=mask & (accumulate != 0), other=0.0)
        tl.store(bias_sums + row, before + grads, mask=mask)


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample", "accumulate", "segment_rows", "segments"])
def grn_activation_kernel(
    g, dh, factors, feedback, grn_bias, live_count, bias_parts, first, rows, rows_per_sample, accumulate,
    segment_rows, segments, K: tl.constexpr, STORE_G: tl.constexpr, TANH: tl.constexpr, CHEAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """In place of h and dg (rows, K): GRN(g) and dh = (dg * factors + g * feedback) * GELU'(h).

    A program takes a segment of an image's rows, of which an image has `segments`, by BLOCK_N columns; bias_parts
    (images * segments, K) (+)= its sums of dh. `dh` may be None. 4 P K E bytes; about 30 FLOP an element.
    """
    program, tile = tl.program_id(0), tl.program_id(1)
    live = live_rows(live_count, first, rows, rows_per_sample)
    image, segment = program // segments, program % segments
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < K
    begin = image * rows_per_sample + segment * segment_rows
    part = program.to(tl.int64) * K + column
    if begin >= live:
        if bias_parts is not None:
            empty = in_columns & (accumulate == 0)
            tl.store(bias_parts + part, tl.zeros((BLOCK_N,), tl.float32), mask=empty)
        return
    end = tl.minimum(begin + segment_rows, (image + 1) * rows_per_sample)
    of_image = image.to(tl.int64) * K + column
    factor = tl.load(factors + of_image, mask=in_columns, other=0.0)[None, :]
    shift = tl.load(grn_bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if dh is not None:
        back = tl.load(feedback + of_image, mask=in_columns, other=0.0)[None, :]
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(begin, end, BLOCK_M):
        row = r + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & in_columns[None, :]
        offset = row.to(tl.int64)[:, None] * K + column[None, :]
        h = tl.load(g + offset, mask=mask, other=0.0).to(tl.float32)
        activated, slope = gelu_and_derivative(h, TANH, CHEAP)
        if STORE_G:
            tl.store(g + offset, (activated * factor + shift).to(g.dtype.element_ty), mask=mask)
        if dh is not None:
            gradient = tl.load(dh + offset, mask=mask, other=0.0).to(tl.float32)
            gradient = (gradient * factor + activated * back) * slope
            tl.store(dh + offset, gradient.to(dh.dtype.element_ty), mask=mask)
            sums += tl.where(mask, gradient, 0.0)
    if bias_parts is not None:
        before = tl.load(bias_parts + part, mask=in_columns & (accumulate != 0), other=0.0)
        tl.store(bias_parts + part, before + tl.sum(sums, 0), mask=in_columns)


# --- LayerNorm's backward, where the product before it could not do it itself


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample"])
def norm_backward_kernel(
    s, z, mean, rstd, order, live_count, dz, first, rows, rows_per_sample,
    C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dz (N, ..., C) from s (rows, C), the gradient of hat. 3 P C E bytes; about 10 FLOP an element."""
    tile = tl.program_id(0)
    live = live_rows(live_count, first, rows, rows_per_sample)
    if tile * BLOCK_M >= live:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = (row < live)[:, None]
    _, position = row_position(first + tl.minimum(row, live - 1), order, rows_per_sample)
    centre, scale = tl.load(mean + position)[:, None], tl.load(rstd + position)[:, None]
    place, packed = position[:, None] * C, row.to(tl.int64)[:, None] * C
    c0 = tl.arange(0, C0)[None, :]
    s0 = tl.load(s + packed + c0, mask=inside & (c0 < C), other=0.0).to(tl.float32)
    total, product = norm_sums(s0, z, place, centre, scale, inside, C, 0, C0, C0)
    if C1 > 0:
        c1 = C0 + tl.arange(0, C1)[None, :]
        s1 = tl.load(s + packed + c1, mask=inside & (c1 < C), other=0.0).to(tl.float32)
        total1, product1 = norm_sums(s1, z, place, centre, scale, inside, C, C0, C1, C1)
        total += total1
        product += product1
    store_dz(s0, total, product, z, place, centre, scale, inside, dz, C, 0, C0, C0)
    if C1 > 0:
        store_dz(s1, total, product, z, place, centre, scale, inside, dz, C, C0, C1, C1)


# --- the end: from parts to results


@triton.jit(do_not_specialize=["count", "first"])
def column_sums_kernel(
    parts, result, count, first,
    COLUMNS: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """result (COLUMNS) = the sums over parts (count, STRIDE) of columns `first` and on, in the same order on every run.

    4 bytes a value.
    """
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    for begin in range(0, count, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)
        mask = (part < count)[:, None] & (column < COLUMNS)[None, :]
        sums += tl.load(parts + first + part.to(tl.int64)[:, None] * STRIDE + column[None, :], mask=mask, other=0.0)
    tl.store(result + column, tl.sum(sums, 0), mask=column < COLUMNS)


@triton.jit
def fc1_gradients_kernel(
    sums, grad_bias, fc1_weight, norm_weight, norm_bias, grad_weight, norm_parts,
    C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """What LayerNorm's affine part is folded into: from T = dh^T hat in fp32, `sums` (K, C), and db1, grad_bias (K),

    dW1_kc = norm_weight_c T_kc + norm_bias_c db1_k;  norm_parts (tiles of K, 2, C) get the sums over a tile's k of
    W1_kc T_kc and of W1_kc db1_k, the gradients of norm_weight and norm_bias: sum_r da_rc hat_rc and sum_r da_rc with
    da = dh W1 and the sum over r done first. What is not needed may be None; grad_weight may be `sums`.

    12 C K bytes.
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * BLOCK_C
    c = first + tl.arange(0, BLOCK_C)
    mask = (k < K)[:, None] & (c < C)[None, :]
    offset = k[:, None] * C + c[None, :]
    if grad_bias is not None:
        bias = tl.load(grad_bias + k, mask=k < K, other=0.0)[:, None]
    if sums is not None:
        total = tl.load(sums + offset, mask=mask, other=0.0)
        if grad_weight is not None:
            gradient = total
            if norm_weight is not None:
                gradient = total * load_columns(norm_weight, first, BLOCK_C, C)
            if norm_bias is not None:
                gradient += load_columns(norm_bias, first, BLOCK_C, C) * bias
            tl.store(grad_weight + offset, gradient, mask=mask)
    if norm_parts is not None:
        weight = tl.load(fc1_weight + offset, mask=mask, other=0.0).to(tl.float32)
        norm_part = norm_parts + tl.program_id(0) * (2 * C) + c
        if sums is not None:
            tl.store(norm_part, tl.sum(weight * total, 0), mask=c < C)
        if grad_bias is not None:
            tl.store(norm_part + C, tl.sum(weight * bias, 0), mask=c < C)


@triton.jit
def fc2_gradients_kernel(
    sums, branch_sums, fc2_weight, fc2_bias, layer_scale, grad_weight, grad_bias, grad_layer_scale,
    C: tl.constexpr, K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What layer scale's channel j multiplies: from G = u^T g in fp32, `sums` (C, K), and branch_sums (C) = sum u,

    dW2_j = layer_scale_j G_j,  db2_j = layer_scale_j sum u_j,  dlayer_scale_j = W2_j . G_j + b2_j sum u_j.

    What is not needed may be None; grad_weight may be `sums`. 12 C K bytes.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    there = channel < C
    scale = tl.load(layer_scale + channel, mask=there, other=0.0).to(tl.float32)
    if sums is not None:
        dot = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        for k in range(0, K, BLOCK_K):
            column = k + tl.arange(0, BLOCK_K)
            mask = there[:, None] & (column < K)[None, :]
            offset = channel[:, None] * K + column[None, :]
            total = tl.load(sums + offset, mask=mask, other=0.0)
            if grad_layer_scale is not None:
                dot += total * tl.load(fc2_weight + offset, mask=mask, other=0.0).to(tl.float32)
            if grad_weight is not None:
                tl.store(grad_weight + offset, total * scale[:, None], mask=mask)
    if branch_sums is not None:
        branch_sum = tl.load(branch_sums + channel, mask=there, other=0.0)
        if grad_bias is not None:
            tl.store(grad_bias + channel, branch_sum * scale, mask=there)
    if grad_layer_scale is not None:
        gradient = tl.sum(dot, 1)
        if fc2_bias is not None:
            gradient += tl.load(fc2_bias + channel, mask=there, other=0.0).to(tl.float32) * branch_sum
        tl.store(grad_layer_scale + channel, gradient, mask=there)
