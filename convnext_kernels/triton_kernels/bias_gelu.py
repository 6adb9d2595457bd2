"""GELU(x + bias) and its backward: one pass over memory each; the bias's gradient by partials."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .device import gelu, gelu_degree, gelu_derivative, load_columns
from .partials import sum_partials

__all__ = ["bias_gelu", "bias_gelu_backward"]

_PROGRAMS_A_MULTIPROCESSOR = 8


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x,
    bias,
    y,
    rows,
    TANH: tl.constexpr,
    DEGREE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask = (row < rows)[:, None] & (column < K)[None, :]
    offset = row[:, None] * K + column[None, :]
    h = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        h += load_columns(bias, tl.program_id(1) * BLOCK_K, BLOCK_K, K)
    tl.store(y + offset, gelu(h, TANH, DEGREE).to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    grad,
    x,
    bias,
    dx,
    partials,
    rows,
    TANH: tl.constexpr,
    DEGREE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = column < K
    added = tl.zeros([1, BLOCK_K], tl.float32)
    if bias is not None:
        added = load_columns(bias, tl.program_id(1) * BLOCK_K, BLOCK_K, K)
    sums = tl.zeros([BLOCK_ROWS, BLOCK_K], tl.float32)
    for tile in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_ROWS), tl.num_programs(0)):
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        offset = row[:, None] * K + column[None, :]
        h = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32) + added
        g = tl.load(grad + offset, mask=mask, other=0.0).to(tl.float32)
        slope = g * gelu_derivative(h, TANH, DEGREE)
        if bias is not None:
            sums += slope
        tl.store(dx + offset, slope.to(dx.dtype.element_ty), mask=mask)
    if bias is not None:
        tl.store(partials + tl.program_id(0).to(tl.int64) * K + column, tl.sum(sums, 0), mask=inside)


def _default(problem: config.Problem) -> config.Config:
    """A line of memory wide, 16-bit or fp32: no width of a ConvNeXt's hidden layer is padded much."""
    return config.Config({"BLOCK_ROWS": 32, "BLOCK_K": 64}, num_warps=4)


def _default_backward(problem: config.Problem) -> config.Config:
    return config.Config({"BLOCK_ROWS": 16, "BLOCK_K": 64}, num_warps=4)


def _candidates(problem: config.Problem) -> list[config.Config]:
    sizes = [(rows, columns, warps) for rows in (8, 16, 32, 64) for columns in (64, 128, 256) for warps in (2, 4, 8)]
    return [
        config.Config({"BLOCK_ROWS": rows, "BLOCK_K": columns}, num_warps=warps)
        for rows, columns, warps in sizes
        if 8 <= rows * columns // (32 * warps) <= 32
    ]


config.declare("bias_gelu", default=_default, candidates=_candidates)
config.declare("bias_gelu_backward", default=_default_backward, candidates=_candidates)


def _constants(kernel: str, x: Tensor, rows: int, approximate: str) -> dict[str, int]:
    hidden = x.shape[-1]
    chosen = config.choose(kernel, channels=hidden, hidden=0, dtype=x.dtype, rows=rows, device=x.device)
    return {"TANH": approximate == "tanh", "DEGREE": gelu_degree(x.dtype, rounded=True), "K": hidden, **chosen.meta}


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """The raw operator of that name (csrc/operators.cpp)."""
    launch.check_tensors("bias_gelu", "x", x=x, bias=bias)
    y = torch.empty_like(x)
    if x.numel() == 0:
        return y
    rows = x.numel() // x.shape[-1]
    constants = _constants("bias_gelu", x, rows, approximate)
    grid = launch.tiles_of(rows, constants["BLOCK_ROWS"]), launch.tiles_of(x.shape[-1], constants["BLOCK_K"])
    with launch.device_guard(x):
        launch.run(_forward_kernel, grid, x, bias, y, rows, **constants)
    return y


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor]:
    """The raw operator of that name (csrc/operators.cpp)."""
    launch.check_tensors("bias_gelu_backward", "grad", grad=grad, x=x, bias=bias)
    dx = torch.empty_like(x)
    hidden = 0 if bias is None else x.shape[-1]
    if x.numel() == 0:
        return dx, torch.zeros((hidden,), dtype=torch.float32, device=x.device)
    rows = x.numel() // x.shape[-1]
    constants = _constants("bias_gelu_backward", x, rows, approximate)
    columns = launch.tiles_of(x.shape[-1], constants["BLOCK_K"])
    programs = launch.tiles_of(_PROGRAMS_A_MULTIPROCESSOR * launch.chip_of(x).multiprocessors, columns)
    programs = min(programs, launch.tiles_of(rows, constants["BLOCK_ROWS"]))
    partials = torch.empty((programs if hidden else 0, hidden), dtype=torch.float32, device=x.device)
    with launch.device_guard(x):
        launch.run(_backward_kernel, (programs, columns), grad, x, bias, dx, partials, rows, **constants)
        dbias = torch.empty((hidden,), dtype=torch.float32, device=x.device)
        if hidden:
            sum_partials((partials, dbias))
    return dx, dbias
