"""What is measured, and what each case must at least compute and move.

The work of a case is counted, not measured: every input read once, every output written once, and the multiplications
and additions of convolutions and matrix products (taps on the zero padding left out, elementwise arithmetic not
counted, nothing computed twice). With the device's measured rates that gives the least time a case can take, its
roofline; what a provider really reads, writes and recomputes is more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

KERNEL_SIZE = 7
MLP_RATIO = 4

TINY_STAGES = ((96, 56), (192, 28), (384, 14), (768, 7))
#: First stage's channels: V1 tiny and small, base, large, xlarge; V2 atto, femto, pico, nano, tiny, base, large, huge.
WIDTHS = {"v1": (96, 128, 192, 256), "v2": (40, 48, 64, 80, 96, 128, 192, 352)}
#: Side of the first stage's feature map, at 224 and at 384 pixels.
FIRST_SIDES = (56, 96)
BATCHES = (1, 8, 32, 128, 256)
#: The models, with batches, that benchmarks/goals.py has goals for; a GPU's model cases.
GOAL_MODELS = (("convnext_tiny", 256), ("convnext_base", 256), ("convnextv2_base", 256), ("convnext_large", 128))


class Precision(NamedTuple):
    """Which mode a case runs in. 'bf16' alone would not say whether parameters and residual stream are bf16 too."""

    stored: torch.dtype  # input, parameters
    computed: torch.dtype  # operands of convolutions and matrix products

    @property
    def autocast(self) -> torch.dtype | None:
        return self.computed if self.computed != self.stored else None


PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "autocast-bf16": Precision(torch.float32, torch.bfloat16),
    "pure-bf16": Precision(torch.bfloat16, torch.bfloat16),
}


class Work(NamedTuple):
    """Bytes to and from memory, and multiplications plus additions; the least there can be."""

    bytes: int
    operations: int

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.bytes + other.bytes, self.operations + other.operations)

    def times(self, count: int) -> Work:
        return Work(self.bytes * count, self.operations * count)


def valid_taps(side: int, kernel_size: int = KERNEL_SIZE) -> int:
    """Kernel taps that fall inside a line of `side` pixels, over all its outputs."""
    half = kernel_size // 2
    return sum(min(side, i + half + 1) - max(0, i - half) for i in range(side))


def convolution_operations(batch: int, channels: int, side: int) -> int:
    """One pass of the depthwise convolution: a multiplication and an addition a tap."""
    return 2 * batch * channels * valid_taps(side) ** 2


def mlp_operations(batch: int, channels: int, side: int) -> int:
    """The two matrix products of a forward pass."""
    return 2 * 2 * batch * side * side * channels * MLP_RATIO * channels


def block_parameters(version: str, channels: int) -> int:
    """Numbers in the parameters of a block."""
    hidden = MLP_RATIO * channels
    shared = channels * (KERNEL_SIZE**2 + 1) + 2 * channels + 2 * channels * hidden + hidden + channels
    return shared + (2 * hidden if version == "v2" else channels)


@dataclass(frozen=True)
class OperatorCase:
    """One operator, one direction. `backward` is the gradients of all its inputs, the forward pass not counted."""

    operator: str  # depthwise_conv2d, layer_norm, bias_gelu, layer_norm_mlp
    task: str  # forward, backward
    version: str  # v2: layer_norm_mlp with GRN in place of the layer scale
    channels: int  # of the block the operator is in; bias_gelu's tensor has four times as many
    side: int
    batch: int
    precision: str

    suite = "operators"

    @property
    def group(self) -> str:
        name = self.operator + (f" {self.version}" if self.operator == "layer_norm_mlp" else "")
        return f"{name} {self.task} {self.channels}@{self.side} batch {self.batch} {self.precision}"

    @property
    def elements(self) -> int:
        """Of the operator's first argument."""
        width = MLP_RATIO * self.channels if self.operator == "bias_gelu" else self.channels
        return self.batch * self.side * self.side * width

    def work(self) -> Work:
        size, c, backward = PRECISIONS[self.precision].stored.itemsize, self.channels, self.task == "backward"
        shape = (self.batch, c, self.side)
        if self.operator == "depthwise_conv2d":
            parameters, operations = c * (KERNEL_SIZE**2 + 1), convolution_operations(*shape)
        elif self.operator == "layer_norm":
            parameters, operations = 2 * c, 0
        elif self.operator == "bias_gelu":
            parameters, operations = MLP_RATIO * c, 0
        else:
            parameters = block_parameters(self.version, c) - c * (KERNEL_SIZE**2 + 1)
            operations = mlp_operations(*shape)
        if backward:
            # Gradient and input in, gradient of the input out; parameters in, their gradients out.
            return Work((3 * self.elements + 2 * parameters) * size, 2 * operations)
        tensors = 3 if self.operator == "layer_norm_mlp" else 2  # the residual is an input too
        return Work((tensors * self.elements + parameters) * size, operations)


@dataclass(frozen=True)
class BlockCase:
    """One block: inference, or a training step (forward, backward, gradients of the input and all parameters)."""

    version: str
    task: str  # inference, training
    channels: int
    side: int
    batch: int
    precision: str
    drop_path: float = 0.0

    suite = "blocks"

    @property
    def group(self) -> str:
        drop = f" drop path {self.drop_path}" if self.drop_path else ""
        return f"block {self.version} {self.task} {self.channels}@{self.side} batch {self.batch} {self.precision}{drop}"

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.side * self.side

    def work(self) -> Work:
        """Inference: x in, y out. Training: x in twice, as it leaves the chip in between, y and dx out, dy in."""
        size = PRECISIONS[self.precision].stored.itemsize
        shape = (self.batch, self.channels, self.side)
        operations = convolution_operations(*shape) + mlp_operations(*shape)
        parameters = block_parameters(self.version, self.channels)
        if self.task == "inference":
            return Work((2 * self.elements + parameters) * size, operations)
        moved = round(self.elements * (5 - self.drop_path))  # of a dropped sample x comes in once
        return Work((moved + 3 * parameters) * size, round(3 * operations * (1 - self.drop_path)))


class Architecture(NamedTuple):
    version: str
    depths: tuple[int, int, int, int]
    width: int  # channels of the first stage; they double with every stage


MODELS = {
    "convnext_atto": Architecture("v1", (2, 2, 6, 2), 40),
    "convnextv2_atto": Architecture("v2", (2, 2, 6, 2), 40),
    "convnext_tiny": Architecture("v1", (3, 3, 9, 3), 96),
    "convnextv2_tiny": Architecture("v2", (3, 3, 9, 3), 96),
    "convnext_small": Architecture("v1", (3, 3, 27, 3), 96),
    "convnext_base": Architecture("v1", (3, 3, 27, 3), 128),
    "convnextv2_base": Architecture("v2", (3, 3, 27, 3), 128),
    "convnext_large": Architecture("v1", (3, 3, 27, 3), 192),
    "convnextv2_large": Architecture("v2", (3, 3, 27, 3), 192),
    "convnext_xlarge": Architecture("v1", (3, 3, 27, 3), 256),
    "convnextv2_huge": Architecture("v2", (3, 3, 27, 3), 352),
}
CLASSES = 1000


@dataclass(frozen=True)
class ModelCase:
    """A whole model, images to logits, or a training step with cross entropy and AdamW."""

    model: str
    task: str  # inference, training
    size: int  # pixels a side
    batch: int
    precision: str
    #: step: every call has the same batch. first step: of a fresh model, compilation and allocation included.
    #: varying batches: the batch changes from step to step. largest batch: the step at the largest batch that fits.
    #: masked pretraining: the encoder of a masked autoencoder, of 40 % of each image.
    experiment: str = "step"
    memory_megabytes: int | None = None  # what the largest batch must fit into

    suite = "models"

    @property
    def group(self) -> str:
        limit = f" in {self.memory_megabytes} MB" if self.memory_megabytes else ""
        batch = "" if self.experiment == "largest batch" else f" batch {self.batch}"
        experiment = "" if self.experiment == "step" else f" {self.experiment}"
        return f"{self.model} {self.task}{experiment}{limit} {self.size}px{batch} {self.precision}"

    @property
    def elements(self) -> int:
        return self.batch * 3 * self.size * self.size

    def work(self) -> Work:
        """Layer by layer: stem, blocks, downsampling, head, and AdamW's reads and writes."""
        version, depths, width = MODELS[self.model]
        size = PRECISIONS[self.precision].stored.itemsize
        side = self.size // 4
        total = self._layer(48, width, side, 3 * self.size**2, needs_input_gradient=False)
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            if stage:
                before, pixels = channels // 2, side * side
                side //= 2
                total += self._layer(4 * before, channels, side, before * pixels)
            block = BlockCase(version, self.task, channels, side, self.batch, self.precision)
            total += block.work().times(depth)
        total += self._layer(channels, CLASSES, 1, channels * side * side)
        if self.task == "training":
            # AdamW reads parameter, gradient and two moments, and writes all but the gradient.
            total += Work(7 * self.parameters() * size, 0)
        return total

    def _layer(self, fan_in: int, fan_out: int, side: int, inputs: int, needs_input_gradient: bool = True) -> Work:
        """A layer that is no block: matrix products of `fan_in` numbers at each of its output's pixels."""
        outputs, weights = fan_out * side * side, fan_in * fan_out
        products, inputs_moved, outputs_moved, weights_moved = 1, 1, 1, 1
        if self.task == "training":
            # As in a block: the input in twice, its gradient out; the output out, its gradient in.
            products, inputs_moved, outputs_moved, weights_moved = 2, 2, 2, 3
            if needs_input_gradient:
                products, inputs_moved = 3, 3
        numbers = self.batch * (inputs_moved * inputs + outputs_moved * outputs) + weights_moved * weights
        size = PRECISIONS[self.precision].stored.itemsize
        return Work(numbers * size, products * 2 * self.batch * outputs * fan_in)

    def parameters(self) -> int:
        version, depths, width = MODELS[self.model]
        total = 48 * width + width + 2 * width
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            if stage:
                total += channels + 2 * channels * channels + channels  # LayerNorm of half the channels, 2x2 kernel
            total += depth * block_parameters(version, channels)
        return total + 2 * channels + channels * CLASSES + CLASSES


Case = OperatorCase | BlockCase | ModelCase


# --- which cases run where: a choice for a CPU, one for a GPU, and everything (--full)


def _shapes(device_type: str, full: bool) -> Iterator[tuple[str, int, int, int]]:
    """version, channels, side, batch"""
    if not full:
        for channels, side in TINY_STAGES:
            for version in ("v1", "v2"):
                yield version, channels, side, 128 if device_type == "cuda" else 4
        return
    for first_side in FIRST_SIDES:
        for version, widths in WIDTHS.items():
            for width in widths:
                for stage in range(4):
                    for batch in BATCHES:
                        yield version, width * 2**stage, first_side >> stage, batch


#: Operators in the order in which they are measured: those with goals (benchmarks/goals.py), then the costly ones.
_FIRST = (
    ("depthwise_conv2d", "forward", "v1"),
    ("layer_norm_mlp", "forward", "v1"),
    ("layer_norm", "forward", "v1"),
    ("layer_norm", "backward", "v1"),
    ("layer_norm_mlp", "backward", "v1"),
    ("depthwise_conv2d", "backward", "v1"),
    ("layer_norm_mlp", "forward", "v2"),
    ("layer_norm_mlp", "backward", "v2"),
    ("bias_gelu", "forward", "v1"),
    ("bias_gelu", "backward", "v1"),
)


def operator_cases(device_type: str, full: bool) -> list[OperatorCase]:
    out = {}
    for version, channels, side, batch in _shapes(device_type, full):
        # Elsewhere the outer stages stand for those between them.
        outer = full or device_type == "cuda" or (channels, side) in (TINY_STAGES[0], TINY_STAGES[2])
        for precision in ("fp32", "pure-bf16"):
            for operator in ("depthwise_conv2d", "layer_norm", "bias_gelu", "layer_norm_mlp"):
                if operator != "depthwise_conv2d" and not outer:
                    continue
                for task in ("forward", "backward"):
                    of = version if operator == "layer_norm_mlp" else "v1"  # the others are the same in both
                    out[OperatorCase(operator, task, of, channels, side, batch, precision)] = None
    # What a run's budget leaves out is at the end.
    return sorted(
        out, key=lambda case: (case.precision == "fp32", _FIRST.index((case.operator, case.task, case.version)))
    )


def block_cases(device_type: str, full: bool) -> list[BlockCase]:
    out = [
        BlockCase(version, task, channels, side, batch, precision)
        for version, channels, side, batch in _shapes(device_type, full)
        for precision in PRECISIONS
        for task in ("inference", "training")
    ]
    # A batch whose dropped share hardly differs from draw to draw.
    batch = 128 if device_type == "cuda" else 16
    for version in ("v1", "v2"):
        for precision in ("fp32", "autocast-bf16"):
            out.append(BlockCase(version, "training", 384, 14, batch, precision, drop_path=0.4))
    return sorted(out, key=lambda case: (case.task, case.version))


def model_cases(device_type: str, full: bool) -> list[ModelCase]:
    if full:
        return [
            ModelCase(model, task, size, batch, precision)
            for model in MODELS
            for task in ("inference", "training")
            for size in (224, 384)
            for batch in BATCHES
            for precision in PRECISIONS
        ]
    if device_type == "cuda":
        models, precisions = GOAL_MODELS, list(PRECISIONS)[1:]
    else:
        models, precisions = (("convnext_tiny", 2), ("convnextv2_tiny", 2)), ("fp32", "autocast-bf16")
    return [
        # What a run's budget leaves out is at the end.
        ModelCase(model, task, 224, batch, precision)
        for task in ("training", "inference")
        for model, batch in models
        for precision in precisions
    ]


def scaling_cases(device_type: str, full: bool) -> list[ModelCase]:
    """The cost of a training step as the batch and as the resolution grow."""
    if device_type == "cuda":
        base = ModelCase("convnext_tiny", "training", 224, 32, "autocast-bf16")
        batches, sizes = BATCHES, (160, 288, 384)
    else:
        base = ModelCase("convnext_atto", "training", 160, 4, "autocast-bf16")
        batches, sizes = (1, 2, 4, 8), (96, 224, 288)
    return [replace(base, batch=batch) for batch in batches] + [replace(base, size=size) for size in sizes]


def experiment_cases(device_type: str, full: bool) -> list[ModelCase]:
    if device_type == "cuda":
        base = ModelCase("convnext_tiny", "training", 224, 128, "autocast-bf16")
        megabytes = 16000
    else:
        base = ModelCase("convnext_atto", "training", 128, 8, "autocast-bf16")
        megabytes = 128
    return [
        replace(base, experiment="first step"),
        replace(base, experiment="varying batches"),
        replace(base, experiment="largest batch", memory_megabytes=megabytes),
        replace(base, model=base.model.replace("convnext_", "convnextv2_"), size=224, experiment="masked pretraining"),
    ]
