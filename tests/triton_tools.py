"""Triton without a GPU: compile what an operator launches to cubins and read what the compiler made; the interpreter.

`launch.recorded(chip_of_architecture(90))` lists what operators launch on meta tensors; `compile_launch` compiles each.
"""

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import convnext_kernels

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
class Compiled:
    """A launch's machine code."""

    name: str
    registers: int  # a thread
    stack: int  # bytes a thread: spilled registers
    shared: int  # bytes a block, static and dynamic
    ptx: str
    cubin: bytes

    def sass(self):
        """The machine instructions, as nvdisasm prints them."""
        return disassemble(self.cubin)


def tool(name):
    """A binary of the CUDA toolkit out of Triton's own package."""
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def on_file(cubin, command, *arguments):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool(command), *arguments, file.name], check=True, capture_output=True, text=True).stdout


def disassemble(cubin):
    return on_file(cubin, "nvdisasm", "-c")


def specialised(launch):
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
            block = ",".join(map(str, value.block_shape))
            signature[name] = f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
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


def compile_launch(launch, capability):
    """A launch recorded by launch.recorded, compiled for sm_`capability`."""
    signature, constants, attributes = specialised(launch)
    options = {name: value for name, value in launch.constants.items() if name not in launch.kernel.arg_names}
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = compiled.asm["cubin"]
    usage = on_file(cubin, "cuobjdump", "--dump-resource-usage")
    return Compiled(
        launch.kernel.__name__,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        compiled.metadata.shared,
        compiled.asm["ptx"],
        cubin,
    )


def in_interpreter(script, *arguments, timeout=900):
    """Runs pytest on tests/`script` in a process whose Triton interprets kernels on CPU tensors.

    The interpreter is chosen when a kernel is decorated, so it takes a process of its own. Fails with its output unless
    at least one test ran and all passed.
    """
    # The package that is under test here, installed or not, and the modules beside the tests.
    paths = [str(Path(convnext_kernels.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", script, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and passed, result.stdout[-6000:] + result.stderr[-2000:]
