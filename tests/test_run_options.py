"""What a run of the tests can be told (tests/conftest.py)."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

from processes import run

ROOT = Path(__file__).resolve().parent.parent
IN_WORKERS = pytest.param(
    ("-n", "2"),
    marks=pytest.mark.skipif(importlib.util.find_spec("xdist") is None, reason="pytest-xdist is not installed"),
)


@pytest.mark.parametrize("options", [(), IN_WORKERS])
def test_a_run_that_leaves_tests_out_has_not_passed(options):
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_plans.py", "-k", "chip or outside"]
    done = run(*command, *options, "--test-budget", "600", cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout
    done = run(*command, *options, "--test-budget", "0", cwd=ROOT)
    assert done.returncode == 1, done.stdout
    assert "not begun: the budget of 0 s had ended" in done.stdout
    assert " passed" not in done.stdout


FIRST_TEST_BREAKS_THE_GPU = """
import torch

broken = False

def pytest_pyfunc_call(pyfuncitem):
    global broken
    if "[80]" in pyfuncitem.name:  # with the test after it, a worker has it from the start
        broken = True
        raise AssertionError("a planted failure")

def synchronize():
    if broken:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

torch.cuda.is_initialized = lambda: True
torch.cuda.synchronize = synchronize
"""


@pytest.mark.parametrize("options", [(), IN_WORKERS])
def test_a_process_whose_gpu_is_unusable_ends(tmp_path, options):
    (tmp_path / "planted.py").write_text(FIRST_TEST_BREAKS_THE_GPU)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "planted", "tests/test_plans.py", "-k", "chip_of"]
    done = run(*command, *options, cwd=ROOT, PYTHONPATH=tmp_path)
    assert done.returncode == 1, done.stdout
    assert "a planted failure" in done.stdout
    if options:
        assert re.search(r"2 failed, [1-9] passed", done.stdout), done.stdout
        assert "crashed while running" in done.stdout
    else:
        assert "after tests/test_plans.py::test_chip_of_architecture[80] the GPU is unusable: CUDA error" in done.stdout
        assert "1 failed" in done.stdout
