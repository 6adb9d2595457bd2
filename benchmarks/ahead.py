"""Compiles what models and blocks launch before the first of a run's cases: a kernel keeps Triton's compiler busy for
half a second of one core, and a model's training step has up to 56 of them, which its first call would wait for.

Processes run each block once; what Triton compiles for it stays in its cache on disk.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable

import torch

from .blocks import BLOCK_PROVIDERS
from .cases import GOAL_MODELS, MODELS, BlockCase, Case, ModelCase

#: What is not done by then is compiled when it is launched.
MOST_SECONDS = 60


def blocks_of(cases: Iterable[Case]) -> list[BlockCase]:
    """The blocks among the cases and of the models with goals, each once. A training step has what inference has."""
    out: dict[BlockCase, None] = {}
    for case in cases:
        if isinstance(case, BlockCase):
            out[case] = None
        if isinstance(case, ModelCase) and (case.model, case.batch) in GOAL_MODELS:
            version, _, width = MODELS[case.model]
            for stage in range(4):
                side = case.size // 4 >> stage
                out[BlockCase(version, "training", width << stage, side, case.batch, case.precision)] = None
    return list(out)


def launch(case: BlockCase, device: torch.device) -> None:
    """In a process of its own."""
    (ours,) = (provider for provider in BLOCK_PROVIDERS if provider.name == "ours")
    ours.build(case, device).run(0)


def compile_ahead(cases: Iterable[Case], device: torch.device, jobs: int) -> int:
    """Returns how many blocks ran. One that fails is left to the test that measures it."""
    wanted, end = blocks_of(cases), time.monotonic() + MOST_SECONDS
    if not wanted:
        return 0
    # Not forked: CUDA is running in this process. What does not end is killed.
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(wanted)), torch.set_num_threads, (1,)) as pool:
        started = [pool.apply_async(launch, (case, device)) for case in wanted]
        for each in started:
            each.wait(max(0.0, end - time.monotonic()))
        return sum(each.ready() and each.successful() for each in started)
