"""Compiles what the cases of a run launch, before the first of them: a kernel keeps Triton's compiler busy for half a
second of one core, and a model's training step launches some 40 of them, which its first call would wait for.

Processes run our operators and blocks once; what Triton compiles for them stays in its cache on disk.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable

import torch

from .blocks import BLOCK_PROVIDERS
from .cases import MODELS, BlockCase, Case, OperatorCase
from .providers import OPERATOR_PROVIDERS

#: What a run gets that is not done by then is compiled when it is launched.
MOST_SECONDS = 60


def launched_by(cases: Iterable[Case]) -> list[BlockCase | OperatorCase]:
    """The operators and blocks among the cases, and the blocks of the models, each once.

    A block's training step is its inference too, and what the operators of 'ours' leave out 'ours-triton' has.
    """
    out: dict[BlockCase | OperatorCase, None] = {}
    for case in cases:
        if isinstance(case, (BlockCase, OperatorCase)):
            out[case] = None
            continue
        version, _, width = MODELS[case.model]
        for stage in range(4):
            side = case.size // 4 >> stage
            out[BlockCase(version, "training", width << stage, side, case.batch, case.precision)] = None
    return list(out)


def launch(case: BlockCase | OperatorCase, device: torch.device) -> None:
    """In a process of its own: one call by each of our providers that has kernels of its own to compile."""
    for provider in OPERATOR_PROVIDERS if isinstance(case, OperatorCase) else BLOCK_PROVIDERS:
        if provider.name in _names(case) and provider.covers(case, device.type, False):
            provider.build(case, device).run(0)


def _names(case: BlockCase | OperatorCase) -> tuple[str, ...]:
    return ("ours", "ours-triton") if isinstance(case, OperatorCase) else ("ours",)


def compile_ahead(cases: Iterable[Case], device: torch.device, jobs: int) -> int:
    """Returns how many operators and blocks ran. One that fails is left to the test that measures it."""
    wanted, end = launched_by(cases), time.monotonic() + MOST_SECONDS
    # Not forked: CUDA is running in this process. What does not end is killed.
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(wanted)), torch.set_num_threads, (1,)) as pool:
        started = [pool.apply_async(launch, (case, device)) for case in wanted]
        for each in started:
            each.wait(max(0.0, end - time.monotonic()))
        return sum(each.ready() and each.successful() for each in started)
