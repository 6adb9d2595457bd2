"""Fixtures for every test file."""

import sys
from pathlib import Path

import pytest
import torch

# For build_tools and benchmarks, which are not installed. At the end: the installed package stays the one under test.
sys.path.append(str(Path(__file__).resolve().parent.parent))


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` skip, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device is available to this PyTorch")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def fp32_convolutions(monkeypatch):
    """What ours is compared with is fp32 on a GPU too: cuDNN rounds the factors of a convolution to TF32 by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


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
