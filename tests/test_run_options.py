"""What a run of the tests can be told (tests/conftest.py)."""

import importlib.util
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
