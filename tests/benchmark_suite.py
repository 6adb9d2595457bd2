"""The benchmark suite's modules, for the tests of it, and the smallest comparison."""

import dataclasses
import sys
from pathlib import Path

import torch

import convnext_kernels  # noqa: F401  (first: the one that is installed, where there is one)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import (
        ahead,
        blocks,
        cases,
        comparison,
        conftest,
        experiments,
        floors,
        goals,
        models,
        providers,
        report,
        timing,
    )
finally:
    sys.path.remove(str(ROOT))

__all__ = [
    "CEILINGS",
    "CPU",
    "ROOT",
    "SMALL",
    "SMALL_BF16",
    "ahead",
    "blocks",
    "cases",
    "compare",
    "comparison",
    "conftest",
    "experiments",
    "floors",
    "goals",
    "models",
    "providers",
    "report",
    "timing",
]

CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(1e11, {"torch.float32": 1e12, "torch.bfloat16": 2e12})
SMALL = cases.OperatorCase("depthwise_conv2d", "backward", "v1", 16, 7, 2, "fp32")
SMALL_BF16 = dataclasses.replace(SMALL, precision="pure-bf16")


def compare(case, participants, seconds=0.05):
    return comparison.compare(case, participants, CPU, CEILINGS, seconds)
