"""The passes over rows around the matrix products of layer_norm_mlp's backward.

P is the number of live rows, E the bytes of an element of the compute dtype, E_grad of the gradient that came.
"""

import triton
import triton.language as tl

from .device import gelu_and_derivative, live_rows, row_position
from .grn import unbounded
from .mlp_backward_products import add_sums, add_to
from .mlp_backward_rows import norm_sums, store_dz

__all__ = ["grn_activation_kernel", "grn_factors_kernel", "norm_backward_kernel", "prepare_kernel"]


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
                add_sums(sum_parts + tile.to(tl.int64) * C, values, c, BLOCK_C, C, accumulate)
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
    squares, products, grads = unbounded(squares, 2), unbounded(products, 2), unbounded(grads, 1)
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
        add_to(weight_sums + row, response * products, mask, accumulate)
    if bias_sums is not None:
        add_to(bias_sums + row, grads, mask, accumulate)


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample", "segment_rows", "segments"])
def grn_activation_kernel(
    g, dh, factors, feedback, grn_bias, live_count, first, rows, rows_per_sample,
    segment_rows, segments, K: tl.constexpr, STORE_G: tl.constexpr, TANH: tl.constexpr, DEGREE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """In place of h and dg (rows, K): GRN(g) and dh = (dg * factors + g * feedback) * GELU'(h).

    A program takes a segment of an image's rows, of which an image has `segments`, by BLOCK_N columns. `dh` may be
    None. 4 P K E bytes; about 30 FLOP an element.
    """
    program, tile = tl.program_id(0), tl.program_id(1)
    live = live_rows(live_count, first, rows, rows_per_sample)
    image, segment = program // segments, program % segments
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < K
    begin = image * rows_per_sample + segment * segment_rows
    if begin >= live:
        return
    end = tl.minimum(begin + segment_rows, (image + 1) * rows_per_sample)
    of_image = image.to(tl.int64) * K + column
    factor = tl.load(factors + of_image, mask=in_columns, other=0.0)[None, :]
    shift = tl.load(grn_bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if dh is not None:
        back = tl.load(feedback + of_image, mask=in_columns, other=0.0)[None, :]
    for r in range(begin, end, BLOCK_M):
        row = r + tl.arange(0, BLOCK_M)
        mask = (row < end)[:, None] & in_columns[None, :]
        offset = row.to(tl.int64)[:, None] * K + column[None, :]
        h = tl.load(g + offset, mask=mask, other=0.0).to(tl.float32)
        activated, slope = gelu_and_derivative(h, TANH, DEGREE)
        if STORE_G:
            tl.store(g + offset, (activated * factor + shift).to(g.dtype.element_ty), mask=mask)
        if dh is not None:
            gradient = tl.load(dh + offset, mask=mask, other=0.0).to(tl.float32)
            gradient = (gradient * factor + activated * back) * slope
            tl.store(dh + offset, gradient.to(dh.dtype.element_ty), mask=mask)


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
