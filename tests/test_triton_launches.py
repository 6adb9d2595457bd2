"""Triton's own launcher with the Triton operators, without a GPU: tests/cuda_driver_stub/libcuda.cpp is the driver."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

import triton

import convnext_kernels

FOLDER = Path(__file__).resolve().parent / "cuda_driver_stub"
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The folder with the library; what Triton compiles for its launches goes there too."""
    if not shutil.which("g++"):
        pytest.skip("g++ is needed to build the driver")
    folder = tmp_path_factory.mktemp("driver")
    # By this name Triton links to it, and finds it loaded.
    output = ["-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1"]
    command = ["g++", "-std=c++17", "-O1", "-Wall", "-shared", "-fPIC", f"-I{INCLUDE}", FOLDER / "libcuda.cpp", *output]
    subprocess.run(command, check=True)
    return folder


def run(driver, expression, **settings):
    """Runs check_launches.py with the driver; returns how many tests passed and what was printed."""
    environment = {**os.environ, "CUDA_STUB": str(driver / "libcuda.so.1"), "TRITON_LIBCUDA_PATH": str(driver)}
    environment |= {f"CUDA_STUB_{name.upper()}": str(value) for name, value in settings.items()}
    root = str(Path(convnext_kernels.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    for name in ("TRITON_INTERPRET", "CONVNEXT_KERNELS_BACKEND", "PYTEST_ADDOPTS"):
        environment.pop(name, None)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", FOLDER / "check_launches.py"]
    done = subprocess.run(
        [*command, "-k", expression], capture_output=True, text=True, cwd=FOLDER.parent, env=environment, timeout=900
    )
    passed = re.search(r"(\d+) passed", done.stdout)
    return done.returncode, int(passed[1]) if passed else 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_on_hopper(driver):
    status, passed, output = run(driver, "test")
    assert status == 0 and passed >= 16, output


def test_on_ampere(driver):
    """No tensor maps, and less shared memory."""
    expression = "training_step and (fused-pure-v2 or two-kernels-v2) or any_address"
    status, passed, output = run(driver, expression, capability=80, shared_kib=163)
    assert status == 0 and passed == 4, output


def test_a_driver_with_less_shared_memory_refuses(driver):
    """The check is a check: launches that a chip of 163 KiB accepts are refused by one of 48."""
    status, _, output = run(driver, "training_step and two-kernels-v2", capability=80, shared_kib=48)
    assert status == 1 and "OutOfResources" in output, output
