"""Whole models: inference, a training step with AdamW, and what becomes of its cost."""

import pytest

from .cases import experiment_cases, model_cases, scaling_cases
from .experiments import EXPERIMENT_PROVIDERS
from .models import MODEL_PROVIDERS, SCALING_PROVIDERS
from .timing import CLOCK


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.cases(model_cases, MODEL_PROVIDERS)
def test_model(case, provider, measure):
    measure(case, provider)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.cases(scaling_cases, SCALING_PROVIDERS)
def test_scaling(case, provider, measure):
    """As the batch and the resolution grow."""
    measure(case, provider)


@pytest.mark.benchmark(timer=CLOCK.read)
@pytest.mark.cases(experiment_cases, EXPERIMENT_PROVIDERS)
def test_experiment(case, provider, measure):
    """The first step, batches that vary, the largest batch that fits, and masked pretraining."""
    measure(case, provider)
