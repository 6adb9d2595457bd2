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
