"""layer_norm_mlp by Triton kernels: residual + sample_scale * layer_scale * MLP(LayerNorm(z)), csrc/operators.cpp.

Two forms, and the configuration says which runs: `mlp_fused` (16-bit, C up to 384: nothing of size 4 C is written) and
`mlp_two_kernels` (any C). Statistics and accumulation are fp32. Parameters may be of another dtype than z: the weights
of the products are cast once a call, vectors where they are read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .._cast import cast
from . import config, grn, launch
from .device import gelu_degree
from .mlp_fused import fused_kernel, squares_kernel
from .mlp_two_kernels import fc1_kernel, fc2_kernel, norm_kernel

__all__ = ["FUSED_CHANNELS", "layer_norm_mlp", "why_not"]

#: The widest row that the fused form holds in registers.
FUSED_CHANNELS = 384

#: The two-kernel form takes rows (with GRN: images) in chunks whose a and g are within this many bytes.
WORKSPACE_BYTES = 256 << 20

#: In GRN, tiles begin anew at every image where that adds at most this share of rows: then an image's factors are one
#: vector a tile, else a matrix.
PER_SAMPLE_WASTE = 1 / 7


# --- configurations. None has been timed on a GPU; each compiles with next to no stack (tests/test_triton_mlp.py).
#     The reasons are arithmetic. A fused tile of M rows multiplies M FLOP for a byte of weights from L2, which has some
#     24 bytes a cycle for each multiprocessor of a Hopper: 64 rows keep up where GELU is the longer part (C up to 128),
#     C = 192 wants 128, and at C = 384 two kernels should be faster. GRN by the fused form computes the first product
#     and GELU twice, 56 instructions a hidden number where two kernels have 35 and 26 C bytes a row: a quarter longer
#     on sm_90 at any C. Below 64 channels the two kernels' tiles of 128 columns do not fit.

_HOPPER_AND_LATER = (90, 100, 103, 110)  # wgmma or tcgen05, and 227 KB of shared memory; sm_120 has neither


def _default_form(problem: config.Problem) -> config.Config:
    # fp32 products run without tensor cores and hold their operands in registers: a fused tile would not fit.
    return config.Config({"FUSED": int(problem.dtype.itemsize == 2 and problem.channels <= 256)})


def _default_grn_form(problem: config.Problem) -> config.Config:
    return config.Config({"FUSED": int(problem.dtype.itemsize == 2 and problem.channels < 64)})


def _default_fused(problem: config.Problem) -> config.Config:
    width = sum(launch.column_pieces(problem.channels))
    if problem.chip in _HOPPER_AND_LATER:
        if width <= 128:
            third = problem.chip == 90 and width <= 96 and problem.dtype == torch.bfloat16
            return config.of_rows(64, 64, warps=4, programs=3 if third else 1)
        return config.of_rows(128, 64, warps=8) if width <= 192 else config.of_rows(64, 32, warps=8)
    if width <= 128:
        return config.of_rows(64, 32, warps=4)
    if width <= 192:
        return config.of_rows(64, 16, warps=8)
    return config.of_rows(64 if width <= 256 else 32, 32, warps=8)


def _default_grn_fused(problem: config.Problem) -> config.Config:
    if sum(launch.column_pieces(problem.channels)) > 128:
        return _default_fused(problem)
    return config.of_rows(64, 64, warps=4) if problem.chip in _HOPPER_AND_LATER else config.of_rows(64, 32, warps=8)


def _default_squares(problem: config.Problem) -> config.Config:
    width = sum(launch.column_pieces(problem.channels))
    narrow = width <= (192 if problem.chip in _HOPPER_AND_LATER else 128)
    return config.of_rows(64, 32, warps=4 if narrow else 8)


def _product(m: int, n: int, k: int, programs: int, tma: bool, warps: int, stages: int) -> config.Config:
    """PROGRAMS: blocks a multiprocessor that the persistent kernel launches."""
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8, "PROGRAMS": programs, "TMA": int(tma)}
    return config.Config(blocks, num_warps=warps, num_stages=stages)


def _default_fc1(problem: config.Problem) -> config.Config:
    if problem.dtype.itemsize == 4:  # a depth of 32 takes more registers than two blocks have
        return _product(64, 64, 16, 2, False, 8, 2)
    if problem.chip in _HOPPER_AND_LATER:
        return _product(128, 128, 64, 2, True, 8, 3)
    return _product(128, 128, 32, 2, False, 8, 3)


def _default_fc2(problem: config.Problem) -> config.Config:
    # No GELU to hide: one large tile a multiprocessor, where there are rows enough for that. Else two: while one reads
    # the residual and writes y, the other multiplies.
    tensor_cores = problem.dtype.itemsize == 2 and problem.chip in _HOPPER_AND_LATER
    if tensor_cores and problem.channels % 256 == 0 and problem.rows > 8192:
        return _product(128, 256, 64, 1, True, 8, 3)
    return _default_fc1(problem)


def _fused_candidates(problem: config.Problem) -> Iterator[config.Config]:
    for block_m, warps in ((64, 4), (64, 8), (128, 8)):
        for block_k in (32, 64):
            for stages in (2, 3):
                yield config.of_rows(block_m, block_k, warps, stages)
    for block_m, block_k, warps, programs in ((64, 64, 4, 3), (64, 32, 4, 4), (128, 64, 8, 2), (128, 32, 8, 2)):
        yield config.of_rows(block_m, block_k, warps, programs=programs)


def _product_candidates(problem: config.Problem) -> Iterator[config.Config]:
    if problem.dtype.itemsize == 4:
        for m, k, stages in ((64, 16, 2), (64, 32, 3), (128, 16, 2)):
            yield _product(m, 64, k, 2, False, 8, stages)
        return
    for tma in (False, True) if problem.chip >= 90 else (False,):
        for m, n, k, programs, warps, stages in (
            (128, 256, 64, 1, 8, 3),
            (128, 128, 64, 1, 8, 4),
            (128, 128, 64, 2, 8, 3),
            (128, 128, 32, 2, 8, 4),
            (128, 64, 64, 2, 4, 3),
            (64, 256, 64, 1, 8, 3),
            (64, 128, 64, 2, 4, 3),
            (64, 64, 64, 3, 4, 3),
        ):
            yield _product(m, n, k, programs, tma, warps, stages)


def _form_candidates(problem: config.Problem) -> Iterator[config.Config]:
    yield config.Config({"FUSED": 0})
    if problem.dtype.itemsize == 2 and problem.channels <= FUSED_CHANNELS:
        yield config.Config({"FUSED": 1})


config.declare("mlp_form", default=_default_form, candidates=_form_candidates)
config.declare("mlp_grn_form", default=_default_grn_form, candidates=_form_candidates)
config.declare("mlp_fused", default=_default_fused, candidates=_fused_candidates)
config.declare("mlp_grn_fused", default=_default_grn_fused, candidates=_fused_candidates)
config.declare("mlp_squares", default=_default_squares, candidates=_fused_candidates)
config.declare("mlp_fc1", default=_default_fc1, candidates=_product_candidates)
config.declare("mlp_fc2", default=_default_fc2, candidates=_product_candidates)


# --- what it takes


def why_not(operator: str, *arguments: Any) -> str | None:
    """Why these arguments cannot be taken, dtype and device apart; None where they can."""
    return launch.why_not_mlp(operator, arguments[0], arguments[4])


def _check(
    z: Tensor, approximate: str, out_dtype: torch.dtype, shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]]
) -> None:
    operator = "layer_norm_mlp"
    launch.check_tensors(operator, "z", z=z, **{name: tensor for name, (tensor, _) in shapes.items()})
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            launch.fail(operator, name, f"shape {tuple(shape)}", f"shape {tuple(tensor.shape)}")
    if approximate not in ("none", "tanh"):
        launch.fail(operator, "approximate", "'none' or 'tanh'", repr(approximate))
    if out_dtype not in launch.DTYPES:
        launch.fail(operator, "out_dtype", "float32, float16 or bfloat16", out_dtype)


# --- the operator


def layer_norm_mlp(
    z: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None,
    sample_scale: Tensor | None,
    eps: float,
    approximate: str,
    out_dtype: torch.dtype,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The raw operator: y, mean, rstd and the hidden tensor, which is empty unless `keep_hidden`.

    z (N, ..., C) fp32, fp16 or bf16 with C and K multiples of 8; `sample_scale` fp32.

    Raises:
        RuntimeError: an argument that the kernels cannot take, by name.
    """
    channels, hidden_columns = z.shape[-1], fc1_weight.shape[0]
    vector, hidden_vector = (channels,), (hidden_columns,)
    _check(
        z,
        approximate,
        out_dtype,
        {
            "residual": (residual, z.shape),
            "norm_weight": (norm_weight, vector),
            "norm_bias": (norm_bias, vector),
            "fc1_weight": (fc1_weight, (hidden_columns, channels)),
            "fc1_bias": (fc1_bias, hidden_vector),
            "grn_weight": (grn_weight, hidden_vector),
            "grn_bias": (grn_bias, hidden_vector),
            "fc2_weight": (fc2_weight, (channels, hidden_columns)),
            "fc2_bias": (fc2_bias, vector),
            "layer_scale": (layer_scale, vector),
            "sample_scale": (sample_scale, z.shape[:1]),
        },
    )
    launch.check_mlp("layer_norm_mlp", z, fc1_weight)
    if (grn_weight is None) != (grn_bias is None):
        launch.fail("layer_norm_mlp", "grn_weight", "both of grn_weight and grn_bias, or neither", "one")

    y = torch.empty(z.shape, dtype=out_dtype, device=z.device)
    mean = torch.empty(z.shape[:-1], dtype=torch.float32, device=z.device)
    rstd = torch.empty(z.shape[:-1], dtype=torch.float32, device=z.device)
    hidden = z.new_empty((*z.shape[:-1], hidden_columns) if keep_hidden else (0,))
    if mean.numel():
        with launch.device_guard(z):
            weights = cast((fc1_weight, fc2_weight), (z.dtype, z.dtype))
            call = _Call(
                z=z,
                residual=residual,
                norm=(norm_weight, norm_bias),
                fc1=(weights[0], fc1_bias),
                grn=(grn_weight, grn_bias),
                fc2=(weights[1], fc2_bias),
                layer_scale=layer_scale,
                sample_scale=sample_scale,
                order=(None, None) if sample_scale is None else launch.sample_order(sample_scale),
                eps=float(eps),
                math={"C": channels, "K": hidden_columns},
                gelu={"TANH": approximate == "tanh", "DEGREE": gelu_degree(z.dtype)},
                y=y,
                mean=mean,
                rstd=rstd,
                hidden=hidden if keep_hidden else None,
            )
            if call.choose("mlp_form" if grn_weight is None else "mlp_grn_form")["FUSED"]:
                _run_fused(call)
            else:
                _run_two_kernels(call)
    return y, mean, rstd, hidden


@dataclasses.dataclass(slots=True)
class _Call:
    """The operator's arguments and results; weights in z's dtype."""

    z: Tensor
    residual: Tensor | None
    norm: tuple[Tensor | None, Tensor | None]
    fc1: tuple[Tensor, Tensor | None]
    grn: tuple[Tensor | None, Tensor | None]
    fc2: tuple[Tensor, Tensor | None]
    layer_scale: Tensor | None
    sample_scale: Tensor | None
    order: tuple[Tensor | None, Tensor | None]  # and the number of live samples
    eps: float
    math: dict[str, Any]  # constants of every product
    gelu: dict[str, bool]
    y: Tensor
    mean: Tensor
    rstd: Tensor
    hidden: Tensor | None

    @property
    def rows(self) -> int:
        return self.mean.numel()

    @property
    def rows_per_sample(self) -> int:
        return self.mean.numel() // self.mean.shape[0]

    def choose(self, kernel: str) -> config.Config:
        z, hidden = self.z, self.math["K"]
        return config.choose(
            kernel, channels=z.shape[-1], hidden=hidden, dtype=z.dtype, rows=self.rows, device=z.device
        )

    def tiles_per_sample(self, block_m: int) -> bool:
        """Whether tiles begin anew at every image: GRN alone asks, and large images say yes."""
        if self.grn[0] is None:
            return False
        padded = launch.tiles_of(self.rows_per_sample, block_m) * block_m
        return padded <= (1 + PER_SAMPLE_WASTE) * self.rows_per_sample


def _factors_of(
    call: _Call, images: int, live_count: Tensor | None, block_m: int, tiles: int, dtype: torch.dtype
) -> tuple[Tensor, Callable[[], Tensor]]:
    """GRN: a buffer for the partial sums of `tiles` row tiles, and what makes factors (images, K) in `dtype` of it."""
    per_sample, per_image = call.tiles_per_sample(block_m), call.rows_per_sample
    shape = grn.partials_shape(tiles, call.math["K"], block_m, per_image, per_sample)
    partials = torch.empty(shape, dtype=torch.float32, device=call.z.device)

    def finish() -> Tensor:
        factors = torch.empty((images, call.math["K"]), dtype=dtype, device=call.z.device)
        grn.launch_factors(partials, call.grn[0], live_count, factors, per_image, block_m, per_sample)
        return factors

    return partials, finish


def _run_fused(call: _Call) -> None:
    first, second = launch.column_pieces(call.z.shape[-1])
    constants = {**call.math, **call.gelu, "C0": first, "C1": second}
    order, live_count = call.order
    factors = None
    if call.grn[0] is not None:
        chosen = call.choose("mlp_squares")
        block_m = chosen["BLOCK_M"]
        per_sample = call.tiles_per_sample(block_m)
        tiles = launch.row_tiles(call.rows, call.rows_per_sample, block_m, per_sample)
        partials, finish = _factors_of(call, call.z.shape[0], live_count, block_m, tiles, torch.float32)
        images = grn.images_in_tile(block_m, call.rows_per_sample, per_sample)
        launch.run(
            squares_kernel,
            (tiles,),
            call.z,
            *call.norm,
            *call.fc1,
            live_count,
            order,
            partials,
            call.rows,
            call.rows_per_sample,
            call.eps,
            **constants,
            **launch.constants_of(chosen.meta),
            PER_SAMPLE=per_sample,
            IMAGES=images,
        )
        factors = finish()
    chosen = call.choose("mlp_fused" if factors is None else "mlp_grn_fused")
    per_sample = call.tiles_per_sample(chosen["BLOCK_M"])
    launch.run(
        fused_kernel,
        (launch.row_tiles(call.rows, call.rows_per_sample, chosen["BLOCK_M"], per_sample),),
        call.z,
        call.residual,
        *call.norm,
        *call.fc1,
        factors,
        call.grn[1],
        *call.fc2,
        call.layer_scale,
        call.sample_scale,
        order,
        call.y,
        call.mean,
        call.rstd,
        call.hidden,
        call.rows,
        call.rows_per_sample,
        call.eps,
        **constants,
        **launch.constants_of(chosen.meta, bounded=call.hidden is None),  # storing h takes registers of its own
        PER_SAMPLE=per_sample,
    )


def _run_two_kernels(call: _Call) -> None:
    z, per_image, has_grn = call.z, call.rows_per_sample, call.grn[0] is not None
    channels, hidden_columns = call.math["C"], call.math["K"]
    order, live_count = call.order
    chip = launch.chip_of(z)
    first_piece, second_piece = launch.column_pieces(channels)
    norm_rows = max(1, 4096 >> (channels - 1).bit_length())
    fc1, fc2 = call.choose("mlp_fc1"), call.choose("mlp_fc2")

    unit = per_image if has_grn else 128
    row_bytes = (channels + hidden_columns) * z.element_size()
    most = max(1, WORKSPACE_BYTES // (row_bytes * unit)) * unit
    chunk = (
        launch.tiles_of(launch.tiles_of(call.rows, launch.tiles_of(call.rows, most)), unit) * unit
    )  # all about the same
    chunk = min(chunk, call.rows)
    a = z.new_empty((chunk, channels))
    g = z.new_empty((chunk, hidden_columns))
    for first in range(0, call.rows, chunk):
        rows = min(chunk, call.rows - first)
        where = (first, rows, per_image)
        launch.run(
            norm_kernel,
            (launch.tiles_of(rows, norm_rows),),
            z,
            call.residual,
            *call.norm,
            live_count,
            order,
            a,
            call.y,
            call.mean,
            call.rstd,
            call.hidden,
            *where,
            call.eps,
            C=channels,
            K=hidden_columns,
            C0=first_piece,
            C1=second_piece,
            BLOCK_M=norm_rows,
            BLOCK_K=max(16, 4096 // norm_rows),
            num_warps=4 if channels <= 4096 else 16,
        )

        per_sample = call.tiles_per_sample(fc1["BLOCK_M"])
        tiles = launch.row_tiles(rows, per_image, fc1["BLOCK_M"], per_sample)
        partials = finish = factors = None
        if has_grn:
            images = rows // per_image
            chunk_live = None if live_count is None else (live_count - first // per_image).clamp_(0, images)
            partials, finish = _factors_of(call, images, chunk_live, fc1["BLOCK_M"], tiles, z.dtype)
        launch.run(
            fc1_kernel,
            _persistent(fc1, tiles, hidden_columns, chip),
            *_tiled(fc1, a, call.fc1[0]),
            call.fc1[1],
            g,
            call.hidden,
            partials,
            live_count,
            order,
            *where,
            **call.math,
            **call.gelu,
            # With GRN's sums the compiler would take more, and need not where operands are in shared memory.
            **launch.constants_of(fc1.meta, bounded=has_grn and chip.capability == 90),
            PER_SAMPLE=per_sample,
            IMAGES=grn.images_in_tile(fc1["BLOCK_M"], per_image, per_sample),
        )
        if finish is not None:
            factors = finish()

        per_sample = call.tiles_per_sample(fc2["BLOCK_M"])
        tiles = launch.row_tiles(rows, per_image, fc2["BLOCK_M"], per_sample)
        rows_operand, weight = _tiled(fc2, g, call.fc2[0])
        launch.run(
            fc2_kernel,
            _persistent(fc2, tiles, channels, chip),
            rows_operand,
            call.residual,
            factors,
            call.grn[1],
            weight,
            call.fc2[1],
            call.layer_scale,
            call.sample_scale,
            live_count,
            order,
            call.y,
            *where,
            **call.math,
            **launch.constants_of(fc2.meta, bounded=chip.capability == 90),
            PER_SAMPLE=per_sample,
        )


def _persistent(chosen: config.Config, row_tiles: int, columns: int, chip: launch.Chip) -> tuple[int]:
    """As many programs as run at once, or as there are tiles."""
    return (min(row_tiles * launch.tiles_of(columns, chosen["BLOCK_N"]), chosen["PROGRAMS"] * chip.multiprocessors),)


def _tiled(chosen: config.Config, rows: Tensor, weight: Tensor) -> tuple[Any, Any]:
    """The operands of a product rows @ weight^T as the kernels load them: descriptors for TMA, or the tensors."""
    if not chosen["TMA"]:
        return rows, weight
    depth = chosen["BLOCK_K"]
    if weight.data_ptr() % 16:  # a parameter that is a slice of something: TMA reads from multiples of 16 bytes
        weight = weight.clone()
    return (
        TensorDescriptor.from_tensor(rows, [chosen["BLOCK_M"], depth]),
        TensorDescriptor.from_tensor(weight, [chosen["BLOCK_N"], depth]),
    )
