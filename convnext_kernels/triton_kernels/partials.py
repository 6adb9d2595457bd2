"""Sums over rows without atomics: every program leaves its partial sums in a row of a workspace, one pass adds them up.

The order of the additions is the same on every run, and so are the bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch

__all__ = ["add_rows"]

_COLUMNS, _ROWS = 32, 32


@triton.jit(do_not_specialize=["rows", "columns", "stride", "inner"])
def _add_rows_kernel(partials, out, rows, columns, stride, inner, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        total += tl.load(partials + row.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)
    # (outer, inner) in, (inner, outer) out.
    transposed = (column % inner) * (columns // inner) + column // inner
    tl.store(out + transposed, tl.sum(total, 0), mask=inside)


def add_rows(partials: Tensor, inner: int) -> Tensor:
    """The sums over dimension 0 of fp32 partials (rows, outer * inner), as (inner * outer,): transposed on the way.

    With `inner` all the columns, or 1, that is the plain order. Call it inside `launch.device_guard`.
    """
    rows, columns = partials.shape
    out = torch.empty((columns,), dtype=torch.float32, device=partials.device)
    grid = (launch.tiles_of(columns, _COLUMNS),)
    options = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": 4}
    launch.run(_add_rows_kernel, grid, partials, out, rows, columns, partials.stride(0), inner, **options)
    return out
