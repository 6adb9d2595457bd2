"""Depthwise convolution of channels-last maps, forward and backward.

Stride 1, kernel 3 to 11 (7 is the tuned one): a program has one channel a thread and a strip of up to 8 columns, and
walks down the rows. The k * k weights stay in its registers; a row of the input is read once, k - 1 + STRIP values a
thread, and added to the k rows of the output that it meets, a window that turns by a row each step. For k = 7 and a
strip of 8 that is 392 FMA for 14 loads and as many conversions. The input gradient is the same convolution with the
filter turned around, plus the residual's gradient. The weight gradient is the kernel turned inside out: its k * k sums
stay in registers, the window holds k rows of the output's gradient. A program goes through many strips and images, so
that it reads the weights, or writes its sums, only once.

Stride 2 runs in plain kernels of one load an FMA: ConvNeXt has no such layer.

Samples whose sample_scale is 0 are not read. Offsets are 64-bit from one row of the map to the next.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, launch
from .partials import sum_partials

__all__ = ["depthwise_conv2d", "depthwise_conv2d_cast", "depthwise_conv2d_input_grad", "depthwise_conv2d_weight_grad"]

# Programs a multiprocessor is given, each of one warp: about what the registers of the tuned case let it hold.
_PROGRAMS_A_MULTIPROCESSOR = 16

# Left to itself the assembler holds the tuned kernels to the 168 registers of three warps a scheduler, and spills two.
_MOST_REGISTERS = 224

# Rows of a band at least: k - 1 rows around it are read for nothing.
_LEAST_BAND = 14


# --- stride 1


@triton.jit
def _load_row(pointer, width, first, inside, C: tl.constexpr, COUNT: tl.constexpr):
    """Columns first to first + COUNT of a row, as COUNT fp32 vectors; zeros outside of the map."""
    values = ()
    for s in tl.static_range(COUNT):
        column = first + s
        value = tl.load(pointer + s * C, mask=inside & (column >= 0) & (column < width), other=0.0)
        values = values + (value.to(tl.float32),)
    return values


@triton.jit
def _store_row(values, bias, y, residual, offset, width, first, mask, C: tl.constexpr, STRIP: tl.constexpr):
    """The first STRIP of `values`, plus bias and residual, as columns from `first` on."""
    for j in tl.static_range(STRIP):
        inside = mask & (first + j < width)
        value = values[j] + bias
        if residual is not None:
            value += tl.load(residual + offset + j * C, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + offset + j * C, value.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["height", "width", "tasks", "strips", "bands", "band_rows"])
def _convolution_kernel(
    x,
    weight,
    bias,
    residual,
    sample_scale,
    y,
    height,
    width,
    tasks,
    strips,
    bands,
    band_rows,
    C: tl.constexpr,
    K: tl.constexpr,
    FLIP: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    P: tl.constexpr = K // 2
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    if C % BLOCK_C == 0:
        inside = tl.full([BLOCK_C], True, tl.int1)
    zero = tl.zeros([BLOCK_C], tl.float32)

    weights = ()
    for tap in tl.static_range(K * K):
        source = K * K - 1 - tap if FLIP else tap
        value = tl.load(weight + channel * (K * K) + source, mask=inside, other=0.0)
        weights = weights + (value.to(x.dtype.element_ty).to(tl.float32),)
    added = zero
    if bias is not None:
        added = tl.load(bias + channel, mask=inside, other=0.0).to(x.dtype.element_ty).to(tl.float32)

    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        first = (task % strips) * STRIP
        h0 = (task // strips % bands) * band_rows
        h1 = tl.minimum(h0 + band_rows, height)
        sample = task // (strips * bands)
        row_size = width.to(tl.int64) * C
        corner = sample * height * row_size + first * C
        live = True
        if sample_scale is not None:
            live = tl.load(sample_scale + sample) != 0
        if live:
            # window[i * STRIP + j]: row r - P + i of the output, column first + j, as far as it has got.
            window = (zero,) * ((K - 1) * STRIP)
            end = tl.minimum(h1 + P, height)
            for r in range(tl.maximum(h0 - P, 0), end):
                row = corner + r * row_size
                values = _load_row(x + row - P * C + channel, width, first - P, inside, C, STRIP + K - 1)
                turned = ()
                for i in tl.static_range(K):
                    for j in tl.static_range(STRIP):
                        total = zero
                        if i < K - 1:
                            total = window[i * STRIP + j]
                        for kx in tl.static_range(K):
                            total += values[j + kx] * weights[(K - 1 - i) * K + kx]
                        turned = turned + (total,)
                # The row that has met its last row of the input.
                done = row - P * row_size + channel
                _store_row(turned, added, y, residual, done, width, first, inside & (r - P >= h0), C, STRIP)
                window = turned[STRIP:]
            # The last rows of the map meet no further row of the input.
            for i in tl.static_range(P):
                h = end - P + i
                offset = corner + h * row_size + channel
                kept = window[i * STRIP : (i + 1) * STRIP]
                _store_row(kept, added, y, residual, offset, width, first, inside & (h >= h0) & (h < h1), C, STRIP)
        else:
            zeros = (zero,) * STRIP
            for h in range(h0, h1):
                offset = corner + h * row_size + channel
                _store_row(zeros, zero, y, residual, offset, width, first, inside, C, STRIP)


@triton.jit(do_not_specialize=["height", "width", "tasks", "strips", "bands", "band_rows"])
def _weight_gradient_kernel(
    grad,
    x,
    sample_scale,
    partials,
    height,
    width,
    tasks,
    strips,
    bands,
    band_rows,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIP: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    P: tl.constexpr = K // 2
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    if C % BLOCK_C == 0:
        inside = tl.full([BLOCK_C], True, tl.int1)
    zero = tl.zeros([BLOCK_C], tl.float32)
    sums = (zero,) * (K * K)
    bias_sum = zero

    for task in range(tl.program_id(1), tasks, tl.num_programs(1)):
        first = (task % strips) * STRIP
        h0 = (task // strips % bands) * band_rows
        h1 = tl.minimum(h0 + band_rows, height)
        sample = task // (strips * bands)
        row_size = width.to(tl.int64) * C
        corner = sample * height * row_size + first * C
        if sample_scale is not None:  # no row of a dropped sample is read
            h1 = tl.where(tl.load(sample_scale + sample) != 0, h1, h0)
        # window[i * STRIP + j]: row r - P + i of the output's gradient, before row r of the input is met.
        window = (zero,) * ((K - 1) * STRIP)
        for h in range(h0 - P, h0 + P if h0 < h1 else h0 - P):
            row = grad + corner + h * row_size + channel
            mask = inside & (h >= 0) & (h < height)
            window = window[STRIP:] + _load_row(row, width, first, mask, C, STRIP)
        for r in range(h0, h1):
            row = corner + r * row_size + channel
            values = _load_row(x + row - P * C, width, first - P, inside, C, STRIP + K - 1)
            new_mask = inside & (r + P < height)
            window = window + _load_row(grad + row + P * row_size, width, first, new_mask, C, STRIP)
            updated = ()
            for tap in tl.static_range(K * K):
                total = sums[tap]
                for j in tl.static_range(STRIP):
                    total += values[j + tap % K] * window[(K - 1 - tap // K) * STRIP + j]
                updated = updated + (total,)
            sums = updated
            for j in tl.static_range(STRIP):
                bias_sum += window[P * STRIP + j]
            window = window[STRIP:]

    out = partials + tl.program_id(1).to(tl.int64) * ((K * K + 1) * C) + channel
    for tap in tl.static_range(K * K):
        tl.store(out + tap * C, sums[tap], mask=inside)
    tl.store(out + K * K * C, bias_sum, mask=inside)


# --- any stride


@triton.jit(do_not_specialize=["in_height", "in_width", "out_height", "out_width", "pixels"])
def _gather_kernel(
    x,
    weight,
    bias,
    residual,
    sample_scale,
    y,
    in_height,
    in_width,
    out_height,
    out_width,
    pixels,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y of `pixels` pixels in all from x; TRANSPOSED is the input gradient: x is the output's gradient."""
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    pixel = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    present = pixel < pixels
    column = (pixel % out_width).to(tl.int32)
    row = (pixel // out_width % out_height).to(tl.int32)
    sample = pixel // out_width // out_height
    read = present
    if sample_scale is not None:
        read = present & (tl.load(sample_scale + sample, mask=present, other=0.0) != 0)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tap in range(K * K):
        if TRANSPOSED:
            h = row + K // 2 - tap // K
            w = column + K // 2 - tap % K
            met = (h >= 0) & (w >= 0) & (h % STRIDE == 0) & (w % STRIDE == 0)
            h = h // STRIDE
            w = w // STRIDE
        else:
            h = row * STRIDE + tap // K - K // 2
            w = column * STRIDE + tap % K - K // 2
            met = (h >= 0) & (w >= 0)
        met = met & read & (h < in_height) & (w < in_width)
        place = (sample * in_height + h) * in_width + w
        mask = met[:, None] & inside[None, :]
        value = tl.load(x + place[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight + channel * (K * K) + tap, mask=inside, other=0.0)
        total += value * factor.to(x.dtype.element_ty).to(tl.float32)[None, :]
    if bias is not None:
        added = tl.load(bias + channel, mask=inside, other=0.0).to(x.dtype.element_ty).to(tl.float32)
        total += tl.where(read[:, None], added[None, :], 0.0)
    mask = present[:, None] & inside[None, :]
    offset = pixel[:, None] * C + channel[None, :]
    if residual is not None:
        total += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + offset, total.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["in_height", "in_width", "out_height", "out_width", "pixels"])
def _strided_weight_gradient_kernel(
    grad,
    x,
    sample_scale,
    partials,
    in_height,
    in_width,
    out_height,
    out_width,
    pixels,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One tap a program; tap K * K is the bias."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    tap = tl.program_id(2)
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(1).to(tl.int64), tl.cdiv(pixels, BLOCK_P), tl.num_programs(1)):
        pixel = tile * BLOCK_P + tl.arange(0, BLOCK_P)
        met = pixel < pixels
        column = pixel % out_width
        row = pixel // out_width % out_height
        sample = pixel // out_width // out_height
        if sample_scale is not None:
            met = met & (tl.load(sample_scale + sample, mask=met, other=0.0) != 0)
        mask = met[:, None] & inside[None, :]
        value = tl.load(grad + pixel[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if tap < K * K:
            h = row * STRIDE + tap // K - K // 2
            w = column * STRIDE + tap % K - K // 2
            met = met & (h >= 0) & (w >= 0) & (h < in_height) & (w < in_width)
            place = (sample * in_height + h) * in_width + w
            mask = met[:, None] & inside[None, :]
            value *= tl.load(x + place[:, None] * C + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        total += value
    out = partials + (tl.program_id(1).to(tl.int64) * (K * K + 1) + tap) * C + channel
    tl.store(out, tl.sum(total, 0), mask=inside)


# --- configurations and launches


def _default(problem: config.Problem) -> config.Config:
    """`hidden` is the kernel size. Registers: k * k weights, a window of k rows, the row at hand."""
    return config.Config({"STRIP": 8 if problem.hidden <= 7 else 4, "BLOCK_C": 32}, num_warps=1)


def _candidates(problem: config.Problem) -> list[config.Config]:
    sizes = [(4, 32, 1), (7, 32, 1), (8, 32, 1), (4, 64, 1), (2, 64, 1), (4, 64, 2), (8, 64, 2), (8, 128, 4)]
    return [config.Config({"STRIP": strip, "BLOCK_C": block}, num_warps=warps) for strip, block, warps in sizes]


config.declare("depthwise_conv", default=_default, candidates=_candidates)
config.declare("depthwise_conv_weight_gradient", default=_default, candidates=_candidates)


def _channels_last(operator: str, first: str, **tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors as (N, H, W, C), checked to be dense that way."""
    rows = {name: None if t is None else t.permute(0, 2, 3, 1) for name, t in tensors.items()}
    launch.check_tensors(operator, first, **rows)
    return list(rows.values())


def _plan(kernel: str, like: Tensor, kernel_size: int) -> tuple[tuple[int, int], tuple[int, ...], dict[str, Any]]:
    """The grid; height, width, tasks, strips, bands and rows of a band; the constants. `like` is (N, H, W, C)."""
    n, height, width, channels = like.shape
    chosen = config.choose(
        kernel,
        channels=channels,
        hidden=kernel_size,
        dtype=like.dtype,
        rows=n * height * width,
        device=like.device,
    )
    strips = launch.tiles_of(width, chosen["STRIP"])
    channel_blocks = launch.tiles_of(channels, chosen["BLOCK_C"])
    programs = _PROGRAMS_A_MULTIPROCESSOR * launch.chip_of(like).multiprocessors
    # Whole columns where there are enough of them to go round, bands of them otherwise.
    wanted = launch.tiles_of(programs, max(1, n * strips * channel_blocks))
    bands = max(1, min(wanted, height // _LEAST_BAND))
    band_rows = launch.tiles_of(height, bands)
    bands = launch.tiles_of(height, band_rows)
    tasks = n * strips * bands
    grid = (channel_blocks, min(tasks, launch.tiles_of(programs, channel_blocks)))
    constants = {
        "C": channels,
        "K": kernel_size,
        "maxnreg": _MOST_REGISTERS,
        **chosen.meta,
        "STRIP": launch.tiles_of(width, strips),  # not wider than it need be: 28 columns are 4 strips of 7
    }
    return grid, (height, width, tasks, strips, bands, band_rows), constants


def _strided_blocks(channels: int) -> dict[str, int]:
    return {"BLOCK_P": 16, "BLOCK_C": min(64, max(16, launch.next_power_of_2(channels))), "num_warps": 4}


def why_not(operator: str, *arguments: Any) -> str | None:
    """Why these arguments cannot be taken, the tensors' dtype and device apart; None where they can."""
    if operator == "depthwise_conv2d_cast" and arguments[3] not in launch.DTYPES:
        return f"Triton kernels compute in float32, float16 and bfloat16, not {arguments[3]}"
    return None


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, sample_scale: Tensor | None
) -> Tensor:
    """The raw operator of that name (csrc/operators.cpp)."""
    name = "depthwise_conv2d"
    (rows,) = _channels_last(name, "x", x=x)
    launch.check_tensors(name, "x", x=rows, weight=weight, bias=bias, sample_scale=sample_scale)
    n, height, width, channels = rows.shape
    kernel_size = weight.shape[-1]
    out_height, out_width = (height - 1) // stride + 1, (width - 1) // stride + 1
    y = x.new_empty((n, out_height, out_width, channels))
    with launch.device_guard(x):
        if stride == 1:
            grid, shape, constants = _plan("depthwise_conv", rows, kernel_size)
            tensors = rows, weight, bias, None, sample_scale, y
            launch.run(_convolution_kernel, grid, *tensors, *shape, FLIP=False, **constants)
        else:
            shape = (height, width, out_height, out_width, n * out_height * out_width)
            blocks = _strided_blocks(channels)
            grid = launch.tiles_of(shape[-1], blocks["BLOCK_P"]), launch.tiles_of(channels, blocks["BLOCK_C"])
            constants = {"C": channels, "K": kernel_size, "STRIDE": stride, "TRANSPOSED": False, **blocks}
            launch.run(_gather_kernel, grid, rows, weight, bias, None, sample_scale, y, *shape, **constants)
    return y.permute(0, 3, 1, 2)


def depthwise_conv2d_cast(
    x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, sample_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The raw operator of that name (csrc/operators.cpp): the cast is a pass of PyTorch's before the convolution."""
    x_copy = x.to(dtype, copy=True, memory_format=torch.channels_last)
    return depthwise_conv2d(x_copy, weight, bias, 1, sample_scale), x_copy


def depthwise_conv2d_input_grad(
    grad: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    stride: int,
    output_padding: list[int],
    sample_scale: Tensor | None,
) -> Tensor:
    """The raw operator of that name (csrc/operators.cpp)."""
    name = "depthwise_conv2d_input_grad"
    rows, residual_rows = _channels_last(name, "grad", grad=grad, residual=residual)
    launch.check_tensors(name, "grad", grad=rows, weight=weight, sample_scale=sample_scale)
    n, out_height, out_width, channels = rows.shape
    kernel_size = weight.shape[-1]
    height, width = ((size - 1) * stride + 1 + p for size, p in zip((out_height, out_width), output_padding))
    dx = grad.new_empty((n, height, width, channels), dtype=grad.dtype if residual is None else residual.dtype)
    with launch.device_guard(grad):
        if stride == 1:
            grid, shape, constants = _plan("depthwise_conv", rows, kernel_size)
            tensors = rows, weight, None, residual_rows, sample_scale, dx
            launch.run(_convolution_kernel, grid, *tensors, *shape, FLIP=True, **constants)
        else:
            shape = (out_height, out_width, height, width, n * height * width)
            blocks = _strided_blocks(channels)
            grid = launch.tiles_of(shape[-1], blocks["BLOCK_P"]), launch.tiles_of(channels, blocks["BLOCK_C"])
            constants = {"C": channels, "K": kernel_size, "STRIDE": stride, "TRANSPOSED": True, **blocks}
            launch.run(_gather_kernel, grid, rows, weight, None, residual_rows, sample_scale, dx, *shape, **constants)
    return dx.permute(0, 3, 1, 2)


def depthwise_conv2d_weight_grad(
    grad: Tensor, x: Tensor, kernel_size: int, stride: int, sample_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The raw operator of that name (csrc/operators.cpp)."""
    name = "depthwise_conv2d_weight_grad"
    grad_rows, rows = _channels_last(name, "grad", grad=grad, x=x)
    launch.check_tensors(name, "grad", grad=grad_rows, sample_scale=sample_scale)
    n, height, width, channels = rows.shape
    taps = kernel_size * kernel_size
    dweight = grad.new_empty((channels, 1, kernel_size, kernel_size), dtype=torch.float32)
    dbias = grad.new_empty((channels,), dtype=torch.float32)
    if n == 0:
        return dweight.zero_(), dbias.zero_()
    with launch.device_guard(grad):
        if stride == 1:
            grid, shape, constants = _plan("depthwise_conv_weight_gradient", rows, kernel_size)
            partials = grad.new_empty((grid[1], (taps + 1) * channels), dtype=torch.float32)
            tensors = grad_rows, rows, sample_scale, partials
            launch.run(_weight_gradient_kernel, grid, *tensors, *shape, **constants)
        else:
            pixels = grad_rows.shape[0] * grad_rows.shape[1] * grad_rows.shape[2]
            blocks = _strided_blocks(channels)
            chunks = min(64, launch.tiles_of(pixels, blocks["BLOCK_P"]))
            partials = grad.new_empty((chunks, (taps + 1) * channels), dtype=torch.float32)
            shape = (height, width, grad_rows.shape[1], grad_rows.shape[2], pixels)
            grid = launch.tiles_of(channels, blocks["BLOCK_C"]), chunks, taps + 1
            constants = {"C": channels, "K": kernel_size, "STRIDE": stride, **blocks}
            tensors = grad_rows, rows, sample_scale, partials
            launch.run(_strided_weight_gradient_kernel, grid, *tensors, *shape, **constants)
        of_weight, of_bias = partials.split((taps * channels, channels), 1)
        sum_partials((of_weight, dweight), (of_bias, dbias), inner=channels)
    return dweight, dbias
