"""The launch of a CUDA kernel, against a CUDA runtime of our own: no GPU is needed, but nvcc is."""

import subprocess
from pathlib import Path

import pytest

from build_tools import toolchain

ROOT = Path(__file__).resolve().parent.parent


def test_threads_launch_a_kernel_with_different_amounts_of_shared_memory(tmp_path):
    toolkit, _ = toolchain.find_toolkit()
    if not toolkit:
        pytest.skip("no CUDA compiler")
    program = tmp_path / "launch"
    sources = [ROOT / "tests" / "cuda_launch" / name for name in ("launch_cases.cu", "runtime.cpp")]
    includes = [f"-I{folder}" for folder in (ROOT / "csrc", *toolkit.includes)]
    flags = ["-std=c++20", "-arch=sm_80", "-cudart", "none", *includes]
    subprocess.run([toolkit.nvcc, *flags, *sources, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.stdout == "ok\n", run.stdout + run.stderr
