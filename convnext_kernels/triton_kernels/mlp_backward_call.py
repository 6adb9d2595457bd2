"""One call of layer_norm_mlp_backward: which sums it needs, its chunks and buffers, and what it launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import GRN_EPS
from . import config, launch
from .device import gelu_degree
from .mlp_backward_config import MOST_ROW_COLUMNS, weight_splits
from .mlp_backward_passes import grn_activation_kernel, grn_factors_kernel, norm_backward_kernel, prepare_kernel
from .mlp_backward_products import hidden_gradients_kernel, input_gradient_kernel, weight_gradient_kernel
from .mlp_backward_rows import norm_gradient_kernel, row_gradients_kernel
from .mlp_backward_weights import fold_weights_kernel, parameter_gradients_kernel
from .partials import sum_partials

__all__ = ["MlpBackward"]

# Bits of output_mask.
_Z, _NORM_WEIGHT, _NORM_BIAS, _FC1_WEIGHT, _FC1_BIAS, _GRN_WEIGHT, _GRN_BIAS, _FC2_WEIGHT, _FC2_BIAS, _LAYER_SCALE = (
    range(10)
)

_ACTIVATION_ROWS, _ACTIVATION_COLUMNS = 16, 128  # a step of GRN's second pass
_SEGMENT_ROWS = 256  # of an image, for a program of it


class _Chunk(NamedTuple):
    first: int  # row, in the order of the samples
    rows: int


class MlpBackward:
    """One call of the operator, whose arguments have been checked."""

    def __init__(
        self, grad, z, mean, rstd, hidden, norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias,
        fc2_weight, fc2_bias, layer_scale, sample_scale, approximate, wanted, results,
    ):  # fmt: skip
        self.grad, self.z, self.mean, self.rstd = grad, z, mean, rstd
        self.kept = hidden if hidden.dim() != 1 else None
        self.norm_weight, self.norm_bias = norm_weight, norm_bias
        self.grn_weight, self.grn_bias = grn_weight, grn_bias
        self.fc2_weight, self.fc2_bias, self.layer_scale = fc2_weight, fc2_bias, layer_scale
        self.sample_scale, self.tanh, self.wanted, self.results = sample_scale, approximate == "tanh", wanted, results
        self.dtype = z.dtype
        self.channels, self.hidden = z.shape[-1], fc1_weight.shape[0]
        self.rows = mean.numel()
        self.rows_per_sample = self.rows // z.shape[0]
        self.order = self.live_count = None
        if sample_scale is not None:
            self.order, self.live_count = launch.sample_order(sample_scale)

        self.fc1_bias_sums = (  # db1
            wanted[_FC1_BIAS] or wanted[_NORM_BIAS] or (wanted[_FC1_WEIGHT] and norm_bias is not None)
        )
        # T, in whose kernel db1 is made.
        self.fc1_sums = wanted[_FC1_WEIGHT] or wanted[_NORM_WEIGHT] or self.fc1_bias_sums
        self.fc2_sums = wanted[_FC2_WEIGHT] or wanted[_LAYER_SCALE]  # G
        self.branch_sums = wanted[_FC2_BIAS] or (wanted[_LAYER_SCALE] and fc2_bias is not None)
        self.grad_hidden = wanted[_Z] or self.fc1_sums  # dh
        self.grad_activated = self.grad_hidden or wanted[_GRN_WEIGHT] or wanted[_GRN_BIAS]  # dg
        self.any_hidden = self.grad_activated or self.fc2_sums
        recomputed = self.kept is None and self.any_hidden
        self.normalised = self.fc1_sums or recomputed  # hat
        self.copied = self.any_hidden and (sample_scale is not None or grad.dtype != self.dtype)  # u

        self.given_fc1_weight, self.given_fc1_bias = fc1_weight, fc1_bias
        self.fc1_weight = self.fc1_factor = self.fc1_bias = self.folded_fc2_weight = self.fc2_factor = None
        self.fold(recomputed or wanted[_Z], self.grad_activated)

    def config(self, kernel: str) -> dict[str, int]:
        chosen = config.choose(
            kernel, channels=self.channels, hidden=self.hidden, dtype=self.dtype, rows=self.rows, device=self.z.device
        )
        return dict(chosen.meta)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.z.device)

    def result(self, gradient: int) -> Tensor | None:
        return self.results[gradient] if self.wanted[gradient] else None

    def fold(self, fc1: bool, fc2: bool) -> None:
        """The weights that the products read, LayerNorm's affine part and layer scale in them."""
        if fc1 and self.norm_weight is None and self.norm_bias is None:
            self.fc1_weight, self.fc1_bias = self.given_fc1_weight.to(self.dtype), self.given_fc1_bias
            fc1 = False
        if fc2 and self.layer_scale is None:
            self.folded_fc2_weight = self.fc2_weight.to(self.dtype)
            fc2 = False
        if not fc1 and not fc2:
            return
        if fc1:
            self.fc1_weight = self.new(self.hidden, self.channels, dtype=self.dtype)
            self.fc1_bias = self.new(self.hidden)
            if self.norm_weight is not None and self.dtype == torch.float16:
                self.fc1_factor = self.new(1)
        if fc2:
            self.folded_fc2_weight = self.new(self.channels, self.hidden, dtype=self.dtype)
            if self.dtype == torch.float16:
                self.fc2_factor = self.new(1)
        columns = launch.next_power_of_2(self.channels)
        fc1_rows, block_c, block_k = max(1, min(16, 4096 // columns)), 16, 128
        fc1_tiles = launch.tiles_of(self.hidden, fc1_rows) if fc1 else 0
        fc2_tiles = launch.tiles_of(self.channels, block_c) * launch.tiles_of(self.hidden, block_k) if fc2 else 0
        launch.run(
            fold_weights_kernel,
            (fc1_tiles + fc2_tiles,),
            self.given_fc1_weight,
            self.given_fc1_bias,
            self.norm_weight,
            self.norm_bias,
            self.fc1_weight if fc1 else None,
            self.fc1_factor,
            self.fc1_bias if fc1 else None,
            self.fc2_weight,
            self.layer_scale,
            self.folded_fc2_weight if fc2 else None,
            self.fc2_factor,
            C=self.channels,
            K=self.hidden,
            COLUMNS=columns,
            FC1_TILES=fc1_tiles,
            FC1_ROWS=fc1_rows,
            BLOCK_C=block_c,
            BLOCK_K=block_k,
            num_warps=4,
        )

    # --- the plan

    def plan(self, workspace_bytes: int) -> list[_Chunk]:
        """Chooses the tiles, allocates the buffers and parts, and returns the chunks that the buffers hold."""
        c, k, grn = self.channels, self.hidden, self.grn_weight is not None
        form = "_kept" if self.kept is not None else "_grn" if grn else ""
        self.weight_tiles = self.config("mlp_backward_weight")
        self.norm_pieces = launch.column_pieces(c)
        self.fused_norm = sum(self.norm_pieces) <= MOST_ROW_COLUMNS
        # dz where dh is made; GRN's dh needs the sums over the image first.
        self.fused_rows = (
            self.wanted[_Z] and not grn and self.fused_norm and bool(self.config("mlp_backward_form")["FUSED"])
        )
        if self.fused_rows:  # it makes hat and u for itself
            self.normalised, self.copied = self.fc1_sums, self.copied and self.fc2_sums
        hidden_tiles = self.config("mlp_backward_rows" if self.fused_rows else "mlp_backward_hidden" + form)
        self.hidden_tiles = launch.constants_of(hidden_tiles)
        if self.fused_rows:
            self.norm_tiles = self.hidden_tiles
        elif self.fused_norm:
            self.norm_tiles = self.config("mlp_backward_norm")
        else:
            self.norm_tiles = {"BLOCK_M": max(1, 4096 // launch.next_power_of_2(c)), "num_warps": 4}
            self.input_tiles = self.config("mlp_backward_input")
        self.prepare_columns = next((n for n in (128, 64, 32) if c % n == 0), 128)
        # Rows that a part of the branch's sums is of.
        self.prepare_rows = self.hidden_tiles["BLOCK_M"] if self.fused_rows else 4096 // self.prepare_columns

        # Buffers and parts of a row.
        size = self.dtype.itemsize
        hidden_rows = self.hidden_tiles["BLOCK_M"]
        row_bytes = size * (c * (self.normalised + self.copied) + k * (self.stores_g + self.stores_dh))
        part_bytes = 4 * c / self.prepare_rows
        if grn:  # three sums, and an image's factors and sums
            part_bytes += 4 * k * (3 / hidden_rows + 8 / self.rows_per_sample)
        # A quarter for the parts of the weights' gradients, which the splits are chosen to fit.
        unit = self.rows_per_sample if grn else 128
        most = max(1, int(workspace_bytes * 3 // 4 / (row_bytes + part_bytes)) // unit) * unit
        count = launch.tiles_of(self.rows, most)
        chunk_rows = launch.tiles_of(launch.tiles_of(self.rows, count), unit) * unit
        chunks = [_Chunk(first, min(chunk_rows, self.rows - first)) for first in range(0, self.rows, chunk_rows)]

        p, q, r = (self.weight_tiles[name] for name in ("BLOCK_P", "BLOCK_Q0", "BLOCK_R"))
        q += self.weight_tiles["BLOCK_Q1"]
        weights = max(1, self.fc1_sums + self.fc2_sums)
        tiles = launch.tiles_of(k, p) * launch.tiles_of(c, q) * weights
        multiprocessors = launch.chip_of(self.z).multiprocessors
        # Parts are written and read by every chunk, fp32.
        splits = weight_splits(tiles, 2 * p * q, 8 * p * q, chunks[0].rows, r, multiprocessors)
        self.splits = max(1, min(splits, workspace_bytes // 4 // (4 * c * k * weights)))
        self.allocate(chunks[0].rows)
        return chunks

    @property
    def stores_g(self) -> bool:
        """Whether g has a buffer: W2's gradient reads it, GRN's second pass reads h there."""
        return self.fc2_sums or (self.grn_weight is not None and self.grad_activated)

    @property
    def stores_dh(self) -> bool:
        """Whether dh has a buffer: for the products after it."""
        return self.fc1_sums if self.fused_rows else self.grad_activated

    def allocate(self, rows: int) -> None:
        c, k = self.channels, self.hidden
        self.hat = self.new(rows, c, dtype=self.dtype) if self.normalised else None
        self.u = self.new(rows, c, dtype=self.dtype) if self.copied else None
        self.g = self.new(rows, k, dtype=self.dtype) if self.stores_g else None
        self.dh = self.new(rows, k, dtype=self.dtype) if self.stores_dh else None
        self.dhat = None
        if self.wanted[_Z] and not self.fused_norm:  # by then hat has been read for the last time
            self.dhat = self.hat if self.hat is not None else self.new(rows, c, dtype=self.dtype)
        self.fc1_bias_parts = self.branch_parts = self.fc1_parts = self.fc2_parts = None
        if self.branch_sums:
            self.branch_parts = self.new(launch.tiles_of(rows, self.prepare_rows), c)
        if self.fc1_sums:
            direct = self.splits == 1 and self.wanted[_FC1_WEIGHT]
            self.fc1_parts = self.results[_FC1_WEIGHT] if direct else self.new(self.splits, k, c)
        if self.fc1_bias_sums:
            self.fc1_bias_parts = self.new(self.splits, k)
        if self.fc2_sums:
            direct = self.splits == 1 and self.wanted[_FC2_WEIGHT]
            self.fc2_parts = self.results[_FC2_WEIGHT] if direct else self.new(self.splits, c, k)
        self.grn_weight_parts = self.grn_bias_parts = None
        if self.grn_weight is None:
            return
        tiles = launch.tiles_of(rows, self.hidden_tiles["BLOCK_M"])
        images = rows // self.rows_per_sample
        self.segments = launch.tiles_of(self.rows_per_sample, _SEGMENT_ROWS)
        self.square_parts = self.new(tiles + images, k)
        self.product_parts = self.new(tiles + images, k) if self.grad_activated else None
        self.grad_parts = self.new(tiles + images, k) if self.grad_activated else None
        self.factors = self.new(images, k)
        self.feedback = self.new(images, k) if self.grad_hidden else None
        self.grn_weight_parts = self.new(images, k) if self.wanted[_GRN_WEIGHT] else None
        self.grn_bias_parts = self.new(images, k) if self.wanted[_GRN_BIAS] else None

    # --- the launches

    def run(self, workspace_bytes: int | None) -> None:
        if workspace_bytes is None:
            workspace_bytes = self.config("mlp_backward_workspace")["MIB"] << 20
        for chunk in self.plan(workspace_bytes):
            self.run_chunk(chunk)
        self.finish()

    def run_chunk(self, chunk: _Chunk) -> None:
        if self.fused_rows:
            self.row_gradients(chunk)
        else:
            self.prepare(chunk)
            if not self.any_hidden:
                return
            self.hidden_gradients(chunk)
        if self.grn_weight is not None:
            self.grn(chunk)
        if self.fc1_sums or self.fc2_sums:
            self.weight_gradients(chunk)
        if self.wanted[_Z] and not self.fused_rows:
            self.norm_gradient(chunk)

    def place(self, chunk: _Chunk) -> tuple[int, int, int, int]:
        """What every kernel takes: first row, rows, rows of a sample, whether parts hold earlier chunks' sums."""
        return chunk.first, chunk.rows, self.rows_per_sample, int(chunk.first > 0)

    def branch_of(self, chunk: _Chunk) -> Tensor:
        """u of the chunk: the gradient as it came, where nothing is dropped, scaled or rounded."""
        if self.copied:
            return self.u
        return self.grad.view(self.rows, self.channels)[chunk.first : chunk.first + chunk.rows]

    def prepare(self, chunk: _Chunk) -> None:
        dz = self.result(_Z) if self.order is not None else None
        if not self.normalised and not self.copied and not self.branch_sums and dz is None:
            return
        grid = (launch.tiles_of(chunk.rows, self.prepare_rows),)
        columns = {"C": self.channels, "BLOCK_M": self.prepare_rows, "BLOCK_C": self.prepare_columns}
        results = self.hat, self.u, self.branch_parts, dz
        launch.run(prepare_kernel, grid, *self.row_inputs(), *results, *self.place(chunk), **columns, num_warps=4)

    def row_inputs(self) -> tuple[Tensor | None, ...]:
        """What hat and u are made of, and the order of the samples."""
        return self.z, self.mean, self.rstd, self.grad, self.sample_scale, self.order, self.live_count

    def hidden_weights(self) -> tuple[Tensor | None, ...]:
        """What h and dg are made of, beside hat and u."""
        return (
            self.kept,
            self.fc1_weight,
            self.fc1_factor,
            self.fc1_bias,
            self.folded_fc2_weight,
            self.fc2_factor,
        )

    def gelu_constants(self) -> dict[str, int]:
        return {"C": self.channels, "K": self.hidden, "TANH": self.tanh, "DEGREE": gelu_degree(self.dtype)}

    def hidden_gradients(self, chunk: _Chunk) -> None:
        tile = self.hidden_tiles
        grn = self.grn_weight is not None
        tiles = launch.tiles_of(chunk.rows, tile["BLOCK_M"]) * launch.tiles_of(self.hidden, tile["BLOCK_N"])
        launch.run(
            hidden_gradients_kernel,
            (tiles,),
            self.hat if self.kept is None else None,
            self.branch_of(chunk) if self.grad_activated else None,
            *self.hidden_weights(),
            self.order,
            self.live_count,
            self.g,
            self.dh,
            self.square_parts if grn else None,
            self.product_parts if grn else None,
            self.grad_parts if grn else None,
            *self.place(chunk)[:3],
            **self.gelu_constants(),
            **tile,
        )

    def row_gradients(self, chunk: _Chunk) -> None:
        c0, c1 = self.norm_pieces
        launch.run(
            row_gradients_kernel,
            (launch.tiles_of(chunk.rows, self.hidden_tiles["BLOCK_M"]),),
            *self.row_inputs(),
            *self.hidden_weights(),
            self.hat,
            self.u,
            self.g,
            self.dh,
            self.branch_parts,
            self.results[_Z],
            *self.place(chunk),
            **self.gelu_constants(),
            C0=c0,
            C1=c1,
            **self.hidden_tiles,
        )

    def grn(self, chunk: _Chunk) -> None:
        images = chunk.rows // self.rows_per_sample
        part_rows, block_k = self.hidden_tiles["BLOCK_M"], launch.next_power_of_2(self.hidden)
        parts = launch.tiles_of(self.rows_per_sample, part_rows) + 1  # of an image that begins within a tile
        launch.run(
            grn_factors_kernel,
            (images,),
            self.square_parts,
            self.product_parts,
            self.grad_parts,
            self.grn_weight,
            self.live_count,
            self.factors,
            self.feedback,
            self.grn_weight_parts,
            self.grn_bias_parts,
            *self.place(chunk),
            K=self.hidden,
            EPS=GRN_EPS,
            PART_ROWS=part_rows,
            PARTS=max(1, min(launch.next_power_of_2(parts), 2048 // block_k)),
            BLOCK_K=block_k,
            num_warps=8,
        )
        if not self.fc2_sums and not self.grad_hidden:
            return
        launch.run(
            grn_activation_kernel,
            (images * self.segments, launch.tiles_of(self.hidden, _ACTIVATION_COLUMNS)),
            self.g,
            self.dh if self.grad_hidden else None,
            self.factors,
            self.feedback,
            self.grn_bias,
            self.live_count,
            *self.place(chunk)[:3],
            _SEGMENT_ROWS,
            self.segments,
            K=self.hidden,
            STORE_G=self.fc2_sums,
            TANH=self.tanh,
            DEGREE=gelu_degree(self.dtype),
            BLOCK_M=_ACTIVATION_ROWS,
            BLOCK_N=_ACTIVATION_COLUMNS,
            num_warps=8,
        )

    def weight_gradients(self, chunk: _Chunk) -> None:
        tile = self.weight_tiles
        tiles_q = launch.tiles_of(self.channels, tile["BLOCK_Q0"] + tile["BLOCK_Q1"])
        launch.run(
            weight_gradient_kernel,
            (launch.tiles_of(self.hidden, tile["BLOCK_P"]) * tiles_q, self.splits, self.fc1_sums + self.fc2_sums),
            *((self.dh, self.hat, self.fc1_parts, self.fc1_bias_parts) if self.fc1_sums else (None,) * 4),
            *((self.g, self.branch_of(chunk), self.fc2_parts) if self.fc2_sums else (None, None, None)),
            self.live_count,
            *self.place(chunk),
            self.splits,
            P=self.hidden,
            Q=self.channels,
            **tile,
        )

    def norm_gradient(self, chunk: _Chunk) -> None:
        c0, c1 = self.norm_pieces
        place = self.place(chunk)[:3]
        rows = self.z, self.mean, self.rstd, self.order, self.live_count, self.results[_Z]
        grid = (launch.tiles_of(chunk.rows, self.norm_tiles["BLOCK_M"]),)
        columns = {"C": self.channels, "C0": c0, "C1": c1, **self.norm_tiles}
        product = self.dh, self.fc1_weight, self.fc1_factor
        if self.fused_norm:
            launch.run(norm_gradient_kernel, grid, *product, *rows, *place, K=self.hidden, **columns)
            return
        tile = self.input_tiles
        tiles = launch.tiles_of(chunk.rows, tile["BLOCK_M"]) * launch.tiles_of(self.channels, tile["BLOCK_N"])
        arguments = *product, self.dhat, self.live_count, *place
        launch.run(input_gradient_kernel, (tiles,), *arguments, C=self.channels, K=self.hidden, **tile)
        launch.run(norm_backward_kernel, grid, self.dhat, *rows, *place, **columns)

    def finish(self) -> None:
        """From parts to results."""
        c, k, result = self.channels, self.hidden, self.result
        norm_weight, norm_bias = result(_NORM_WEIGHT), result(_NORM_BIAS)
        grad_fc1, grad_fc2, scaled = result(_FC1_WEIGHT), result(_FC2_WEIGHT), self.layer_scale is not None

        sums: list[tuple[Tensor, Tensor]] = []
        fc1_bias = branch = None
        if self.fc1_bias_sums:
            fc1_bias = self.results[_FC1_BIAS] if self.wanted[_FC1_BIAS] else self.new(k)
            sums.append((self.fc1_bias_parts, fc1_bias))
        if self.branch_sums:
            branch = self.new(c) if scaled else self.results[_FC2_BIAS]
            sums.append((self.branch_parts, branch))
        for gradient, parts in ((_GRN_WEIGHT, self.grn_weight_parts), (_GRN_BIAS, self.grn_bias_parts)):
            if self.wanted[gradient]:
                sums.append((parts, self.results[gradient]))
        sum_partials(*sums)

        of_norm = norm_weight is not None or norm_bias is not None
        folded = self.norm_weight is not None or self.norm_bias is not None
        fc1 = of_norm or (grad_fc1 is not None and (folded or self.splits > 1))
        fc2 = (self.fc2_sums or self.branch_sums) if scaled else self.fc2_sums and self.splits > 1
        if not fc1 and not fc2:
            return
        # Small weights have many splits: small tiles of them, for many programs. Larger ones make ptxas spill.
        block_k, block_c, warps = 8, 64 if c >= 256 else 32, 4
        # A column for each thread at least. Where threads share one, all load its parts and one of them stores the
        # gradient, to the same address where the gradient is its own parts: others may not have loaded yet.
        columns = max(32 * warps, min(512, launch.next_power_of_2(k)))
        tiles_k = launch.tiles_of(k, block_k)
        fc1_tiles = tiles_k * launch.tiles_of(c, block_c) if fc1 else 0
        norm_weight_parts = None if norm_weight is None else self.new(tiles_k, c)
        norm_bias_parts = None if norm_bias is None else self.new(tiles_k, c)
        launch.run(
            parameter_gradients_kernel,
            (fc1_tiles + (c if fc2 else 0),),
            self.fc1_parts,
            fc1_bias,
            self.given_fc1_weight,
            self.norm_weight,
            self.norm_bias,
            grad_fc1,
            norm_weight_parts,
            norm_bias_parts,
            self.fc2_parts,
            branch,
            self.fc2_weight,
            self.fc2_bias,
            self.layer_scale,
            grad_fc2,
            result(_FC2_BIAS) if scaled else None,
            result(_LAYER_SCALE),
            self.splits,
            C=c,
            K=k,
            FC1_TILES=fc1_tiles,
            BLOCK_K=block_k,
            BLOCK_C=block_c,
            COLUMNS=columns,
            num_warps=warps,
        )
        of_parts = (norm_weight_parts, norm_weight), (norm_bias_parts, norm_bias)
        sum_partials(*(pair for pair in of_parts if pair[1] is not None))
