"""Fixtures for every test file, and what a run of them is told.

    pytest -m gpu -n 12                     in several processes, with pytest-xdist: the GPU's tests share it
    pytest -m gpu --test-budget 500         no test begins after 500 seconds; the run fails if one is left out so

After an error that leaves the GPU unusable for a process, such as an access outside its memory, that process ends: of
several, pytest-xdist replaces it, and calls the test that would have been next crashed.
"""

import fcntl
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

# For build_tools and benchmarks, which are not installed. At the end: the installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))

_IN_WORKER = "PYTEST_XDIST_WORKER" in os.environ
for _name in [name for name in os.environ if name.startswith("PYTEST_XDIST_")]:
    del os.environ[_name]  # a pytest that a test starts is no worker of pytest-xdist

_LATE = "not begun: the budget of {:g} s had ended"
_start = time.monotonic()
_lost = ""  # the test that left the GPU unusable


def pytest_addoption(parser):
    parser.addoption("--test-budget", type=float, metavar="SECONDS", help="begin no test after so long, and fail then")


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` skip, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device is available to this PyTorch")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    global _lost
    report = yield
    if report.failed and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            _lost = f"after {item.nodeid} the GPU is unusable: {error}"
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if _lost:
        if _IN_WORKER:
            os._exit(1)
        pytest.exit(_lost, returncode=pytest.ExitCode.TESTS_FAILED)
    budget = item.config.getoption("--test-budget")
    if budget is not None and time.monotonic() - _start > budget:
        pytest.skip(_LATE.format(budget))


def pytest_sessionfinish(session):
    """A run that left tests out for want of time has not passed."""
    budget = session.config.getoption("--test-budget")
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if budget is None or reporter is None:  # None in a worker of pytest-xdist
        return
    if any(_LATE.format(budget) in str(report.longrepr) for report in reporter.stats.get("skipped", ())):
        session.exitstatus = max(session.exitstatus, pytest.ExitCode.TESTS_FAILED)


@pytest.fixture(autouse=True, scope="session")
def triton_interpreted():
    """Where Triton's interpreter runs the kernels: with a GPU's arithmetic; races and accesses outside raise, and fresh
    memory holds NaN."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from triton_interpreter import accesses_checked, as_on_a_gpu

    torch.use_deterministic_algorithms(True)  # for what it does to torch.empty
    with as_on_a_gpu(), accesses_checked():
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fp32_convolutions(monkeypatch):
    """What ours is compared with is fp32 on a GPU too: cuDNN rounds the factors of a convolution to TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(autouse=True)
def gpu_memory(request):
    """Tests marked `gpu_memory(GiB)` skip where so much of the GPU's memory is not free, and run one at a time."""
    marker = request.node.get_closest_marker("gpu_memory")
    if marker is None:
        yield
        return
    (gib,) = marker.args
    # Processes that run tests side by side each see the same free memory.
    with open(Path(tempfile.gettempdir()) / f"convnext_kernels-tests-{os.getuid()}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        free = torch.cuda.mem_get_info()[0]
        if free < gib * 2**30:
            pytest.skip(f"needs {gib} GiB of free GPU memory, and {free / 2**30:.1f} are")
        yield
        torch.cuda.empty_cache()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where a test makes its tensors and modules: the test runs on the CPU and, with `-m gpu`, on a GPU.

    The GPU is PyTorch's default device for as long, so tests name no device but numerics.device_type().
    """
    if request.param == "cpu":
        yield request.param
    else:
        with torch.device(request.param):
            yield request.param


def _with_one_thread():
    """For small tensors, on machines that do other things too: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


one_thread = pytest.fixture(_with_one_thread, scope="module", name="one_thread")
one_thread_a_test = pytest.fixture(_with_one_thread, name="one_thread_a_test")
