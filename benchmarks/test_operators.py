"""Each operator, forward and backward."""

import pytest

from .cases import operator_cases
from .providers import OPERATOR_PROVIDERS
from .timing import CLOCK


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.cases(operator_cases, OPERATOR_PROVIDERS)
def test_operator(case, provider, measure):
    measure(case, provider)
