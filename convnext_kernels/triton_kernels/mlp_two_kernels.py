"""layer_norm_mlp as two matrix products with everything else in their prologues and epilogues, for any C.

    norm_kernel   a = LayerNorm(z), mean, rstd; what dropped samples get
    fc1_kernel    g = GELU(a W1^T + b1); the hidden tensor where it is kept; GRN's sums of squares
    fc2_kernel    y = residual + scale * layer_scale * (GRN(g) W2^T + b2)

LayerNorm is a pass of its own, though a fourth of g's traffic could be saved: normalised while it is loaded, a would
pass through registers once for every column tile (4 C / 128 times), a third of all issue slots, and could not be copied
straight to where wgmma reads it. rstd * (z W^T) - rstd * mean * sum(W) needs no such pass but loses the digits of rows
whose mean is larger than their deviation.

GELU takes about as long as the product it follows at C = 512: fc1_kernel's tiles are small enough for two blocks a
multiprocessor, so that one's epilogue overlaps the other's product. Both kernels are persistent, and take tiles in
groups of rows, so that the weights' and the rows' tiles are found in L2.

On sm_90 and later tiles come by TMA (config TMA). Warp specialisation of the persistent loops (tl.range's
warp_specialize, triton 3.8) changed nothing in the code for sm_90; for sm_100 it compiled for the plain epilogues alone
(GRN's was refused by ptxas, and fc2_kernel spilled), so it is left out until a GPU can say what it is worth.

Rows are those of `order` (launch.sample_order), packed: rows of dropped samples are at the end and are not computed.
"""

import triton
import triton.language as tl

from .device import add_product, gelu, live_rows, load_columns, row_position, row_statistics, tile_order, tile_rows
from .epilogue import halves, store_branch
from .grn import store_squares

__all__ = ["fc1_kernel", "fc2_kernel", "norm_kernel"]


@triton.jit
def _normalise_piece(
    a, mean, rstd, norm_weight, norm_bias, local, mask, x,
    C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    x = (x - mean) * rstd
    if norm_weight is not None:
        x = x * load_columns(norm_weight, FIRST, COUNT, C)
    if norm_bias is not None:
        x = x + load_columns(norm_bias, FIRST, COUNT, C)
    columns = FIRST + tl.arange(0, COUNT)
    tl.store(a + local[:, None] * C + columns[None, :], x.to(a.dtype.element_ty), mask=mask)


@triton.jit
def _copy_piece(y, residual, offsets, mask):
    value = tl.zeros(offsets.shape, tl.float32)
    if residual is not None:
        value = tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["first_row", "rows", "rows_per_sample", "eps"])
def norm_kernel(
    z, residual, norm_weight, norm_bias, live_count, order, a, y, mean, rstd, hidden, first_row, rows, rows_per_sample,
    eps, C: tl.constexpr, K: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """LayerNorm of `rows` rows from `first_row` on into a (rows, C), packed; all results of dropped samples."""
    local = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = local < rows
    row = first_row + tl.minimum(local, rows - 1)
    _, position = row_position(row, order, rows_per_sample)
    columns0 = tl.arange(0, C0)
    columns1 = C0 + tl.arange(0, C1 if C1 > 0 else 1)
    here0, here1 = inside[:, None] & (columns0 < C)[None, :], inside[:, None] & (columns1 < C)[None, :]
    offsets0, offsets1 = position[:, None] * C + columns0[None, :], position[:, None] * C + columns1[None, :]
    live, all_live, some_live = inside, True, True
    if live_count is not None:
        end = tl.load(live_count).to(tl.int64) * rows_per_sample
        live = inside & (row < end)
        some_live = tl.min(row, 0) < end
        all_live = tl.max(row, 0) < end
    if some_live:
        x0 = tl.load(z + offsets0, mask=here0 & live[:, None], other=0.0).to(tl.float32)
        x1 = x0
        if C1 > 0:
            x1 = tl.load(z + offsets1, mask=here1 & live[:, None], other=0.0).to(tl.float32)
        row_mean, row_rstd = row_statistics(x0, x1, eps, C, C0, C1)
        tl.store(mean + position, tl.reshape(row_mean, (BLOCK_M,)), mask=live)
        tl.store(rstd + position, tl.reshape(row_rstd, (BLOCK_M,)), mask=live)
        packed = local.to(tl.int64)
        _normalise_piece(a, row_mean, row_rstd, norm_weight, norm_bias, packed, here0 & live[:, None], x0, C, 0, C0)
        if C1 > 0:
            _normalise_piece(
                a, row_mean, row_rstd, norm_weight, norm_bias, packed, here1 & live[:, None], x1, C, C0, C1
            )
    if not all_live:
        dropped = inside & (live == 0)
        zero = tl.zeros((BLOCK_M,), tl.float32)
        tl.store(mean + position, zero, mask=dropped)
        tl.store(rstd + position, zero, mask=dropped)
        _copy_piece(y, residual, offsets0, here0 & dropped[:, None])
        if C1 > 0:
            _copy_piece(y, residual, offsets1, here1 & dropped[:, None])
        if hidden is not None:
            for first in range(0, K, BLOCK_K):
                k = first + tl.arange(0, BLOCK_K)
                value = tl.zeros((BLOCK_M, BLOCK_K), hidden.dtype.element_ty)
                mask = dropped[:, None] & (k < K)[None, :]
                tl.store(hidden + position[:, None] * K + k[None, :], value, mask=mask)


@triton.jit
def _load_tile(
    matrix, first_row, first_column, rows, DEPTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    TMA: tl.constexpr, EVEN_ROWS: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLUMNS) of a row-major matrix (rows, DEPTH), zeros outside; `matrix` is a descriptor where TMA."""
    if TMA:
        tile = matrix.load([first_row, first_column])
    else:
        row = first_row + tl.arange(0, ROWS)
        column = first_column + tl.arange(0, COLUMNS)
        pointers = matrix + row.to(tl.int64)[:, None] * DEPTH + column[None, :]
        if EVEN_ROWS and DEPTH % COLUMNS == 0:
            tile = tl.load(pointers)
        elif DEPTH % COLUMNS == 0:
            tile = tl.load(pointers, mask=(row < rows)[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=(row < rows)[:, None] & (column < DEPTH)[None, :], other=0.0)
    return tile


@triton.jit
def _activate(
    acc, bias, g, hidden, partials, row, inside, position, row_tile, first_column, rows_per_sample,
    K: tl.constexpr, COUNT: tl.constexpr, BLOCK_M: tl.constexpr, TANH: tl.constexpr, DEGREE: tl.constexpr,
    PER_SAMPLE: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """fc1_kernel's epilogue for columns first_column to first_column + COUNT, at most 64 at a time: see epilogue.py."""
    if COUNT > 64:
        H: tl.constexpr = COUNT // 2
        left, right = halves(acc, COUNT)
        _activate(
            left, bias, g, hidden, partials, row, inside, position, row_tile, first_column, rows_per_sample,
            K, H, BLOCK_M, TANH, DEGREE, PER_SAMPLE, IMAGES,
        )  # fmt: skip
        _activate(
            right, bias, g, hidden, partials, row, inside, position, row_tile, first_column + H, rows_per_sample,
            K, H, BLOCK_M, TANH, DEGREE, PER_SAMPLE, IMAGES,
        )  # fmt: skip
    else:
        k = first_column + tl.arange(0, COUNT)
        if bias is not None:
            acc += load_columns(bias, first_column, COUNT, K)
        mask = inside[:, None] & (k < K)[None, :]
        if hidden is not None:
            tl.store(hidden + position[:, None] * K + k[None, :], acc.to(hidden.dtype.element_ty), mask=mask)
        activated = gelu(acc, TANH, DEGREE)
        tl.store(g + row.to(tl.int64)[:, None] * K + k[None, :], activated.to(g.dtype.element_ty), mask=mask)
        if partials is not None:
            store_squares(
                partials, activated, row, inside, row_tile, k, rows_per_sample, g.dtype.element_ty, K, BLOCK_M, IMAGES,
                PER_SAMPLE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "rows", "rows_per_sample"])
def fc1_kernel(
    a, weight, bias, g, hidden, partials, live_count, order, first_row, rows, rows_per_sample,
    C: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TANH: tl.constexpr, DEGREE: tl.constexpr, TMA: tl.constexpr, PER_SAMPLE: tl.constexpr,
    IMAGES: tl.constexpr,
):  # fmt: skip
    """g = GELU(a weight^T + bias): a (rows, C) and g (rows, K) packed, weight (K, C).

    `hidden` (all rows, K), at the rows' own places, and `partials` (grn.partials_shape) are written where given.
    """
    live = live_rows(live_count, first_row, rows, rows_per_sample)
    if PER_SAMPLE:
        row_tiles = live // rows_per_sample * tl.cdiv(rows_per_sample, BLOCK_M)
    else:
        row_tiles = tl.cdiv(live, BLOCK_M)
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_order(tile, row_tiles, column_tiles, GROUP)
        row, inside = tile_rows(row_tile, live, rows_per_sample, BLOCK_M, PER_SAMPLE)
        first = tl.min(row, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, C, BLOCK_K):
            rows_tile = _load_tile(a, first, c, rows, C, BLOCK_M, BLOCK_K, TMA, False)
            columns_tile = _load_tile(weight, column_tile * BLOCK_N, c, K, C, BLOCK_N, BLOCK_K, TMA, K % BLOCK_N == 0)
            acc = add_product(acc, rows_tile, tl.trans(columns_tile))
        position = None
        if hidden is not None:
            _, position = row_position(first_row + row, order, rows_per_sample)
        _activate(
            acc, bias, g, hidden, partials, row, inside, position, row_tile, column_tile * BLOCK_N, rows_per_sample,
            K, BLOCK_N, BLOCK_M, TANH, DEGREE, PER_SAMPLE, IMAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_row", "rows", "rows_per_sample"])
def fc2_kernel(
    g, residual, factors, grn_bias, weight, bias, layer_scale, sample_scale, live_count, order, y,
    first_row, rows, rows_per_sample,
    C: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, TMA: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """y = residual + scale * layer_scale * ((g * factors + grn_bias) weight^T + bias); g (rows, K), weight (C, K).

    `factors` (images, K) in the dtype of g, or None without GRN. y and residual are at the rows' own places.
    """
    live = live_rows(live_count, first_row, rows, rows_per_sample)
    if PER_SAMPLE:
        row_tiles = live // rows_per_sample * tl.cdiv(rows_per_sample, BLOCK_M)
    else:
        row_tiles = tl.cdiv(live, BLOCK_M)
    column_tiles: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0)):
        row_tile, column_tile = tile_order(tile, row_tiles, column_tiles, GROUP)
        row, inside = tile_rows(row_tile, live, rows_per_sample, BLOCK_M, PER_SAMPLE)
        first = tl.min(row, 0)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            rows_tile = _load_tile(g, first, k, rows, K, BLOCK_M, BLOCK_K, TMA, False)
            columns_tile = _load_tile(weight, column_tile * BLOCK_N, k, C, K, BLOCK_N, BLOCK_K, TMA, C % BLOCK_N == 0)
            if factors is not None:
                columns = k + tl.arange(0, BLOCK_K)
                there = (columns < K)[None, :]
                if PER_SAMPLE:
                    of_image = factors + (first // rows_per_sample).to(tl.int64) * K
                    factor = tl.load(of_image + columns, mask=columns < K, other=0.0)[None, :]
                else:
                    image = (row // rows_per_sample).to(tl.int64)
                    factor = tl.load(factors + image[:, None] * K + columns[None, :], mask=there, other=0.0)
                # In the dtype of g: 16-bit numbers two at a time, rounded once. In fp32 it took as long as the product.
                shift = load_columns(grn_bias, k, BLOCK_K, K).to(rows_tile.dtype)
                rows_tile = tl.fma(rows_tile, factor, shift)
            acc = add_product(acc, rows_tile, tl.trans(columns_tile))
        sample, position = row_position(first_row + row, order, rows_per_sample)
        scale = None
        if sample_scale is not None:
            scale = tl.load(sample_scale + sample)
        first_column = column_tile * BLOCK_N
        masked: tl.constexpr = C % BLOCK_N != 0
        store_branch(acc, y, residual, bias, layer_scale, scale, position, inside, first_column, C, BLOCK_N, masked)
