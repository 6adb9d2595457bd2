"""The block, V1 and V2: inference, and a training step with and without dropped samples."""

import pytest

from .blocks import BLOCK_PROVIDERS
from .cases import block_cases
from .timing import CLOCK


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.cases(block_cases, BLOCK_PROVIDERS)
def test_block(case, provider, measure):
    measure(case, provider)
