"""The kernels of layer_norm_mlp's backward that hold whole rows on the chip: LayerNorm's backward needs their sums.

The counts are in the terms of mlp_backward_products.py; E_grad is the bytes of an element of the gradient that came.
"""

import triton
import triton.language as tl

from .device import add_product, gelu_and_derivative, live_rows, row_position
from .epilogue import halves
from .mlp_backward_products import add_sums, load_tile, load_weight

__all__ = ["norm_gradient_kernel", "norm_sums", "row_gradients_kernel", "store_dz"]


@triton.jit
def _load_normalised(
    z, place, centre, scale, inside, POLICY: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    """(z - mean) rstd of COUNT columns. Loaded again, not held in registers: another POLICY keeps the loads apart."""
    column = FIRST + tl.arange(0, COUNT)[None, :]
    values = tl.load(z + place + column, mask=inside & (column < C), other=0.0, eviction_policy=POLICY)
    return (values.to(tl.float32) - centre) * scale


@triton.jit
def norm_sums(
    s, z, place, centre, scale, inside, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, SLICE: tl.constexpr
):
    """The sums over COUNT columns of s and of s hat, each (rows, 1), SLICE columns or a half of COUNT at a time."""
    if COUNT > SLICE:
        HALF: tl.constexpr = COUNT // 2
        left, right = halves(s, COUNT)
        total, product = _norm_sums(left, z, place, centre, scale, inside, C, FIRST, HALF)
        total1, product1 = _norm_sums(right, z, place, centre, scale, inside, C, FIRST + HALF, HALF)
        total += total1
        product += product1
    else:
        total, product = _norm_sums(s, z, place, centre, scale, inside, C, FIRST, COUNT)
    return total, product


@triton.jit
def _norm_sums(s, z, place, centre, scale, inside, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr):
    hat = _load_normalised(z, place, centre, scale, inside, "", C, FIRST, COUNT)
    return tl.sum(s, 1)[:, None], tl.sum(s * hat, 1)[:, None]


@triton.jit
def store_dz(
    s, total, product, z, place, centre, scale, inside, dz,
    C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """LayerNorm's backward: dz = rstd (s - mean_C(s) - hat mean_C(s hat)), s the gradient of hat = (z - mean) rstd."""
    if COUNT > SLICE:
        HALF: tl.constexpr = COUNT // 2
        left, right = halves(s, COUNT)
        _store_dz(left, total, product, z, place, centre, scale, inside, dz, C, FIRST, HALF)
        _store_dz(right, total, product, z, place, centre, scale, inside, dz, C, FIRST + HALF, HALF)
    else:
        _store_dz(s, total, product, z, place, centre, scale, inside, dz, C, FIRST, COUNT)


@triton.jit
def _store_dz(
    s, total, product, z, place, centre, scale, inside, dz, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr
):
    hat = _load_normalised(z, place, centre, scale, inside, "evict_first", C, FIRST, COUNT)
    values = (s - total * (1.0 / C) - hat * (product * (1.0 / C))) * scale
    column = FIRST + tl.arange(0, COUNT)[None, :]
    tl.store(dz + place + column, values.to(dz.dtype.element_ty), mask=inside & (column < C))


@triton.jit
def _store_norm_gradient(
    s0, s1, weight_factor, z, mean, rstd, position, inside, dz, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr
):
    """dz from the sums s of whole rows in two pieces of columns, times weight_factor (1) if that is given."""
    centre, scale = tl.load(mean + position)[:, None], tl.load(rstd + position)[:, None]
    place = position[:, None] * C
    if weight_factor is not None:
        s0 *= tl.load(weight_factor)
        if C1 > 0:
            s1 *= tl.load(weight_factor)
    # 64 columns at a time: with all of hat beside s the registers would spill.
    total, product = norm_sums(s0, z, place, centre, scale, inside, C, 0, C0, 64)
    if C1 > 0:
        total1, product1 = norm_sums(s1, z, place, centre, scale, inside, C, C0, C1, 64)
        total += total1
        product += product1
    store_dz(s0, total, product, z, place, centre, scale, inside, dz, C, 0, C0, 64)
    if C1 > 0:
        store_dz(s1, total, product, z, place, centre, scale, inside, dz, C, C0, C1, 64)


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample"])
def norm_gradient_kernel(
    dh, weight, weight_factor, z, mean, rstd, order, live_count, dz, first, rows, rows_per_sample,
    C: tl.constexpr, K: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """s = dh W for whole rows, in two pieces of columns in registers (launch.column_pieces), then LayerNorm's backward.

    dh (rows, K), weight (K, C) times weight_factor (1) or None; z, dz (N, ..., C). 2 P C K FLOP; P E (K + 2 C) bytes.
    """
    tile = tl.program_id(0)
    live = live_rows(live_count, first, rows, rows_per_sample)
    if tile * BLOCK_M >= live:
        return
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    near = tl.minimum(row, live - 1)
    c0 = tl.arange(0, C0)
    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_0: tl.constexpr = C % C0 == 0 or C1 > 0
    EVEN_1: tl.constexpr = C == C0 + C1
    s0 = tl.zeros((BLOCK_M, C0), tl.float32)
    if C1 > 0:
        c1 = C0 + tl.arange(0, C1)
        s1 = tl.zeros((BLOCK_M, C1), tl.float32)
    for k in range(0, K, BLOCK_K):
        hidden = k + tl.arange(0, BLOCK_K)
        gradient = load_tile(dh, near, hidden, K, EVEN_K)
        columns = load_weight(weight, hidden, c0, K, C, EVEN_K and EVEN_0)
        s0 = add_product(s0, gradient, columns)
        if C1 > 0:
            columns = load_weight(weight, hidden, c1, K, C, EVEN_K and EVEN_1)
            s1 = add_product(s1, gradient, columns)

    _, position = row_position(first + near, order, rows_per_sample)
    inside = (row < live)[:, None]
    _store_norm_gradient(s0, s1 if C1 > 0 else None, weight_factor, z, mean, rstd, position, inside, dz, C, C0, C1)


@triton.jit
def _prepare_columns(
    z, grad, place, packed, centre, scale, factor, inside, hat, u, sum_part, accumulate,
    NORMALISED: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """hat and u of COUNT columns of a tile's rows; where there are places for them, stored."""
    column = FIRST + tl.arange(0, COUNT)[None, :]
    mask = inside & (column < C)
    values = tl.load(grad + place + column, mask=mask, other=0.0).to(tl.float32)
    if factor is not None:
        values *= factor
    u_tile = values.to(z.dtype.element_ty)
    if u is not None:
        tl.store(u + packed + column, u_tile, mask=mask)
    if sum_part is not None:
        add_sums(sum_part, values, FIRST, COUNT, C, accumulate)
    hat_tile = u_tile  # not used
    if NORMALISED:
        normalised = _load_normalised(z, place, centre, scale, inside, "evict_last", C, FIRST, COUNT)
        if FIRST + COUNT > C:  # -mean rstd, which fp16 may not hold: infinity times a weight of 0
            normalised = tl.where(column < C, normalised, 0.0)
        hat_tile = normalised.to(u_tile.dtype)
        if hat is not None:
            tl.store(hat + packed + column, hat_tile, mask=mask)
    return hat_tile, u_tile


@triton.jit
def _empty_sums(part, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, accumulate):
    """part (COLUMNS) (+)= 0."""
    if accumulate == 0:
        for first in range(0, COLUMNS, BLOCK):
            column = first + tl.arange(0, BLOCK)
            tl.store(part + column, tl.zeros((BLOCK,), tl.float32), mask=column < COLUMNS)


@triton.jit
def _empty_dz(
    dz, start, live, first, rows, order, rows_per_sample, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """dz of the dropped rows among BLOCK_M from `start` on becomes 0."""
    if start + BLOCK_M > live:
        row = start + tl.arange(0, BLOCK_M)
        _, position = row_position(first + tl.minimum(row, rows - 1), order, rows_per_sample)
        dropped = ((row >= live) & (row < rows))[:, None]
        c0 = tl.arange(0, C0)[None, :]
        tl.store(dz + position[:, None] * C + c0, 0.0, mask=dropped & (c0 < C))
        if C1 > 0:
            c1 = C0 + tl.arange(0, C1)[None, :]
            tl.store(dz + position[:, None] * C + c1, 0.0, mask=dropped & (c1 < C))


@triton.jit(do_not_specialize=["first", "rows", "rows_per_sample", "accumulate"])
def row_gradients_kernel(
    z, mean, rstd, grad, sample_scale, order, live_count, kept, fc1_weight, fc1_factor, fc1_bias, fc2_weight,
    fc2_factor, hat, u, g, dh, branch_parts, dz, first, rows, rows_per_sample, accumulate,
    C: tl.constexpr, K: tl.constexpr, TANH: tl.constexpr, DEGREE: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """prepare_kernel, hidden_gradients_kernel and norm_gradient_kernel in one, for whole rows.

    The arguments are theirs, without GRN; hat, u and the sums s = dh W stay on the chip from first to last. `hat` and
    `u`, for the products after it, `g`, `dh` and the parts may be None. 6 P C K FLOP and P (C (3 E + E_grad) + 2 K E)
    bytes, with `u` P C E more; the three kernels take P E (3 C + K) more.
    """
    tile = tl.program_id(0)
    live = live_rows(live_count, first, rows, rows_per_sample)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if order is not None:
        _empty_dz(dz, tile * BLOCK_M, live, first, rows, order, rows_per_sample, C, C0, C1, BLOCK_M)
    if tile * BLOCK_M >= live:
        if branch_parts is not None:
            _empty_sums(branch_parts + tile.to(tl.int64) * C, C, C0, accumulate)
        return

    EVEN_K: tl.constexpr = K % BLOCK_K == 0
    EVEN_0: tl.constexpr = C % C0 == 0 or C1 > 0
    EVEN_1: tl.constexpr = C == C0 + C1
    NORMALISED: tl.constexpr = kept is None or hat is not None
    inside = (row < live)[:, None]
    near = tl.minimum(row, live - 1)  # rows that can be read
    sample, position = row_position(first + near, order, rows_per_sample)
    place, packed = position[:, None] * C, row.to(tl.int64)[:, None] * C
    centre, scale = tl.load(mean + position)[:, None], tl.load(rstd + position)[:, None]
    factor = None
    if sample_scale is not None:
        factor = tl.load(sample_scale + sample)[:, None]
    branch_part = None
    if branch_parts is not None:
        branch_part = branch_parts + tile.to(tl.int64) * C
    c0 = tl.arange(0, C0)
    s0 = tl.zeros((BLOCK_M, C0), tl.float32)
    hat0, u0 = _prepare_columns(
        z, grad, place, packed, centre, scale, factor, inside, hat, u, branch_part, accumulate, NORMALISED, C, 0, C0
    )
    if C1 > 0:
        c1 = C0 + tl.arange(0, C1)
        s1 = tl.zeros((BLOCK_M, C1), tl.float32)
        hat1, u1 = _prepare_columns(
            z, grad, place, packed, centre, scale, factor, inside, hat, u, branch_part, accumulate, NORMALISED,
            C, C0, C1,
        )  # fmt: skip

    # Out of the loop: the compiler would fetch them again in every turn.
    fc1_largest, fc2_largest = None, None
    if fc1_factor is not None:
        fc1_largest = tl.load(fc1_factor)
    if fc2_factor is not None:
        fc2_largest = tl.load(fc2_factor)
    for k in range(0, K, BLOCK_K):
        hidden = k + tl.arange(0, BLOCK_K)
        in_columns = hidden < K
        first0 = load_weight(fc1_weight, hidden, c0, K, C, EVEN_K and EVEN_0)
        dg = tl.dot(u0, load_weight(fc2_weight, c0, hidden, C, K, EVEN_K and EVEN_0), input_precision="ieee")
        if C1 > 0:
            first1 = load_weight(fc1_weight, hidden, c1, K, C, EVEN_K and EVEN_1)
            second1 = load_weight(fc2_weight, c1, hidden, C, K, EVEN_K and EVEN_1)
            dg = add_product(dg, u1, second1)
        if kept is not None:
            h = load_tile(kept, position, hidden, K, EVEN_K).to(tl.float32)
        else:
            h = tl.dot(hat0, first0.T, input_precision="ieee")
            if C1 > 0:
                h = add_product(h, hat1, first1.T)
            if fc1_factor is not None:
                h *= fc1_largest
            if fc1_bias is not None:
                h += tl.load(fc1_bias + hidden, mask=in_columns, other=0.0).to(tl.float32)[None, :]
        if fc2_factor is not None:
            dg *= fc2_largest

        activated, slope = gelu_and_derivative(h, TANH, DEGREE)
        out = row.to(tl.int64)[:, None] * K + hidden[None, :]
        mask = inside & in_columns[None, :]
        if g is not None:
            tl.store(g + out, activated.to(g.dtype.element_ty), mask=mask)
        rounded = (dg * slope).to(z.dtype.element_ty)  # 0 from column K on, as the weights there
        if dh is not None:
            tl.store(dh + out, rounded, mask=mask)
        s0 = add_product(s0, rounded, first0)
        if C1 > 0:
            s1 = add_product(s1, rounded, first1)

    # Rows and what belongs to them are found anew, not kept in registers: the grid's second dimension has one program,
    # which the compiler does not know.
    row = (tile + tl.program_id(1)) * BLOCK_M + tl.arange(0, BLOCK_M)
    _, position = row_position(first + tl.minimum(row, live - 1), order, rows_per_sample)
    inside = (row < live)[:, None]
    _store_norm_gradient(s0, s1 if C1 > 0 else None, fc1_factor, z, mean, rstd, position, inside, dz, C, C0, C1)
