"""Triton without a GPU: compile what an operator launches to cubins and read what the compiler made; a process whose
Triton interprets (triton_interpreter.py has what it lacks).

`launch.recorded(chip_of_architecture(90))` lists what operators launch on meta tensors; `compile_launch` compiles each.
"""

import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

import convnext_kernels
from benchmarks import triton_cubins


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


def compile_launch(launch, capability):
    """A launch recorded by launch.recorded, compiled for sm_`capability`."""
    code = triton_cubins.compile_launch(launch, capability)
    usage = on_file(code.cubin, "cuobjdump", "--dump-resource-usage")
    return Compiled(
        code.name,
        int(re.search(r"REG:(\d+)", usage)[1]),
        int(re.search(r"STACK:(\d+)", usage)[1]),
        code.shared,
        code.ptx,
        code.cubin,
    )


def longest_sum(ptx):
    """How many FMAs are in the longest chain of them, each adding to the sum of the one before.

    Infinite where a turn of the loop adds to what the one before has left: the first adds to a register that the last
    is copied to.
    """
    writes, addends, copies, moved, lengths, first = {}, {}, {}, {}, {}, {}
    for name, result, operands in re.findall(r"^\s*([a-z][\w.]*)\s+(%\w+), ([^;]*);", ptx, re.MULTILINE):
        writes[result] = writes.get(result, 0) + 1
        if name == "fma.rn.f32":
            addends[result] = operands.split(", ")[2]
        elif name.startswith("mov."):
            copies[result] = operands
            moved.setdefault(result, []).append(operands)
    for result, addend in addends.items():  # in the order of the text, so that what is added to comes first
        while addend in copies and writes[addend] == 1:
            addend = copies[addend]
        lengths[result] = 1 + lengths.get(addend, 0)
        first[result] = first.get(addend, addend)
    carried = {(first.get(source), register) for register, sources in moved.items() for source in sources}
    if any(begin == register for begin, register in carried) or any(first[each] == each for each in first):
        return math.inf
    return max(lengths.values(), default=0)


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
