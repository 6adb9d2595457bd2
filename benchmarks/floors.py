"""The least time each operator can take on a chip: the larger of its bytes over the memory's rate and its operations
over the tensor cores'. Nothing is measured, and no GPU is needed.

python -m benchmarks.floors                                 on an H200, by its datasheet
python -m benchmarks.floors --bandwidth 3.35 --matrix 989   another chip's, or measured: TB/s, TFLOP/s in bf16

The cases are those that `pytest benchmarks` has on a GPU, in pure bf16. `GELU` is a third bound, for the layers with a
hidden tensor: its fp32 instructions, INSTRUCTIONS a hidden number, at the lanes and clock given. Tensor cores and
those lanes work side by side only where a kernel overlaps them.
"""

from __future__ import annotations

import argparse
import sys
from typing import NamedTuple

from .cases import MLP_RATIO, OperatorCase, operator_cases
from .report import markdown

#: fp32 instructions of a value: GELU as the Triton kernels have it in bf16, bias and rounding included; in a backward
#: pass GELU and its derivative, times the gradient. (Counted in the machine code for sm_90.)
INSTRUCTIONS = {"forward": 11, "backward": 16}


class Chip(NamedTuple):
    """What a floor depends on. The defaults are an H200's, by its datasheet (SXM: 132 multiprocessors at 1.98 GHz)."""

    bandwidth: float = 4.8e12  # bytes a second, read and written together
    matrix: float = 989e12  # operations a second, dense bf16
    lanes: int = 132 * 128  # fp32 instructions a cycle
    clock: float = 1.98e9


class Floor(NamedTuple):
    """Seconds."""

    memory: float
    matrix: float
    gelu: float

    @property
    def seconds(self) -> float:
        return max(self)


def floor_of(case: OperatorCase, chip: Chip) -> Floor:
    """The least time of a case. A backward pass that computes the hidden tensor again is not allowed for."""
    work = case.work()
    tensor_cores = case.operator == "layer_norm_mlp"  # the convolution's taps are few enough to be hidden
    hidden = 0
    if case.operator == "bias_gelu":
        hidden = case.elements
    elif tensor_cores:
        hidden = MLP_RATIO * case.elements
    return Floor(
        work.bytes / chip.bandwidth,
        work.operations / chip.matrix if tensor_cores else 0.0,
        hidden * INSTRUCTIONS[case.task] / (chip.lanes * chip.clock),
    )


def table(chip: Chip) -> str:
    """Microseconds, in Markdown."""

    def microseconds(seconds: float) -> str:
        return f"{seconds * 1e6:.1f}" if seconds else ""

    body = []
    for case in operator_cases("cuda", False):
        if case.precision == "pure-bf16":
            floor = floor_of(case, chip)
            name = case.group.removesuffix(f" {case.precision}")
            body.append(
                (name, f"{case.work().bytes / 1e6:.1f}", *map(microseconds, floor), microseconds(floor.seconds))
            )
    return markdown(("pure bf16, us", "MB", "memory", "tensor cores", "GELU", "floor"), body)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.floors", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Chip()
    parser.add_argument("--bandwidth", type=float, default=default.bandwidth / 1e12, help="TB/s")
    parser.add_argument("--matrix", type=float, default=default.matrix / 1e12, help="TFLOP/s in bf16")
    parser.add_argument("--multiprocessors", type=int, default=default.lanes // 128)
    parser.add_argument("--clock", type=float, default=default.clock / 1e9, help="GHz")
    options = parser.parse_args(arguments)
    if min(options.bandwidth, options.matrix, options.multiprocessors, options.clock) <= 0:
        parser.error("expected positive numbers")
    lanes = 128 * options.multiprocessors
    print(table(Chip(options.bandwidth * 1e12, options.matrix * 1e12, lanes, options.clock * 1e9)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
