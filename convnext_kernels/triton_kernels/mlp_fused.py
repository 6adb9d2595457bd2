"""layer_norm_mlp in one kernel, for C up to 384: a tile of rows stays in registers from LayerNorm to the residual sum.

Rows are loaded once and normalised; the hidden columns go by in chunks (product with W1, bias, GELU, product with W2
into the accumulators), so that nothing of size 4 C is written. Memory traffic is z, residual and y, 2 + 4 + 4 bytes an
element under autocast, instead of 26 and more for the separate passes; the weights stream through L2 once a tile.

At C = 96 GELU costs more than the matrix products: several small blocks a multiprocessor let one block's GELU overlap
another's products. C is held in two pieces of a power of two of columns (launch.column_pieces), each with its own
accumulator: padded to one power of two, C = 96 would compute a third too much and C = 384 would not fit.

GRN needs an image's sums of squares before its second product: `squares_kernel` runs the first half and writes only
those sums; then `fused_kernel` computes the hidden columns again. That is one product more, and no tensor of size 4 C.
"""

import triton
import triton.language as tl

from .device import add_product, gelu, load_columns, row_position, row_statistics, tile_rows
from .epilogue import store_branch, store_sum
from .grn import store_squares

__all__ = ["fused_kernel", "squares_kernel"]


@triton.jit
def _load_rows(z, position, live, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Columns FIRST to FIRST + COUNT of the rows, fp32; zeros in rows that are not live and from column C on."""
    columns = FIRST + tl.arange(0, COUNT)
    mask = live[:, None]
    if FIRST + COUNT > C:
        mask = mask & (columns < C)[None, :]
    return tl.load(z + position[:, None] * C + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _normalise(
    x, mean, rstd, norm_weight, norm_bias, dtype: tl.constexpr,
    C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    a = (x - mean) * rstd
    if norm_weight is not None:
        a = a * load_columns(norm_weight, FIRST, COUNT, C)
    if norm_bias is not None:
        a = a + load_columns(norm_bias, FIRST, COUNT, C)
    if FIRST + COUNT > C:  # -mean * rstd there: W1's zeros would hide it, an infinity or NaN would come through
        a = tl.where((FIRST + tl.arange(0, COUNT) < C)[None, :], a, 0.0)
    return a.to(dtype)


@triton.jit
def _layer_norm(z, position, live, norm_weight, norm_bias, eps, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """LayerNorm of the rows in two pieces, in z's dtype (where C1 is 0 the first again), their means and rstds."""
    x0 = _load_rows(z, position, live, C, 0, C0)
    x1 = x0
    if C1 > 0:
        x1 = _load_rows(z, position, live, C, C0, C1)
    mean, rstd = row_statistics(x0, x1, eps, C, C0, C1)
    a0 = _normalise(x0, mean, rstd, norm_weight, norm_bias, z.dtype.element_ty, C, 0, C0)
    a1 = a0
    if C1 > 0:
        a1 = _normalise(x1, mean, rstd, norm_weight, norm_bias, z.dtype.element_ty, C, C0, C1)
    return a0, a1, mean, rstd


@triton.jit
def _load_fc1(
    weight, k, C: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, EVEN_K: tl.constexpr
):
    """W1^T: (COUNT channels, hidden columns k)."""
    channels = FIRST + tl.arange(0, COUNT)
    pointers = weight + k[None, :] * C + channels[:, None]
    if FIRST + COUNT > C:
        mask = (channels < C)[:, None] & (k < K)[None, :]
        w = tl.load(pointers, mask=mask, other=0.0)
    elif EVEN_K:
        w = tl.load(pointers)
    else:
        w = tl.load(pointers, mask=(k < K)[None, :], other=0.0)
    return w


@triton.jit
def _load_fc2(
    weight, k, C: tl.constexpr, K: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, EVEN_K: tl.constexpr
):
    """W2^T: (hidden columns k, COUNT channels)."""
    channels = FIRST + tl.arange(0, COUNT)
    pointers = weight + channels[None, :] * K + k[:, None]
    if FIRST + COUNT > C:
        mask = (channels < C)[None, :] & (k < K)[:, None]
        w = tl.load(pointers, mask=mask, other=0.0)
    elif EVEN_K:
        w = tl.load(pointers)
    else:
        w = tl.load(pointers, mask=(k < K)[:, None], other=0.0)
    return w


@triton.jit
def _hidden_columns(
    a0, a1, fc1_weight, fc1_bias, k,
    C: tl.constexpr, K: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm(z) W1^T + b1 at hidden columns k, fp32."""
    h = tl.dot(a0, _load_fc1(fc1_weight, k, C, K, 0, C0, EVEN_K), input_precision="ieee")
    if C1 > 0:
        h = add_product(h, a1, _load_fc1(fc1_weight, k, C, K, C0, C1, EVEN_K))
    if fc1_bias is not None:
        if EVEN_K:
            bias = tl.load(fc1_bias + k)
        else:
            bias = tl.load(fc1_bias + k, mask=k < K, other=0.0)
        h += bias.to(tl.float32)[None, :]
    return h


@triton.jit
def _store_dropped(
    y, residual, mean, rstd, hidden, position, inside,
    C: tl.constexpr, K: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """What rows of dropped samples get: y is the residual, everything else 0."""
    store_sum(tl.zeros((BLOCK_M, C0), tl.float32), y, residual, position, inside, 0, C, C0, C0 > C)
    if C1 > 0:
        store_sum(tl.zeros((BLOCK_M, C1), tl.float32), y, residual, position, inside, C0, C, C1, C0 + C1 > C)
    zero = tl.zeros((BLOCK_M,), tl.float32)
    tl.store(mean + position, zero, mask=inside)
    tl.store(rstd + position, zero, mask=inside)
    if hidden is not None:
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            value = tl.zeros((BLOCK_M, BLOCK_K), hidden.dtype.element_ty)
            tl.store(hidden + position[:, None] * K + k[None, :], value, mask=inside[:, None] & (k < K)[None, :])


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "eps"])
def fused_kernel(
    z, residual, norm_weight, norm_bias, fc1_weight, fc1_bias, factors, grn_bias, fc2_weight, fc2_bias, layer_scale,
    sample_scale, order, y, mean, rstd, hidden, rows, rows_per_sample, eps,
    C: tl.constexpr, K: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    TANH: tl.constexpr, DEGREE: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """A program takes a tile of BLOCK_M rows. Grid: launch.row_tiles(rows, rows_per_sample, BLOCK_M, PER_SAMPLE).

    `factors` (samples in `order`, K) fp32 and `grn_bias` are GRN's, or None; `hidden` is written where it is not None.
    """
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    HAS_SCALE: tl.constexpr = sample_scale is not None
    row, inside = tile_rows(tl.program_id(0), rows, rows_per_sample, BLOCK_M, PER_SAMPLE)
    sample, position = row_position(row, order, rows_per_sample)
    scale, live, some_live = None, inside, True
    if HAS_SCALE:
        scale = tl.load(sample_scale + sample)
        live = inside & (scale != 0)
        some_live = tl.max(live.to(tl.int32), 0) != 0

    if some_live:
        a0, a1, row_mean, row_rstd = _layer_norm(z, position, live, norm_weight, norm_bias, eps, C, C0, C1)
        kept = tl.where(live, tl.reshape(row_rstd, (BLOCK_M,)), 0.0)
        tl.store(mean + position, tl.reshape(row_mean, (BLOCK_M,)), mask=inside)  # 0 where the row was masked
        tl.store(rstd + position, kept, mask=inside)

        acc0 = tl.zeros((BLOCK_M, C0), tl.float32)
        acc1 = tl.zeros((BLOCK_M, C1 if C1 > 0 else 1), tl.float32)
        rank = row // rows_per_sample
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            h = _hidden_columns(a0, a1, fc1_weight, fc1_bias, k, C, K, C0, C1, EVEN_K)
            if hidden is not None:
                mask = inside[:, None]
                if not EVEN_K:
                    mask = mask & (k < K)[None, :]
                kept_h = h
                if HAS_SCALE:
                    kept_h = tl.where(live[:, None], h, 0.0)
                tl.store(hidden + position[:, None] * K + k[None, :], kept_h.to(hidden.dtype.element_ty), mask=mask)
            g = gelu(h, TANH, DEGREE)
            if factors is not None:
                if PER_SAMPLE:  # one sample a tile: a vector
                    image = (tl.program_id(0) // tl.cdiv(rows_per_sample, BLOCK_M)).to(tl.int64)
                    factor = tl.load(factors + image * K + k, mask=k < K, other=0.0)[None, :]
                else:
                    pointers = factors + rank.to(tl.int64)[:, None] * K + k[None, :]
                    factor = tl.load(pointers, mask=(k < K)[None, :], other=0.0)
                g = g * factor + tl.load(grn_bias + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
            g = g.to(z.dtype.element_ty)
            acc0 = add_product(acc0, g, _load_fc2(fc2_weight, k, C, K, 0, C0, EVEN_K))
            if C1 > 0:
                acc1 = add_product(acc1, g, _load_fc2(fc2_weight, k, C, K, C0, C1, EVEN_K))

        store_branch(acc0, y, residual, fc2_bias, layer_scale, scale, position, inside, 0, C, C0, C0 > C)
        if C1 > 0:
            store_branch(acc1, y, residual, fc2_bias, layer_scale, scale, position, inside, C0, C, C1, C0 + C1 > C)
    else:
        _store_dropped(y, residual, mean, rstd, hidden, position, inside, C, K, C0, C1, BLOCK_M, BLOCK_K)


@triton.jit(do_not_specialize=["rows", "rows_per_sample", "eps"])
def squares_kernel(
    z, norm_weight, norm_bias, fc1_weight, fc1_bias, live_count, order, partials, rows, rows_per_sample, eps,
    C: tl.constexpr, K: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    TANH: tl.constexpr, DEGREE: tl.constexpr, PER_SAMPLE: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """GRN's sums of squares, without writing what they are of. Grid as fused_kernel's; partials: grn.partials_shape."""
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    tile = tl.program_id(0)
    row, inside = tile_rows(tile, rows, rows_per_sample, BLOCK_M, PER_SAMPLE)
    some_live = True
    if live_count is not None:
        live_rows = tl.load(live_count) * rows_per_sample
        inside = inside & (row < live_rows)
        some_live = tl.min(row, 0) < live_rows
    if some_live:
        _, position = row_position(row, order, rows_per_sample)
        a0, a1, _, _ = _layer_norm(z, position, inside, norm_weight, norm_bias, eps, C, C0, C1)
        for first in range(0, K, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            h = _hidden_columns(a0, a1, fc1_weight, fc1_bias, k, C, K, C0, C1, EVEN_K)
            g = gelu(h, TANH, DEGREE)
            store_squares(
                partials, g, row, inside, tile, k, rows_per_sample, z.dtype.element_ty, K, BLOCK_M, IMAGES, PER_SAMPLE
            )
