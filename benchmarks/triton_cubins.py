"""What the Triton kernels become on a chip that is not here: compiled from launches recorded on meta tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from convnext_kernels import triton_kernels
from convnext_kernels.cli.tune import Workload, arguments_of
from convnext_kernels.triton_kernels.launch import Launch, chip_of_architecture, recorded

__all__ = ["Code", "compile_launch", "launches_of", "specialised"]

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Code:
    """A launch's machine code."""

    name: str
    threads: int  # of a block
    shared: int  # bytes a block, static and dynamic
    ptx: str
    cubin: bytes


def specialised(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """The signature, constants and attributes that Triton's launcher derives from the arguments of a launch."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, launch.arguments))
    values.update({name: value for name, value in launch.constants.items() if name in kernel.arg_names})
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.get(parameter.name, parameter.default)
        if parameter.is_constexpr or value is None or isinstance(value, triton.language.dtype):
            signature[name], constants[name] = "constexpr", value
            continue
        divisible = False
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible = not parameter.do_not_specialize_on_alignment
        elif hasattr(value, "block_shape"):  # a TensorDescriptor
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value == 1 and not parameter.do_not_specialize:
                signature[name], constants[name] = "constexpr", 1
            else:
                divisible = value % 16 == 0 and not parameter.do_not_specialize
        else:
            signature[name] = "fp32"
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(launch: Launch, capability: int) -> Code:
    """A recorded launch, compiled for sm_`capability`."""
    signature, constants, attributes = specialised(launch)
    options = {name: value for name, value in launch.constants.items() if name not in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
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
            key = repr((launch.kernel.__name__, specialised(launch), launch.constants))
            if key not in seen:
                seen.add(key)
                fresh.append(launch)
        if fresh:
            found[str(workload)] = fresh
    return found
