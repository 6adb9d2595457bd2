"""Masked images: a block that computes the visible patches only (ConvNeXt V2, section 3: 'sparse convolution')."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .operators import _arguments as arguments
from .operators import convnext_block, layer_norm_mlp
from .operators.block import mlp_parameters
from .operators.depthwise_conv import check_convolution, parameter_gradients

__all__ = ["VisiblePatches", "run_operator"]


@dataclass(frozen=True)
class VisiblePatches:
    """Which patches of a batch of masked images are visible: equally many in every image.

    An image is a grid of patches, and so is each of its feature maps: a patch of 32 x 32 pixels is one of 8 x 8 values
    behind a stem of stride 4. What a network computes of masked images is kept as a batch of patches, (N * K, C, h, w),
    image by image. Layers that work on each place alone, or on the places of one patch (a downsampling convolution),
    take it as it is. Only the depthwise convolution looks at neighbours: tell the block, ``block(x, visible)``.

    Args:
        index: (N, K), int64, on the images' device: the visible patches of each image in ascending order, counted row
            by row.
        grid: rows and columns of patches.
    """

    index: Tensor
    grid: tuple[int, int]
    _lines: dict[tuple[int, bool], Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    @classmethod
    def random(
        cls,
        samples: int,
        grid: tuple[int, int],
        mask_ratio: float,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> VisiblePatches:
        """Masks each image at random; int((1 - mask_ratio) * patches) of them stay visible.

        Raises:
            ValueError: `grid` is no pair of sizes; or `mask_ratio` leaves no patch visible, or none masked.
        """
        if not isinstance(grid, (tuple, list)) or len(grid) != 2:
            arguments.wrong_value("VisiblePatches.random", "grid", "two sizes, rows and columns", repr(grid))
        patches = grid[0] * grid[1]
        visible = int((1 - mask_ratio) * patches)
        if not 0 < visible < patches:
            expected = f"a ratio that masks some of {grid[0]} x {grid[1]} patches, not all"
            arguments.wrong_value("VisiblePatches.random", "mask_ratio", expected, mask_ratio)
        # Not generator=None: torch.compile takes an overload for it that knows no sizes that vary.
        chosen = {} if generator is None else {"generator": generator}
        noise = torch.rand(samples, patches, device=device, **chosen)
        return cls(noise.argsort(dim=1)[:, :visible].sort(dim=1).values, tuple(grid))

    @classmethod
    def from_mask(cls, mask: Tensor) -> VisiblePatches:
        """From a mask (N, rows, columns), bool, True where a patch is masked. Reads it on the host: a GPU waits.

        Raises:
            TypeError: `mask` is no bool tensor.
            ValueError: it has another rank, masks unequal numbers of patches, or all of them.
        """
        name = "VisiblePatches.from_mask"
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            arguments.wrong_type(name, "mask", "a torch.Tensor of dtype bool", got)
        if mask.dim() != 3:
            arguments.wrong_value(name, "mask", "a tensor of rank 3 (N, rows, columns)", f"shape {tuple(mask.shape)}")
        visible = ~mask.flatten(1)
        count = 1  # of no images
        if len(mask):
            least, count = (int(extreme) for extreme in visible.sum(1).aminmax())
            if least != count or count == 0:
                expected = "equally many visible patches in every image, and at least one"
                arguments.wrong_value(name, "mask", expected, f"{least} to {count}")
        return cls(visible.nonzero()[:, 1].view(len(mask), count), (mask.shape[1], mask.shape[2]))

    @property
    def mask(self) -> Tensor:
        """(N, rows, columns), bool: True where a patch is masked."""
        mask = torch.ones(len(self.index), self.grid[0] * self.grid[1], dtype=torch.bool, device=self.index.device)
        return mask.scatter(1, self.index, False).unflatten(1, self.grid)

    def pack(self, images: Tensor) -> Tensor:
        """The visible patches (N * K, C, h, w) of feature maps (N, C, rows * h, columns * w)."""
        (n, visible), (rows, columns) = self.index.shape, self.grid
        if images.dim() != 4 or images.shape[0] != n or images.shape[2] % rows or images.shape[3] % columns:
            expected = f"shape ({n}, C, {rows} h, {columns} w)"
            arguments.wrong_value("VisiblePatches.pack", "images", expected, f"shape {tuple(images.shape)}")
        channels, h, w = images.shape[1], images.shape[2] // rows, images.shape[3] // columns
        lines = images.permute(0, 2, 3, 1).reshape(n * rows * h * columns, w * channels)
        return _Take.apply(lines, self._lines_of(h)).view(n * visible, h, w, channels).permute(0, 3, 1, 2)

    def unpack(self, patches: Tensor) -> Tensor:
        """Feature maps (N, C, rows * h, columns * w) of visible patches (N * K, C, h, w): zeros where it is masked."""
        self.check_patches("VisiblePatches.unpack", "patches", patches)
        (n, visible), (rows, columns) = self.index.shape, self.grid
        _, channels, h, w = patches.shape
        lines = patches.permute(0, 2, 3, 1).reshape(n * visible * h, w * channels)
        lines = _Put.apply(lines, self._lines_of(h), n * rows * h * columns)
        return lines.view(n, rows * h, columns * w, channels).permute(0, 3, 1, 2)

    def check_patches(self, operator: str, argument: str, patches: Tensor) -> None:
        """Raises ValueError where there are not as many patches as are visible."""
        n, visible = self.index.shape
        if patches.dim() != 4 or patches.shape[0] != n * visible:
            expected = f"shape ({n} * {visible}, C, h, w)"
            arguments.wrong_value(operator, argument, expected, f"shape {tuple(patches.shape)}")

    def _lines_of(self, height: int) -> Tensor:
        """Where the lines of the visible patches stand among those of the whole maps, in channels-last memory.

        A line is what lies together: the values of a patch in one row of the map.
        """
        # Tensors made in inference mode cannot be saved for a backward pass later.
        key = height, not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
        if key not in self._lines:
            rows, columns = self.grid
            first = torch.arange(len(self.index), device=self.index.device).unsqueeze(1) * (rows * columns)
            patch = self.index + first
            line = (patch // columns * height).unsqueeze(-1) + torch.arange(height, device=patch.device)
            self._lines[key] = (line * columns + (patch % columns).unsqueeze(-1)).flatten()
        return self._lines[key]


class _Take(torch.autograd.Function):
    """`lines[index]` for an index without repetitions, of which autograd does not know: no sum in backward."""

    @staticmethod
    def forward(lines: Tensor, index: Tensor) -> Tensor:
        return lines.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        lines, index = inputs
        ctx.count = lines.shape[0]
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        return _Put.apply(grad, index, ctx.count), None


class _Put(torch.autograd.Function):
    """`count` lines, zero but for those at `index`; the transpose of `_Take`."""

    @staticmethod
    def forward(lines: Tensor, index: Tensor, count: int) -> Tensor:
        return lines.new_zeros(count, lines.shape[1]).index_copy_(0, index, lines)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Take.apply(grad, *ctx.saved_tensors), None, None


class _Convolution(torch.autograd.Function):
    """The depthwise convolution of the maps that `lines` of visible patches stand in, at those again.

    Keeps the lines: the maps, most of which is zero, are made again in backward.
    """

    @staticmethod
    def forward(
        lines: Tensor, weight: Tensor, bias: Tensor | None, index: Tensor, shape: tuple[int, int, int]
    ) -> Tensor:
        y = torch.ops.convnext_kernels.depthwise_conv2d(_maps(lines, weight, index, shape), weight, bias, 1, None)
        return _lines(y, lines).index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        lines, weight, bias, index, ctx.shape = inputs
        ctx.save_for_backward(lines, weight, index)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        lines, weight, index = ctx.saved_tensors
        needs_lines, *needs = ctx.needs_input_grad[:3]
        grad = _maps(grad, weight, index, ctx.shape)
        dlines, dparameters = None, (None, None)
        if needs_lines:
            dx = torch.ops.convnext_kernels.depthwise_conv2d_input_grad(grad, weight, None, 1, [0, 0], None)
            dlines = _lines(dx, lines).index_select(0, index)
        if any(needs):
            x = _maps(lines, weight, index, ctx.shape)
            dparameters = parameter_gradients(grad, x, weight, ctx.bias_dtype, 1, None, needs)
        return dlines, *dparameters, None, None


def _maps(lines: Tensor, weight: Tensor, index: Tensor, shape: tuple[int, int, int]) -> Tensor:
    n, height, width = shape
    count = n * height * width * weight.shape[0] // lines.shape[1]
    maps = lines.new_zeros(count, lines.shape[1]).index_copy_(0, index, lines)
    return maps.view(n, height, width, weight.shape[0]).permute(0, 3, 1, 2)


def _lines(maps: Tensor, like: Tensor) -> Tensor:
    return maps.permute(0, 2, 3, 1).reshape(-1, like.shape[1])


def run_operator(
    x: Tensor,
    visible: VisiblePatches | None,
    *tensors: Tensor | None,
    eps: float,
    approximate: str,
    recompute: bool,
    backend: str | None,
) -> Tensor:
    """convnext_block of whole feature maps; or, of the visible patches (N * K, C, h, w), what it does on those.

    As a sparse convolution would have it, masked places are zero where the convolution reads, and nothing is computed
    for them: the MLP, nine tenths of a block's work, takes the visible rows alone, and GRN's norms run over those of an
    image. `tensors` are the operator's; their last, sample_scale, is (N,).
    """
    if not isinstance(visible, (VisiblePatches, type(None))):
        arguments.wrong_type("convnext_block", "visible", "VisiblePatches or None", type(visible).__name__)
    options = {"eps": eps, "approximate": approximate, "recompute": recompute}
    if visible is None:
        return convnext_block(x, *tensors, **options, backend=backend)
    if backend is not None:
        arguments.wrong_value("convnext_block", "backend", "None with visible patches (see use_backend)", repr(backend))
    conv_weight, conv_bias, *parameters, sample_scale = tensors
    parameters = mlp_parameters("convnext_block", *parameters)
    check_convolution("convnext_block", x, conv_weight, conv_bias, 1, prefix="conv_")
    visible.check_patches("convnext_block", "x", x)
    convolution = {"conv_weight": conv_weight, "conv_bias": conv_bias}
    arguments.check_device("convnext_block", x, **convolution)
    autocast = arguments.autocast_dtype(x)
    arguments.check_dtypes("convnext_block", x.dtype, autocast is not None, **convolution)
    samples, patches = visible.index.shape
    _, channels, h, w = x.shape
    rows = (samples, patches * h * w, channels)
    residual = x.permute(0, 2, 3, 1).reshape(rows)
    lines = residual.to(autocast or x.dtype).reshape(samples * patches * h, w * channels)
    shape = (samples, visible.grid[0] * h, visible.grid[1] * w)
    z = _Convolution.apply(lines, conv_weight, conv_bias, visible._lines_of(h), shape)
    y = layer_norm_mlp(z.view(rows), residual, *parameters.values(), sample_scale, **options)
    return y.view(samples * patches, h, w, channels).permute(0, 3, 1, 2)
