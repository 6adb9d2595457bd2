"""Layer normalisation over the last dimension, forward and backward.

Up to C = 4096 a program holds several whole rows in registers, in two pieces of a power of two of columns each
(launch.column_pieces: 96 is 64 + 32, no lane is idle), reads them once and takes the statistics in two passes over the
registers. The backward programs walk over the rows with a stride, keep the affine gradients' sums a thread apiece, and
leave one row of partials each. Longer rows are read in chunks, twice or three times.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .device import load_columns, row_statistics
from .partials import sum_partials

__all__ = ["layer_norm", "layer_norm_backward"]

_LONGEST_ROW = 4096  # that is held in registers
_CHUNK = 2048  # of a longer one

# Programs a multiprocessor in the backward pass: each leaves a row of partials.
_PROGRAMS_A_MULTIPROCESSOR = 4


@triton.jit
def _load(x, row, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    """Columns FIRST to FIRST + COUNT of rows, (rows, COUNT) fp32; zeros outside."""
    column = FIRST + tl.arange(0, COUNT)[None, :]
    mask = inside[:, None] & (column < C)
    return tl.load(x + row[:, None] * C + column, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(y, value, row, inside, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    column = FIRST + tl.arange(0, COUNT)[None, :]
    tl.store(y + row[:, None] * C + column, value.to(y.dtype.element_ty), mask=inside[:, None] & (column < C))


@triton.jit
def _affine(normalised, weight, bias, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    if weight is not None:
        normalised = normalised * load_columns(weight, FIRST, COUNT, C)
    if bias is not None:
        normalised = normalised + load_columns(bias, FIRST, COUNT, C)
    return normalised


@triton.jit(do_not_specialize=["rows", "eps"])
def _forward_kernel(
    x,
    weight,
    bias,
    y,
    mean,
    rstd,
    rows,
    eps,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < rows
    x0 = _load(x, row, inside, 0, C0, C)
    x1 = x0
    if C1 > 0:
        x1 = _load(x, row, inside, C0, C1, C)
    m, r = row_statistics(x0, x1, eps, C, C0, C1)
    _store(y, _affine((x0 - m) * r, weight, bias, 0, C0, C), row, inside, 0, C0, C)
    if C1 > 0:
        _store(y, _affine((x1 - m) * r, weight, bias, C0, C1, C), row, inside, C0, C1, C)
    tl.store(mean + row[:, None], m, mask=inside[:, None])
    tl.store(rstd + row[:, None], r, mask=inside[:, None])


@triton.jit
def _scaled(grad, weight, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    if weight is not None:
        grad = grad * load_columns(weight, FIRST, COUNT, C)
    return grad


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad,
    x,
    mean,
    rstd,
    weight,
    dx,
    partials,
    rows,
    NEEDS_X: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    C: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    weight_sum0 = tl.zeros([BLOCK_ROWS, C0], tl.float32)
    bias_sum0 = tl.zeros([BLOCK_ROWS, C0], tl.float32)
    weight_sum1 = tl.zeros([BLOCK_ROWS, C1 if C1 > 0 else 1], tl.float32)
    bias_sum1 = tl.zeros([BLOCK_ROWS, C1 if C1 > 0 else 1], tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = row < rows
        m = tl.load(mean + row, mask=inside, other=0.0)[:, None]
        r = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        # Outside of the rows and columns the gradient is zero, and so is what follows from it.
        g0 = _load(grad, row, inside, 0, C0, C)
        n0 = (_load(x, row, inside, 0, C0, C) - m) * r
        g1 = g0
        n1 = n0
        if C1 > 0:
            g1 = _load(grad, row, inside, C0, C1, C)
            n1 = (_load(x, row, inside, C0, C1, C) - m) * r
        if NEEDS_WEIGHT:
            weight_sum0 += g0 * n0
            if C1 > 0:
                weight_sum1 += g1 * n1
        if NEEDS_BIAS:
            bias_sum0 += g0
            if C1 > 0:
                bias_sum1 += g1
        if NEEDS_X:
            g0 = _scaled(g0, weight, 0, C0, C)
            total = tl.sum(g0, 1)
            projection = tl.sum(g0 * n0, 1)
            if C1 > 0:
                g1 = _scaled(g1, weight, C0, C1, C)
                total += tl.sum(g1, 1)
                projection += tl.sum(g1 * n1, 1)
            total = (total * (1.0 / C))[:, None]
            projection = (projection * (1.0 / C))[:, None]
            _store(dx, r * (g0 - total - n0 * projection), row, inside, 0, C0, C)
            if C1 > 0:
                _store(dx, r * (g1 - total - n1 * projection), row, inside, C0, C1, C)
    out = partials + tl.program_id(0).to(tl.int64) * ((NEEDS_WEIGHT + NEEDS_BIAS) * C)
    if NEEDS_WEIGHT:
        _store_sums(out, weight_sum0, 0, C0, C)
        if C1 > 0:
            _store_sums(out, weight_sum1, C0, C1, C)
        out += C
    if NEEDS_BIAS:
        _store_sums(out, bias_sum0, 0, C0, C)
        if C1 > 0:
            _store_sums(out, bias_sum1, C0, C1, C)


@triton.jit
def _store_sums(out, sums, FIRST: tl.constexpr, COUNT: tl.constexpr, C: tl.constexpr):
    column = FIRST + tl.arange(0, COUNT)
    tl.store(out + column, tl.sum(sums, 0), mask=column < C)


# --- rows that registers do not hold: one a program, in chunks


@triton.jit
def _chunk(vector, position, first, C: tl.constexpr, CHUNK: tl.constexpr):
    column = first + tl.arange(0, CHUNK)
    return tl.load(vector + position + column, mask=column < C, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["eps"])
def _long_forward_kernel(x, weight, bias, y, mean, rstd, eps, C: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([CHUNK], tl.float32)
    for first in range(0, C, CHUNK):
        sums += _chunk(x, row * C, first, C, CHUNK)
    m = tl.sum(sums, 0) * (1.0 / C)
    squares = tl.zeros([CHUNK], tl.float32)
    for first in range(0, C, CHUNK):
        centred = tl.where(first + tl.arange(0, CHUNK) < C, _chunk(x, row * C, first, C, CHUNK) - m, 0.0)
        squares += centred * centred
    r = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) * (1.0 / C) + eps))
    for first in range(0, C, CHUNK):
        column = first + tl.arange(0, CHUNK)
        value = (_chunk(x, row * C, first, C, CHUNK) - m) * r
        if weight is not None:
            value = value * _chunk(weight, 0, first, C, CHUNK)
        if bias is not None:
            value = value + _chunk(bias, 0, first, C, CHUNK)
        tl.store(y + row * C + column, value.to(y.dtype.element_ty), mask=column < C)
    tl.store(mean + row, m)
    tl.store(rstd + row, r)


@triton.jit
def _long_input_gradient_kernel(grad, x, mean, rstd, weight, dx, C: tl.constexpr, CHUNK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(mean + row)
    r = tl.load(rstd + row)
    totals = tl.zeros([CHUNK], tl.float32)
    projections = tl.zeros([CHUNK], tl.float32)
    for first in range(0, C, CHUNK):
        g = _chunk(grad, row * C, first, C, CHUNK)
        if weight is not None:
            g = g * _chunk(weight, 0, first, C, CHUNK)
        totals += g
        projections += g * (_chunk(x, row * C, first, C, CHUNK) - m) * r
    total = tl.sum(totals, 0) * (1.0 / C)
    projection = tl.sum(projections, 0) * (1.0 / C)
    for first in range(0, C, CHUNK):
        g = _chunk(grad, row * C, first, C, CHUNK)
        if weight is not None:
            g = g * _chunk(weight, 0, first, C, CHUNK)
        value = r * (g - total - (_chunk(x, row * C, first, C, CHUNK) - m) * r * projection)
        column = first + tl.arange(0, CHUNK)
        tl.store(dx + row * C + column, value.to(dx.dtype.element_ty), mask=column < C)


@triton.jit(do_not_specialize=["rows"])
def _long_parameter_gradient_kernel(
    grad,
    x,
    mean,
    rstd,
    partials,
    rows,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    C: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    weight_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    bias_sum = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        inside = row < rows
        mask = inside[:, None] & (column < C)[None, :]
        offset = row[:, None] * C + column[None, :]
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_WEIGHT:
            m = tl.load(mean + row, mask=inside, other=0.0)[:, None]
            r = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
            weight_sum += g * ((tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) - m) * r)
        bias_sum += g
    out = partials + tl.program_id(0).to(tl.int64) * ((NEEDS_WEIGHT + NEEDS_BIAS) * C) + column
    if NEEDS_WEIGHT:
        tl.store(out, tl.sum(weight_sum, 0), mask=column < C)
        out += C
    if NEEDS_BIAS:
        tl.store(out, tl.sum(bias_sum, 0), mask=column < C)


# --- configurations and launches


def _blocks(problem: config.Problem, elements: int) -> config.Config:
    """As many rows as make `elements` values a program, at least one."""
    width = sum(launch.column_pieces(problem.channels))
    rows = max(1, elements // width)
    return config.Config({"BLOCK_ROWS": 1 << (rows.bit_length() - 1)}, num_warps=8 if width > 2048 else 4)


def _candidates(problem: config.Problem) -> list[config.Config]:
    width = sum(launch.column_pieces(problem.channels))
    return [
        config.Config({"BLOCK_ROWS": rows}, num_warps=warps)
        for rows in (1, 2, 4, 8, 16, 32, 64, 128)
        for warps in (1, 2, 4, 8)
        if rows == 1 or 8 <= rows * width // (32 * warps) <= 64
    ]


config.declare("layer_norm", default=lambda problem: _blocks(problem, 4096), candidates=_candidates)
config.declare("layer_norm_backward", default=lambda problem: _blocks(problem, 2048), candidates=_candidates)


def _constants(kernel: str, x: Tensor, rows: int) -> dict[str, int]:
    channels = x.shape[-1]
    chosen = config.choose(kernel, channels=channels, hidden=0, dtype=x.dtype, rows=rows, device=x.device)
    c0, c1 = launch.column_pieces(channels)
    return {"C": channels, "C0": c0, "C1": c1, **chosen.meta}


def layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator of that name (csrc/operators.cpp)."""
    launch.check_tensors("layer_norm", "x", x=x, weight=weight, bias=bias)
    channels, rows = x.shape[-1], math.prod(x.shape[:-1])
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device) for _ in range(2))
    with launch.device_guard(x):
        if channels <= _LONGEST_ROW:
            constants = _constants("layer_norm", x, rows)
            grid = (launch.tiles_of(rows, constants["BLOCK_ROWS"]),)
            launch.run(_forward_kernel, grid, x, weight, bias, y, mean, rstd, rows, eps, **constants)
        else:
            options = {"C": channels, "CHUNK": _CHUNK, "num_warps": 8}
            launch.run(_long_forward_kernel, (rows,), x, weight, bias, y, mean, rstd, eps, **options)
    return y, mean, rstd


def layer_norm_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    needs_x: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The raw operator of that name (csrc/operators.cpp)."""
    launch.check_tensors("layer_norm_backward", "grad", grad=grad, x=x, mean=mean, rstd=rstd, weight=weight)
    channels, rows = x.shape[-1], math.prod(x.shape[:-1])
    vectors = needs_weight + needs_bias
    none_wanted = torch.empty((0,), dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if needs_x else none_wanted
    dweight, dbias = (
        torch.empty((channels,), dtype=torch.float32, device=x.device) if needed else none_wanted
        for needed in (needs_weight, needs_bias)
    )
    with launch.device_guard(x):
        programs = _PROGRAMS_A_MULTIPROCESSOR * launch.chip_of(x).multiprocessors
        needs = {"NEEDS_WEIGHT": needs_weight, "NEEDS_BIAS": needs_bias}
        if channels <= _LONGEST_ROW:
            constants = _constants("layer_norm_backward", x, rows)
            programs = min(programs, launch.tiles_of(rows, constants["BLOCK_ROWS"]))
            partials = torch.empty((programs, vectors * channels), dtype=torch.float32, device=x.device)
            tensors = grad, x, mean, rstd, weight, dx, partials
            launch.run(_backward_kernel, (programs,), *tensors, rows, NEEDS_X=needs_x, **needs, **constants)
        else:
            if needs_x:
                options = {"C": channels, "CHUNK": _CHUNK, "num_warps": 8}
                launch.run(_long_input_gradient_kernel, (rows,), grad, x, mean, rstd, weight, dx, **options)
            blocks = {"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128}
            column_blocks = launch.tiles_of(channels, blocks["BLOCK_COLUMNS"])
            programs = min(launch.tiles_of(programs, column_blocks), launch.tiles_of(rows, blocks["BLOCK_ROWS"]))
            partials = torch.empty((programs, vectors * channels), dtype=torch.float32, device=x.device)
            if vectors:
                options = {"C": channels, **blocks, "num_warps": 4}
                tensors = grad, x, mean, rstd, partials
                grid = (programs, column_blocks)
                launch.run(_long_parameter_gradient_kernel, grid, *tensors, rows, **needs, **options)
        wanted = [each for each, needed in ((dweight, needs_weight), (dbias, needs_bias)) if needed]
        sum_partials(*zip(partials.split(channels, 1), wanted))
    return dx, dweight, dbias
