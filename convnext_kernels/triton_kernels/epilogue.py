"""The end of layer_norm_mlp: y = residual + scale * layer_scale * (acc + bias), from an accumulator to memory.

An accumulator is taken 64 columns at a time. With all of the residual in flight beside it (fp32 under autocast), the
registers of a block that holds 192 columns or more would spill.
"""

import triton
import triton.language as tl

from .device import load_columns

__all__ = ["halves", "store_branch", "store_sum"]


@triton.jit
def store_sum(branch, y, residual, position, inside, first, C: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr):
    """y = residual + branch in columns `first` to first + COUNT of rows `position` (int64) where `inside`.

    MASKED: some of the columns may be C or more.
    """
    columns = first + tl.arange(0, COUNT)
    offsets = position[:, None] * C + columns[None, :]
    mask = inside[:, None]
    if MASKED:
        mask = mask & (columns < C)[None, :]
    if residual is not None:
        branch += tl.load(residual + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offsets, branch.to(y.dtype.element_ty), mask=mask)


@triton.jit
def halves(x, COLUMNS: tl.constexpr):
    """The left and the right half of x (rows, COLUMNS); in the layout of a product's result that moves nothing."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def store_branch(
    acc, y, residual, bias, layer_scale, scale, position, inside, first,
    C: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """y = residual + scale * layer_scale * (acc + bias) for acc (rows, COUNT) fp32; see store_sum.

    `scale` (rows,) is the sample's; where it is 0 y is the residual. Each of residual, bias, layer_scale and scale may
    be None.
    """
    if COUNT > 64:
        H: tl.constexpr = COUNT // 2
        left, right = halves(acc, COUNT)
        store_branch(left, y, residual, bias, layer_scale, scale, position, inside, first, C, H, MASKED)
        store_branch(right, y, residual, bias, layer_scale, scale, position, inside, first + H, C, H, MASKED)
    else:
        if bias is not None:
            acc += load_columns(bias, first, COUNT, C)
        if layer_scale is not None:
            acc = acc * load_columns(layer_scale, first, COUNT, C)
        if scale is not None:
            # By selection: nothing that a dropped row came to, NaN included, may show.
            acc = tl.where((scale != 0)[:, None], acc * scale[:, None], 0.0)
        store_sum(acc, y, residual, position, inside, first, C, COUNT, MASKED)
