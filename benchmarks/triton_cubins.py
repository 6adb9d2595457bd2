"""What the Triton kernels become on a chip that is not here: compiled from launches recorded on meta tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from convnext_kernels import triton_kernels
from convnext_kernels.cli.tune import Workload, arguments_of
from convnext_kernels.triton_kernels import offline
from convnext_kernels.triton_kernels.launch import Launch, chip_of_architecture, recorded

__all__ = ["Code", "compile_launch", "launches_of"]


@dataclass(frozen=True)
class Code:
    """A launch's machine code."""

    name: str
    threads: int  # of a block
    shared: int  # bytes a block, static and dynamic
    ptx: str
    cubin: bytes


def compile_launch(launch: Launch, capability: int) -> Code:
    """A recorded launch, compiled for sm_`capability`."""
    compiled = offline.compile_launch(launch, capability)
    # Warps that the compiler adds for specialised roles are not counted: the kernels ask for none.
    threads = 32 * compiled.metadata.num_warps
    return Code(launch.kernel.__name__, threads, compiled.metadata.shared, compiled.asm["ptx"], compiled.asm["cubin"])


def launches_of(workloads: Iterable[Workload], capability: int) -> dict[str, list[Launch]]:
    """Workload -> what it launches on a chip of this compute capability, each kind of code once."""
    found: dict[str, list[Launch]] = {}
    seen: set[str] = set()
    for workload in workloads:
        with recorded(chip_of_architecture(capability)) as launches:
            triton_kernels.implementation(workload.operator)(*arguments_of(workload, torch.device("meta")))
        fresh = []
        for launch in launches:
            key = repr((launch.kernel.__name__, offline.specialised(launch, capability)))
            if key not in seen:
                seen.add(key)
                fresh.append(launch)
        if fresh:
            found[str(workload)] = fresh
    return found
