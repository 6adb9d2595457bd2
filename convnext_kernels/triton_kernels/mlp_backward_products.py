"""The matrix products of layer_norm_mlp's backward, over a chunk of live rows that lie one after the other.

Each is a plain product of dense matrices (rows, columns) in the compute dtype: the passes in mlp_backward_passes.py
have normalised, scaled and gathered the rows before. Rows beyond the live ones hold anything, NaN included: where rows
are the result's, they are not stored; where rows are summed over, they are not loaded. P is the number of live rows
and E the bytes of an element in the counts below; what other tiles have brought into the L2 is not counted.
"""

import triton
import triton.language as tl

from .device import add_product, gelu_and_derivative, in_registers, live_rows, row_position, tile_order
from .epilogue import halves
from .grn import images_at_once, store_image_sums, summands

__all__ = [
    "add_sums",
    "add_to",
    "hidden_gradients_kernel",
    "input_gradient_kernel",
    "load_tile",
    "load_weight",
    "weight_gradient_kernel",
]


@triton.jit
def load_tile(matrix, row, column, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a dense matrix, of rows that are there; zeros from column COLUMNS on (an EVEN tile ends before)."""
    pointers = matrix + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(column < COLUMNS)[None, :], other=0.0)
    return tile


@triton.jit
def load_weight(matrix, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a weight (ROWS, COLUMNS); zeros outside it."""
    pointers = matrix + row[:, None] * COLUMNS + column[None, :]
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)
    return tile


@triton.jit
def add_to(pointers, values, mask, accumulate):
    """*pointers = values, plus what an earlier chunk left there where `accumulate`: (+)= in the descriptions."""
    before = tl.load(pointers, mask=mask & (accumulate != 0), other=0.0)
    tl.store(pointers, before + values, mask=mask)


@triton.jit
def add_sums(part, values, first, COUNT: tl.constexpr, COLUMNS: tl.constexpr, accumulate):
    """part[first : first + COUNT] (+)= the sums over the rows of `values`; part has COLUMNS."""
    column = first + tl.arange(0, COUNT)
    add_to(part + column, tl.sum(values, 0), column < COLUMNS, accumulate)


@triton.jit
def _store_columns(matrix, values, row, inside, first, COUNT: tl.constexpr, K: tl.constexpr):
    """matrix[row, first : first + COUNT] = values in the rows `inside` and in columns below K."""
    column = first + tl.arange(0, COUNT)
    pointers = matrix + row.to(tl.int64)[:, None] * K + column[None, :]
    tl.store(pointers, values.to(matrix.dtype.element_ty), mask=inside[:, None] & (column < K)[None, :])


@triton.jit
def _activate(
    h, g, row, inside, first, dtype: tl.constexpr, COUNT: tl.constexpr, K: tl.constexpr,
    TANH: tl.constexpr, DEGREE: tl.constexpr, GRN: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """Stores GELU(h), or h for GRN, in columns `first` to first + COUNT of g, and returns what the gradients need of
    it, in `dtype`: GELU'(h), or for GRN `summands` of GELU(h), which fp16 makes of it later. HELD: it waits for dg."""
    if COUNT > 64:  # all of GELU's intermediate results would not fit beside h
        H: tl.constexpr = COUNT // 2
        left, right = halves(h, COUNT)
        left = _activate(left, g, row, inside, first, dtype, H, K, TANH, DEGREE, GRN, HELD)
        right = _activate(right, g, row, inside, first + H, dtype, H, K, TANH, DEGREE, GRN, HELD)
        needed = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (h.shape[0], COUNT))
    else:
        if GRN:  # the next pass activates the rounded h: GRN's norms are those of the same values
            stored = h.to(dtype)
            needed, _ = gelu_and_derivative(stored.to(tl.float32), TANH, DEGREE)
            if dtype == tl.bfloat16:
                needed = summands(needed, dtype, False)
        else:
            stored, needed = gelu_and_derivative(h, TANH, DEGREE)
        if g is not None:
            _store_columns(g, stored, row, inside, first, COUNT, K)
        needed = needed.to(dtype)
        if HELD:
            needed = in_registers(needed)
    return needed


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample"])
def hidden_gradients_kernel(
    hat, u, kept, fc1_weight, fc1_factor, fc1_bias, fc2_weight, fc2_factor, order, live_count, g, dh,
    square_parts, product_parts, grad_parts, first, rows, rows_per_sample,
    C: tl.constexpr, K: tl.constexpr, TANH: tl.constexpr, DEGREE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """h = hat W1^T + b1, g = GELU(h), dg = u W2 and dh = dg * GELU'(h).

    hat, u (rows, C); fc1_weight (K, C), fc2_weight (C, K) with LayerNorm's and the layer's scale in them, except for
    the factors (1) where given. h is read from `kept` (N, ..., K) where there is no `hat`.

    One product after the other, and of the first only what the last line needs stays, in 16 bits: so two programs share
    a multiprocessor, and GELU in one runs under the products of the other.

    With GRN (square_parts): `g` gets h and `dh` gets dg, and the parts (tiles of rows + images, K) get the sums over an
    image's rows in a tile of g^2, dg * g and dg. Tile t and image i meet in part t + i: going down the rows t or i, or
    both, rise, so that no two meetings share a part.

    4 P C K FLOP and P E (2 C + 2 K) bytes; with `kept` 2 P C K FLOP and P E (C + 3 K) bytes.
    """
    tiles_n: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tiles_n, GROUP)
    live = live_rows(live_count, first, rows, rows_per_sample)
    if tile_m * BLOCK_M >= live:
        return
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    in_columns = column < K

    EVEN_K: tl.constexpr = K % BLOCK_N == 0
    EVEN_C: tl.constexpr = C % BLOCK_C == 0
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < live
    near = tl.minimum(row, live - 1)  # rows that can be read

    if kept is not None:
        _, position = row_position(first + near, order, rows_per_sample)
        h = load_tile(kept, position, column, K, EVEN_K).to(tl.float32)
    else:
        h = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, C, BLOCK_C):
            channel = c + tl.arange(0, BLOCK_C)
            weight = load_weight(fc1_weight, column, channel, K, C, EVEN_K and EVEN_C)
            h = add_product(h, load_tile(hat, near, channel, C, EVEN_C), weight.T)
        if fc1_factor is not None:
            h *= tl.load(fc1_factor)
        if fc1_bias is not None:
            h += tl.load(fc1_bias + column, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    GRN: tl.constexpr = square_parts is not None
    HELD: tl.constexpr = u is not None
    dtype: tl.constexpr = g.dtype.element_ty if g is not None else dh.dtype.element_ty
    needed = _activate(h, g, row, inside, tile_n * BLOCK_N, dtype, BLOCK_N, K, TANH, DEGREE, GRN, HELD)
    if GRN:
        image = row // rows_per_sample
        first_image = tile_m * BLOCK_M // rows_per_sample
        last_image = (tl.minimum(tile_m * BLOCK_M + BLOCK_M, live) - 1) // rows_per_sample
        STEP: tl.constexpr = images_at_once(dtype)
        a = needed
        if dtype == tl.float16:
            a = summands(needed.to(tl.float32), dtype, False)
        for i in range(first_image, last_image + 1, STEP):
            part, images = tile_m + i, last_image - i + 1
            store_image_sums(square_parts, a * a, image, i, inside, part, images, column, K, STEP)

    if HELD:
        dg = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for c in range(0, C, BLOCK_C):
            channel = c + tl.arange(0, BLOCK_C)
            weight = load_weight(fc2_weight, channel, column, C, K, EVEN_K and EVEN_C)
            dg = add_product(dg, load_tile(u, near, channel, C, EVEN_C), weight)
        if fc2_factor is not None:
            dg *= tl.load(fc2_factor)
        if GRN:
            _store_columns(dh, dg, row, inside, tile_n * BLOCK_N, BLOCK_N, K)
            d = summands(dg, dtype, True)
            for i in range(first_image, last_image + 1, STEP):
                part, images = tile_m + i, last_image - i + 1
                store_image_sums(product_parts, d * a, image, i, inside, part, images, column, K, STEP)
                store_image_sums(grad_parts, d, image, i, inside, part, images, column, K, STEP)
        elif dh is not None:
            _store_columns(dh, dg * needed.to(tl.float32), row, inside, tile_n * BLOCK_N, BLOCK_N, K)


@triton.jit
def _load_rows(matrix, row, column, end, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """A tile of a dense matrix; zeros from row `end` on, whatever is there, and from column COLUMNS on."""
    mask = (row < end)[:, None]
    if not EVEN:
        mask = mask & (column < COLUMNS)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * COLUMNS + column[None, :], mask=mask, other=0.0)


@triton.jit
def _add_parts(
    parts, sums, p, first, COUNT: tl.constexpr,
    P: tl.constexpr, Q: tl.constexpr, STRIDE_P: tl.constexpr, STRIDE_Q: tl.constexpr, accumulate,
):  # fmt: skip
    if COUNT > 64:  # what was there before takes registers beside the sums: see epilogue.py
        H: tl.constexpr = COUNT // 2
        left, right = halves(sums, COUNT)
        _add_parts(parts, left, p, first, H, P, Q, STRIDE_P, STRIDE_Q, accumulate)
        _add_parts(parts, right, p, first + H, H, P, Q, STRIDE_P, STRIDE_Q, accumulate)
    else:
        q = first + tl.arange(0, COUNT)
        pointers = parts + p[:, None] * STRIDE_P + q[None, :] * STRIDE_Q
        add_to(pointers, sums, (p < P)[:, None] & (q < Q)[None, :], accumulate)


@triton.jit
def _add_tile(
    parts, sums0, sums1, p, first, P: tl.constexpr, Q: tl.constexpr, STRIDE_P: tl.constexpr, STRIDE_Q: tl.constexpr,
    BLOCK_Q0: tl.constexpr, BLOCK_Q1: tl.constexpr, accumulate,
):  # fmt: skip
    _add_parts(parts, sums0, p, first, BLOCK_Q0, P, Q, STRIDE_P, STRIDE_Q, accumulate)
    if BLOCK_Q1 > 0:
        _add_parts(parts, sums1, p, first + BLOCK_Q0, BLOCK_Q1, P, Q, STRIDE_P, STRIDE_Q, accumulate)


@triton.jit
def _sum_products(
    wide, narrow, begin, end, p, first, column_part, accumulate,
    P: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q0: tl.constexpr, BLOCK_Q1: tl.constexpr,
    BLOCK_R: tl.constexpr, COLUMN_SUMS: tl.constexpr,
):  # fmt: skip
    """wide^T narrow over rows begin to end, in two pieces of columns. COLUMN_SUMS: and column_part (+)= wide's sums."""
    q0 = first + tl.arange(0, BLOCK_Q0)
    sums0 = tl.zeros((BLOCK_P, BLOCK_Q0), tl.float32)
    if BLOCK_Q1 > 0:
        q1 = first + BLOCK_Q0 + tl.arange(0, BLOCK_Q1)
        sums1 = tl.zeros((BLOCK_P, BLOCK_Q1), tl.float32)
    TENSOR_CORES: tl.constexpr = wide.dtype.element_ty != tl.float32
    if COLUMN_SUMS:
        if TENSOR_CORES:  # wide is where they read it, and not in registers: its sums are its product with ones
            ONES: tl.constexpr = 16  # columns, the fewest that every Triton makes a product of
            ones = tl.full((BLOCK_R, ONES), 1.0, wide.dtype.element_ty)
            column_sums = tl.zeros((BLOCK_P, ONES), tl.float32)
        else:
            column_sums = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    EVEN_P: tl.constexpr = P % BLOCK_P == 0
    EVEN_Q: tl.constexpr = Q % (BLOCK_Q0 + BLOCK_Q1) == 0
    for r in range(begin, end, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        x = _load_rows(wide, row, p, end, P, EVEN_P).T
        sums0 = add_product(sums0, x, _load_rows(narrow, row, q0, end, Q, EVEN_Q))
        if BLOCK_Q1 > 0:
            sums1 = add_product(sums1, x, _load_rows(narrow, row, q1, end, Q, EVEN_Q))
        if COLUMN_SUMS:
            if TENSOR_CORES:
                column_sums = add_product(column_sums, x, ones)
            else:
                column_sums += x
    if COLUMN_SUMS:
        if TENSOR_CORES:
            total = tl.max(column_sums, 1)  # its columns are the same
        else:
            total = tl.sum(column_sums, 1)
        add_to(column_part + p, total, p < P, accumulate)
    if BLOCK_Q1 == 0:
        sums1 = sums0
    return sums0, sums1


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample", "accumulate", "splits"])
def weight_gradient_kernel(
    dh, hat, fc1_parts, fc1_bias_parts, g, u, fc2_parts, live_count, first, rows, rows_per_sample, accumulate, splits,
    P: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_Q0: tl.constexpr, BLOCK_Q1: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """fc1_parts[split] (+)= T = dh^T hat and fc2_parts[split] (+)= G = u^T g over a split's rows, in fp32.

    dh, g (rows, P); hat, u (rows, Q); fc1_parts (splits, P, Q), fc2_parts (splits, Q, P). Each product is one of a wide
    matrix, transposed, and a narrow one, and they are what the grid's third dimension counts; or one is None. A tile is
    BLOCK_P x (BLOCK_Q0 + BLOCK_Q1). The splits share the live rows evenly, so that dropped samples cost nothing.
    fc1_bias_parts (splits, P), where given, (+)= the sums of dh: the programs of the first columns make them.

    For each, 2 P Q FLOP and (P + Q) E bytes a row, P E of it once for each tile of columns; 4 P Q bytes a split.
    """
    tiles_q: tl.constexpr = (Q + BLOCK_Q0 + BLOCK_Q1 - 1) // (BLOCK_Q0 + BLOCK_Q1)
    tile, split = tl.program_id(0), tl.program_id(1)
    if g is None:
        wide, narrow = dh, hat
    elif dh is None:
        wide, narrow = g, u
    else:
        wide, narrow = tl.where(tl.program_id(2) == 0, dh, g), tl.where(tl.program_id(2) == 0, hat, u)
    p = tile // tiles_q * BLOCK_P + tl.arange(0, BLOCK_P)
    tile_q = tile % tiles_q
    first_q = tile_q * (BLOCK_Q0 + BLOCK_Q1)
    live = live_rows(live_count, first, rows, rows_per_sample)
    share = tl.cdiv(tl.cdiv(live, splits), BLOCK_R) * BLOCK_R
    begin = split * share
    end = tl.minimum(begin + share, live)

    if fc1_bias_parts is not None and (tile_q == 0 and tl.program_id(2) == 0):
        sums0, sums1 = _sum_products(
            dh, hat, begin, end, p, first_q, fc1_bias_parts + split * P, accumulate,
            P, Q, BLOCK_P, BLOCK_Q0, BLOCK_Q1, BLOCK_R, True,
        )  # fmt: skip
    else:
        sums0, sums1 = _sum_products(
            wide, narrow, begin, end, p, first_q, None, accumulate,
            P, Q, BLOCK_P, BLOCK_Q0, BLOCK_Q1, BLOCK_R, False,
        )  # fmt: skip

    place = split.to(tl.int64) * (P * Q)
    if g is None:
        _add_tile(fc1_parts + place, sums0, sums1, p, first_q, P, Q, Q, 1, BLOCK_Q0, BLOCK_Q1, accumulate)
    elif dh is None:
        _add_tile(fc2_parts + place, sums0, sums1, p, first_q, P, Q, 1, P, BLOCK_Q0, BLOCK_Q1, accumulate)
    elif tl.program_id(2) == 0:
        _add_tile(fc1_parts + place, sums0, sums1, p, first_q, P, Q, Q, 1, BLOCK_Q0, BLOCK_Q1, accumulate)
    else:
        _add_tile(fc2_parts + place, sums0, sums1, p, first_q, P, Q, 1, P, BLOCK_Q0, BLOCK_Q1, accumulate)


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample"])
def input_gradient_kernel(
    dh, weight, weight_factor, s, live_count, first, rows, rows_per_sample,
    C: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """s = dh W in tiles, where a row has too many columns for norm_gradient_kernel.

    dh (rows, K), s (rows, C) in the compute dtype. 2 P C K FLOP; P E (K + C) bytes.
    """
    tiles_n: tl.constexpr = (C + BLOCK_N - 1) // BLOCK_N
    tile_m, tile_n = tile_order(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tiles_n, GROUP)
    live = live_rows(live_count, first, rows, rows_per_sample)
    if tile_m * BLOCK_M >= live:
        return
    row = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    near = tl.minimum(row, live - 1)
    column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_C: tl.constexpr = C % BLOCK_N == 0
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        hidden = k + tl.arange(0, BLOCK_K)
        gradient = load_tile(dh, near, hidden, K, EVEN_K)
        columns = load_weight(weight, hidden, column, K, C, EVEN_K and EVEN_C)
        sums = add_product(sums, gradient, columns)
    if weight_factor is not None:
        sums *= tl.load(weight_factor)
    mask = (row < live)[:, None] & (column < C)[None, :]
    tl.store(s + row.to(tl.int64)[:, None] * C + column[None, :], sums.to(s.dtype.element_ty), mask=mask)
