"""Functions that the Triton kernels share: GELU and its derivative, LayerNorm of a row held in pieces, row addresses.

GELU by erf is x Phi(x) with Phi(-|x|) = 2^q(|x|), q a polynomial; `DEGREE` is its degree (gelu_degree), 0 the exact
`erf`. `TANH` is the tanh form, cheap and accurate enough for fp32 at once. Degree 8 and the tanh form follow
csrc/mlp/gelu.cuh to the coefficient: its header has the bounds, proved over every 16-bit input.
"""

import torch
import triton
import triton.language as tl

from . import launch

__all__ = [
    "INTERPRETED",
    "add_product",
    "gelu",
    "gelu_and_derivative",
    "gelu_degree",
    "gelu_derivative",
    "in_registers",
    "live_rows",
    "load_columns",
    "row_position",
    "row_statistics",
    "tile_order",
    "tile_rows",
]

#: launch.INTERPRETED, for kernels.
INTERPRETED = tl.constexpr(launch.INTERPRETED)

# --- GELU


def gelu_degree(dtype: torch.dtype, rounded: bool = False) -> int:
    """DEGREE for tensors of a dtype; `rounded`: GELU's argument has been rounded to it.

    PyTorch rounds h = a W1^T + b1 to bf16 and then f, GELU or its derivative: errors of up to 2^-9 (|f| + |h f'|).
    Where h stays in fp32, degree 5 adds 2^-10.4 (|f| + |h f'|) to the second of the two, at most 2^-12.7 for GELU and
    2^-11.5 for the derivative. It takes 9 instructions instead of 13, and products as narrow as a ConvNeXt's wait for
    GELU. Where h is a bf16 number, and in fp16, degree 8 keeps what digits there are.
    """
    if dtype == torch.float32:
        return 0
    return 5 if dtype == torch.bfloat16 and not rounded else 8


@triton.jit
def _normal_distribution(x, DEGREE: tl.constexpr):
    """Phi(x) = 2^q(|x|) mirrored. Beyond 13.2 it is 0 or 1."""
    if DEGREE == 5:  # falls for ever
        a = tl.abs(x)
        q = -7.17544171e-05 * a + 2.51206360e-03
        q = q * a - 3.35448273e-02
        q = q * a - 4.88078415e-01
        q = q * a - 1.13677537e00
        q = q * a - 1.00096202e00
    else:
        tl.static_assert(DEGREE == 8)
        a = tl.minimum(tl.abs(x), 13.2)
        q = 4.58650893e-08 * a - 2.63719136e-06
        q = q * a + 6.50966681e-05
        q = q * a - 9.17161144e-04
        q = q * a + 8.34889035e-03
        q = q * a - 5.34589807e-02
        q = q * a - 4.59119873e-01
        q = q * a - 1.15093677e00
        q = q * a - 1.00002309e00
    tail = tl.exp2(q)
    return tl.where(x > 0.0, 1.0 - tail, tail)


@triton.jit
def _normal_density(x):
    """exp(-x^2 / 2) / sqrt(2 pi)."""
    return tl.exp2(x * x * -0.72134752 - 1.32574806)


@triton.jit
def _tanh_gelu_exponential(x):
    """exp(-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): the gate 0.5 (1 + tanh(u)) is 1 / (1 + exp(-2u))."""
    return tl.exp2(x * (x * x * -0.10294324 - 2.30220819))


@triton.jit
def _tanh_gelu_derivative(x, exponential, gate):
    # 1 - gate without cancellation; where the exponential is infinite the gate is 0, and 0 this too.
    closed = tl.minimum(exponential, 1e30) * gate
    # In this order: at large |x| the first product is 0 before the second could overflow.
    return (x * gate * closed) * (x * x * 0.21406613 + 1.59576912) + gate


@triton.jit
def gelu(x, TANH: tl.constexpr, DEGREE: tl.constexpr):
    """GELU of an fp32 tensor."""
    if TANH:
        y = x * (1.0 / (1.0 + _tanh_gelu_exponential(x)))
    elif DEGREE > 0:
        y = x * _normal_distribution(x, DEGREE)
    else:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.70710678))
    return y


@triton.jit
def gelu_and_derivative(x, TANH: tl.constexpr, DEGREE: tl.constexpr):
    """GELU of an fp32 tensor, and its derivative."""
    if TANH:
        exponential = _tanh_gelu_exponential(x)
        gate = 1.0 / (1.0 + exponential)
        slope = _tanh_gelu_derivative(x, exponential, gate)
    elif DEGREE > 0:
        gate = _normal_distribution(x, DEGREE)
        slope = x * _normal_density(x) + gate
    else:
        gate = 0.5 * (1.0 + tl.erf(x * 0.70710678))
        slope = x * 0.39894228 * tl.exp(-0.5 * x * x) + gate
    return x * gate, slope


@triton.jit
def gelu_derivative(x, TANH: tl.constexpr, DEGREE: tl.constexpr):
    """The derivative of GELU at an fp32 tensor."""
    _, slope = gelu_and_derivative(x, TANH, DEGREE)
    return slope


@triton.jit
def in_registers(x):
    """x. 16-bit numbers are made here: by itself the compiler leaves their last steps to where they are used, and keeps
    what these start from instead, in four times the registers."""
    if x.dtype.primitive_bitwidth == 16 and not INTERPRETED:
        x = tl.inline_asm_elementwise("", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


# --- rows of C columns, held in two pieces of a power of two of columns each, 0 to C0 and C0 to C0 + C1 (C1 may be 0);
#     launch.column_pieces chooses them. 96 = 64 + 32 costs a matrix product nothing, where 128 would cost a third.


@triton.jit
def load_columns(vector, first, COUNT: tl.constexpr, C: tl.constexpr):
    """fp32 `vector[first : first + COUNT]` as (1, COUNT), zeros from column C on."""
    columns = first + tl.arange(0, COUNT)
    return tl.load(vector + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def row_statistics(x0, x1, eps, C: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps), each (rows, 1), of fp32 rows x0 (rows, C0), x1 (rows, C1); two passes.

    Columns from C on hold zeros. x1 is not read where C1 is 0.
    """
    total = tl.sum(x0, 1)
    if C1 > 0:
        total += tl.sum(x1, 1)
    mean = (total * (1.0 / C))[:, None]
    centred = tl.where(tl.arange(0, C0)[None, :] < C, x0 - mean, 0.0)
    squares = tl.sum(centred * centred, 1)
    if C1 > 0:
        centred = tl.where(C0 + tl.arange(0, C1)[None, :] < C, x1 - mean, 0.0)
        squares += tl.sum(centred * centred, 1)
    # A correctly rounded root and quotient: an approximate one would be the larger part of fp32's error.
    rstd = tl.div_rn(1.0, tl.sqrt_rn(squares * (1.0 / C) + eps))[:, None]
    return mean, rstd


# --- which rows a tile has. `order` (launch.sample_order) lists the live samples, then the dropped ones, so that the
#     tiles with something to compute come first; without it (None) rows are where they are.


@triton.jit
def row_position(row, order, rows_per_sample):
    """The sample and the row of the tensor (int64) of row `row` in `order`; row must be in range."""
    sample = row // rows_per_sample
    position = row.to(tl.int64)
    if order is not None:
        listed = tl.load(order + sample)
        position += (listed - sample).to(tl.int64) * rows_per_sample
        sample = listed
    return sample, position


@triton.jit
def tile_rows(tile, rows, rows_per_sample, BLOCK_M: tl.constexpr, PER_SAMPLE: tl.constexpr):
    """The rows (BLOCK_M) of a tile in `order`, clipped to the last, and which of them the tile really has.

    PER_SAMPLE: every sample begins a new tile, so that no tile has rows of two. launch.row_tiles counts the tiles.
    """
    if PER_SAMPLE:
        tiles = tl.cdiv(rows_per_sample, BLOCK_M)
        local = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = local < rows_per_sample
        row = (tile // tiles) * rows_per_sample + tl.minimum(local, rows_per_sample - 1)
    else:
        row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < rows
        row = tl.minimum(row, rows - 1)
    return row, inside


@triton.jit
def live_rows(live_count, first, rows, rows_per_sample):
    """How many of a chunk's `rows` are of live samples; the chunk starts at row `first` in the order of samples."""
    live = rows
    if live_count is not None:
        live = tl.load(live_count).to(tl.int64) * rows_per_sample - first
        live = tl.minimum(tl.maximum(live, 0), rows).to(tl.int32)
    return live


# --- tiles of a product


@triton.jit
def add_product(acc, a, b):
    """acc + a b, acc in fp32.

    The fp32 units sum a product of fp32 as one chain of FMAs for each element. A chain that went on through acc would
    be as long as the loop's whole depth, and its error twice that of PyTorch's, which splits the depth: here the chains
    start at 0 and are as long as a is wide. Tensor cores sum 16-bit products into acc, as PyTorch does it.
    """
    if a.dtype == tl.float32:
        # For fp32 the bound on imprecise sums has no meaning but one: the compiler does not start the chain at acc.
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=a.shape[1])
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def tile_order(tile, row_tiles, column_tiles: tl.constexpr, GROUP: tl.constexpr):
    """The tile's row tile and column tile: GROUP row tiles by all columns, then the next GROUP, so that the L2 serves
    both operands."""
    in_group = GROUP * column_tiles
    first = tile // in_group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = tile % in_group
    return first + within % size, within // size
