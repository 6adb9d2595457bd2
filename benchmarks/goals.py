"""What the kernels are built for on an H200, and what a result says of it.

python -m benchmarks.goals RESULT.json ...

A result of `pytest benchmarks --benchmark-only --benchmark-json FILE` on a GPU; several are read as one. A goal whose
cases are not in it is listed as not measured. Ratios are to the best that was measured beside ours in the same case,
torch.compile and max-autotune included where they are among the providers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from . import report
from .cases import GOAL_MODELS, TINY_STAGES
from .report import Result, Row

PRECISIONS = ("autocast-bf16", "pure-bf16")


class ModelGoal(NamedTuple):
    """Of a whole model at 224 pixels: how many times faster than the best other provider, and what part of the memory
    that a training step of eager PyTorch (timm's model, channels-last) takes beyond model and optimizer ours may."""

    training: float
    inference: float | None
    memory: float
    images_a_second: float | None = None  # training


MODEL_GOALS = {
    "convnext_tiny": ModelGoal(2.5, 2.5, 1 / 3),
    "convnext_base": ModelGoal(2.0, 2.0, 1 / 3),
    "convnext_large": ModelGoal(1.5, 1.6, 1 / 3, images_a_second=1800),
    "convnextv2_base": ModelGoal(2.2, None, 1 / 4),
}
V2_OF_V1 = 0.95  # ConvNeXt V2-B's inference throughput to V1-B's
DEPTHWISE_MICROSECONDS = {"ours-fma": 75.0, "ours-tensor": 45.0}  # forward, 128 images of 96@56 in pure bf16
LAYER_NORM_OF_COPY = 85.0  # per cent of the copy's bandwidth
MLP_OF_MATRIX_RATE = 80.0  # per cent of a large matrix product's rate


class Line(NamedTuple):
    """A goal and what came of it. `got` None: not measured. `unit` stands behind both numbers."""

    goal: str
    bound: float
    got: float | None
    unit: str
    at_most: bool = False
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.got is None:
            return None
        return self.got <= self.bound if self.at_most else self.got >= self.bound


def _find(result: Result, suite: str, provider: str, **case: object) -> Row | None:
    for row in result.rows:
        if row["suite"] == suite and row["provider"] == provider and case.items() <= row["case"].items():
            return row
    return None


def _best_ratio(row: Row | None) -> tuple[float | None, str]:
    """How many times faster than the best provider that is not ours, and which that is."""
    others = {
        name: r["median"] for name, r in (row or {}).get("faster_than", {}).items() if not name.startswith("ours")
    }
    if not others:
        return None, ""
    best = min(others, key=others.__getitem__)
    return others[best], f"than {best}; measured: {', '.join(sorted(others))}"


def _model_lines(result: Result, model: str, batch: int) -> Iterator[Line]:
    goal = MODEL_GOALS[model]
    for precision in PRECISIONS:
        case = {"model": model, "batch": batch, "size": 224, "precision": precision, "experiment": "step"}
        what = f"{model}, batch {batch}, {precision}"
        for task in ("training", "inference"):
            wanted = getattr(goal, task)
            ours = _find(result, "models", "ours", task=task, **case)
            if wanted is not None:
                ratio, which = _best_ratio(ours)
                yield Line(f"{what}: {task}", wanted, ratio, "x", note=which)
        ours, eager = (_find(result, "models", name, task="training", **case) for name in ("ours", "timm"))
        memory = ours["peak_bytes"] / eager["peak_bytes"] if ours and eager else None
        yield Line(f"{what}: peak memory of training", goal.memory, memory, "of eager's", at_most=True)
        if goal.images_a_second is not None:
            rate = ours["images_a_second"] if ours else None
            yield Line(f"{what}: training throughput", goal.images_a_second, rate, "img/s")
        if model == "convnextv2_base":
            v2, v1 = (
                _find(result, "models", "ours", task="inference", **{**case, "model": name})
                for name in ("convnextv2_base", "convnext_base")
            )
            share = v2["images_a_second"] / v1["images_a_second"] if v2 and v1 else None
            yield Line(f"{what}: inference throughput", V2_OF_V1, share, "of V1's")


def _operator_lines(result: Result) -> Iterator[Line]:
    bandwidth = result.facts["bandwidth_bytes_a_second"] / 1e9
    rate = result.facts["matrix_operations_a_second"]["torch.bfloat16"] / 1e12
    shape = {"channels": 96, "side": 56, "batch": 128, "precision": "pure-bf16"}
    for provider, bound in DEPTHWISE_MICROSECONDS.items():
        row = _find(result, "operators", provider, operator="depthwise_conv2d", task="forward", **shape)
        microseconds = row["seconds"]["median"] * 1e6 if row else None
        yield Line(f"depthwise_conv2d forward, 128 x 96@56, {provider}", bound, microseconds, "us", at_most=True)
    for channels, side in TINY_STAGES:
        shape = {"channels": channels, "side": side, "batch": 128, "precision": "pure-bf16"}
        for task in ("forward", "backward"):
            row = _find(result, "operators", "ours", operator="layer_norm", task=task, **shape)
            share = 100 * row["gigabytes_a_second"] / bandwidth if row else None
            yield Line(f"layer_norm {task}, 128 x {channels}@{side}", LAYER_NORM_OF_COPY, share, "% of copy")
        row = _find(result, "operators", "ours", operator="layer_norm_mlp", task="forward", version="v1", **shape)
        share = 100 * row["teraflops"] / rate if row else None
        yield Line(f"layer_norm_mlp forward, 128 x {channels}@{side}", MLP_OF_MATRIX_RATE, share, "% of mm")


def lines(result: Result) -> list[Line]:
    """Every goal, in a fixed order."""
    out = [line for model, batch in GOAL_MODELS for line in _model_lines(result, model, batch)]
    return [*out, *_operator_lines(result)]


def table(result: Result) -> str:
    """The goals in Markdown."""
    words = {True: "met", False: "**missed**", None: ""}
    body = [
        (
            line.goal,
            f"{'at most ' if line.at_most else ''}{line.bound:.3g} {line.unit}",
            "not measured" if line.got is None else f"{line.got:.3g} {line.unit}",
            words[line.met],
            line.note,
        )
        for line in lines(result)
    ]
    return report.markdown(("goal", "wanted", "measured", "", ""), body)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.goals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, nargs="+", help="files that --benchmark-json wrote")
    options = parser.parse_args(arguments)
    try:
        result = report.load(*options.results)
    except report.ReportError as error:
        print(f"benchmarks.goals: {error}", file=sys.stderr)
        return 2
    print(f"{result.facts['chip']}, commit {result.commit}\n\n{table(result)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
