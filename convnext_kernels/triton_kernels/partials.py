"""Sums over rows without atomics: every program leaves its partial sums in a row of a workspace, one pass adds them up.

The order of the additions is the same on every run, and so are the bits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import launch

__all__ = ["MOST_SUMS", "sum_partials"]

#: How many workspaces one launch adds up.
MOST_SUMS = 4


@triton.jit
def _column_sums(
    tile, partials, out, rows, stride,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    if COLUMNS > 0:
        column = tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        inside = (column < COLUMNS)[None, :]
        total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for first in range(0, rows, BLOCK_ROWS):
            row = first + tl.arange(0, BLOCK_ROWS)
            pointers = partials + row.to(tl.int64)[:, None] * stride + column[None, :]
            total += tl.load(pointers, mask=(row < rows)[:, None] & inside, other=0.0)
        # (outer, INNER) in, (INNER, outer) out.
        place = column % INNER * (COLUMNS // INNER) + column // INNER
        tl.store(out + place, tl.sum(total, 0), mask=column < COLUMNS)


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "rows3"])
def column_sums_kernel(
    partials0, out0, rows0, stride0, partials1, out1, rows1, stride1,
    partials2, out2, rows2, stride2, partials3, out3, rows3, stride3,
    COLUMNS0: tl.constexpr, COLUMNS1: tl.constexpr, COLUMNS2: tl.constexpr, COLUMNS3: tl.constexpr,
    INNER0: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out (COLUMNS) = the sums over partials (rows, COLUMNS), fp32, of up to four at once; the others have 0 columns.

    The first is transposed on the way: (outer, INNER0) in, (INNER0, outer) out. 4 bytes a value. Every turn waits for
    memory: BLOCK_ROWS rows in one.
    """
    tiles0: tl.constexpr = (COLUMNS0 + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tiles1: tl.constexpr = tiles0 + (COLUMNS1 + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tiles2: tl.constexpr = tiles1 + (COLUMNS2 + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    tile = tl.program_id(0)
    if tile < tiles0:
        _column_sums(tile, partials0, out0, rows0, stride0, COLUMNS0, INNER0, BLOCK_ROWS, BLOCK_COLUMNS)
    elif tile < tiles1:
        _column_sums(tile - tiles0, partials1, out1, rows1, stride1, COLUMNS1, 1, BLOCK_ROWS, BLOCK_COLUMNS)
    elif tile < tiles2:
        _column_sums(tile - tiles1, partials2, out2, rows2, stride2, COLUMNS2, 1, BLOCK_ROWS, BLOCK_COLUMNS)
    else:
        _column_sums(tile - tiles2, partials3, out3, rows3, stride3, COLUMNS3, 1, BLOCK_ROWS, BLOCK_COLUMNS)


def sum_partials(*sums: tuple[Tensor, Tensor], inner: int = 1) -> None:
    """In each pair, the second becomes the sums over dimension 0 of the first: fp32 partials (rows, columns), whose
    columns lie side by side. All in one launch, MOST_SUMS at most; none launches nothing.

    The first pair's columns (outer, inner) become (inner, outer). Call it inside `launch.device_guard`.
    """
    if not sums:
        return
    columns = [partials.shape[1] for partials, _ in sums] + [0] * (MOST_SUMS - len(sums))
    # Few columns may have thousands of rows: a program of 16 of them then takes 512 rows a turn.
    many = max(partials.shape[0] for partials, _ in sums) > 128
    block_rows, block_columns, warps = (512, 16, 8) if many else (64, 32, 4)
    arguments: list[Tensor | int | None] = []
    for partials, out in sums:
        arguments += partials, out, partials.shape[0], partials.stride(0)
    for _ in range(len(sums), MOST_SUMS):
        arguments += None, None, 0, 0
    launch.run(
        column_sums_kernel,
        (sum(launch.tiles_of(each, block_columns) for each in columns),),
        *arguments,
        COLUMNS0=columns[0],
        COLUMNS1=columns[1],
        COLUMNS2=columns[2],
        COLUMNS3=columns[3],
        INNER0=inner,
        BLOCK_ROWS=block_rows,
        BLOCK_COLUMNS=block_columns,
        num_warps=warps,
    )
