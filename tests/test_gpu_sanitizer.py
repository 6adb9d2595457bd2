"""Races and bounds of every kernel on a GPU, as compute-sanitizer sees them: minutes a tool."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import convnext_kernels as ck

pytestmark = pytest.mark.gpu


def sanitizer():
    beside_nvcc = shutil.which("nvcc")
    folders = [Path(beside_nvcc).resolve().parent] if beside_nvcc else []
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin"))
    return shutil.which("compute-sanitizer") or next(
        (str(folder / "compute-sanitizer") for folder in folders if (folder / "compute-sanitizer").is_file()), None
    )


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    """Bounds, alignment and races of every kernel that small steps launch; each tensor is an allocation of its own."""
    program = sanitizer()
    if not program:
        pytest.skip("compute-sanitizer is not installed")
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    if tool == "memcheck":  # what libraries ask for and do not get, CUDA's newer functions for instance, is no error
        command += ["--report-api-errors", "no"]
    command += [sys.executable, str(Path(__file__).with_name("gpu_small_steps.py"))]
    # The package that is under test here, installed or not.
    paths = [str(Path(ck.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, env=environment)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    assert "small steps done" in done.stdout and "0 errors" in done.stdout + done.stderr
