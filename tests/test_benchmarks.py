"""The benchmark harness itself: whether it can be believed."""

import dataclasses
import math
import os
import time
import types

import pytest
import timm
import torch

import convnext_kernels
from benchmark_suite import (
    CEILINGS,
    CPU,
    SMALL,
    SMALL_BF16,
    ahead,
    blocks,
    cases,
    compare,
    comparison,
    conftest,
    experiments,
    models,
    providers,
    timing,
)
from numerics import scale_gradient

pytestmark = pytest.mark.usefixtures("one_thread")


def operator_provider(name, kind, change):
    """The reference operator, with `change` applied to its output."""

    def build(case, device):
        reference = getattr(convnext_kernels.reference, case.operator)
        return providers.OperatorRunner(case, device, lambda *arguments: change(reference(*arguments)))

    return comparison.Provider(name, kind, build)


def unchanged(y):
    return y


HONEST = operator_provider("honest", "eager", unchanged)


# --- speed


class Sleeper(timing.Runner):
    def __init__(self, seconds):
        self._seconds = seconds

    def run(self, call):
        time.sleep(self._seconds)


def test_a_race_measures_what_passes():
    lanes = {name: timing.lane_of(Sleeper(seconds), CPU) for name, seconds in (("fast", 0.02), ("slow", 0.06))}
    race = timing.race(lanes, CPU, 0.3)
    assert timing.quantiles(race.samples["fast"]).median == pytest.approx(0.02, rel=0.3)
    assert timing.ratios(race.samples["slow"], race.samples["fast"]).median == pytest.approx(3, rel=0.3)
    assert len(race.samples["fast"]) == len(race.samples["slow"]) >= 5


def test_a_drift_of_the_machine_cancels():
    """Everything twice as slow from one round to the next: the ratio stays."""
    fast = [2.0**i for i in range(8)]
    slow = [3 * seconds for seconds in fast]
    assert timing.ratios(slow, fast) == (3, 3, 3)


def test_a_provider_slowed_on_purpose_shows_slower():
    def slowed(y):
        time.sleep(0.05)
        return y

    forward = dataclasses.replace(SMALL, task="forward")
    outcomes = compare(forward, [operator_provider("slowed", "ours", slowed), HONEST])
    slow, honest = outcomes["slowed"].info, outcomes["honest"].info
    assert slow["seconds"]["median"] > 0.05
    assert slow["baseline"] == "honest"
    assert slow["ratio"]["median"] < 0.5
    assert honest["faster_than"]["slowed"]["median"] > 2
    assert slow["roofline_percent"] < honest["roofline_percent"]
    assert slow["images_a_second"] < honest["images_a_second"]


def test_a_slow_first_call_is_no_measure_of_the_others():
    """The first call of a graph's backward pass may compile for seconds: calls in a sample are counted after it."""

    class Compiles(providers.OperatorRunner):
        called = False

        def run(self, call):
            time.sleep(0.0 if self.called else 0.3)
            self.called = True

    provider = comparison.Provider(
        "compiles", "ours", lambda case, device: Compiles(case, device, convnext_kernels.layer_norm)
    )
    outcomes = compare(dataclasses.replace(SMALL, operator="layer_norm"), [provider, HONEST])
    assert outcomes["compiles"].info["calls_a_sample"] > 1


def test_the_baseline_is_the_fastest_eager_provider():
    def slowed(y):
        time.sleep(0.02)
        return y

    forward = dataclasses.replace(SMALL, task="forward")
    others = [operator_provider("slow", "eager", slowed), HONEST, operator_provider("ours", "ours", slowed)]
    info = compare(forward, others)["ours"].info
    assert info["baseline"] == "honest"
    assert info["ratio"] == info["faster_than"]["honest"]


def test_pytest_benchmark_sees_the_samples():
    samples = [0.25, 0.5, 1e-6]
    clock = timing.ReplayClock()
    clock.load(samples)
    seen = []
    for _ in samples:
        start = clock.read()
        clock.advance()
        seen.append(clock.read() - start)
    assert seen == pytest.approx(samples, rel=1e-9)


# --- results


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("forward", lambda y: y * 1.001),
        ("forward", lambda y: y * math.nan),
        ("forward", lambda y: y[:1]),
        ("backward", lambda y: scale_gradient(y, 1.001)),
    ],
    ids=["scaled", "NaN", "shape", "gradient"],
)
def test_a_wrong_output_is_refused(task, change):
    case = dataclasses.replace(SMALL, task=task)
    outcomes = compare(case, [operator_provider("wrong", "ours", change), HONEST])
    assert isinstance(outcomes["wrong"].error, comparison.WrongResult)
    assert not outcomes["wrong"].samples
    assert outcomes["honest"].samples, "the others are measured all the same"
    assert "wrong" not in outcomes["honest"].info["faster_than"]


def test_a_wrong_block_is_refused():
    """A branch that is off by a hundredth, next to a residual that hides it."""
    case = cases.BlockCase("v1", "training", 16, 7, 2, "fp32")

    class Wrong(convnext_kernels.ReferenceConvNeXtBlock):
        def forward(self, x):
            return x + 1.01 * (super().forward(x) - x)

    wrong = comparison.Provider(
        "wrong", "ours", lambda case, device: blocks.BlockRunner(case, device, lambda: Wrong(case.channels))
    )
    outcomes = compare(case, [wrong])
    assert isinstance(outcomes["wrong"].error, comparison.WrongResult)


def test_what_is_not_installed_is_skipped_with_its_reason():
    provider = comparison.Provider("absent", "other", lambda case, device: providers.imported("no_such_module_here"))
    outcome = compare(SMALL, [provider, HONEST])["absent"]
    assert outcome.error is None
    assert "no_such_module_here" in outcome.skipped
    assert not outcome.samples


def test_an_error_is_the_providers_own():
    def broken(case, device):
        raise RuntimeError("broken on purpose")

    outcomes = compare(SMALL, [comparison.Provider("broken", "other", broken), HONEST])
    with pytest.raises(RuntimeError, match="broken on purpose"):
        raise outcomes["broken"].error
    assert outcomes["honest"].samples


def test_an_error_while_it_is_timed_is_the_providers_own():
    """In the checks it still did what it should: a capture into a graph may fail after that."""

    class Fails(providers.OperatorRunner):
        def run(self, call):
            raise RuntimeError("not permitted when stream is capturing")

    broken = comparison.Provider(
        "broken", "ours", lambda case, device: Fails(case, device, convnext_kernels.depthwise_conv2d)
    )
    outcomes = compare(SMALL, [broken, HONEST])
    assert "capturing" in str(outcomes["broken"].error)
    assert outcomes["honest"].samples


def test_an_error_while_memory_is_measured_is_the_providers_own():
    class Fails(providers.OperatorRunner):
        def memory(self):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    broken = comparison.Provider(
        "broken", "ours", lambda case, device: Fails(case, device, convnext_kernels.layer_norm)
    )
    outcomes = compare(dataclasses.replace(SMALL, operator="layer_norm"), [broken, HONEST])
    assert "out of memory" in str(outcomes["broken"].error)
    assert outcomes["honest"].error is None and "peak_bytes" in outcomes["honest"].info


def test_what_ends_a_case_is_each_providers_error(monkeypatch):
    """And no figures of the case before stand for those of this one."""
    options = {"--device": "cpu", "--budget": None, "--seconds": 0.0}
    session = conftest._Session(types.SimpleNamespace(getoption=options.get))
    session.ceilings = CEILINGS
    first, second = SMALL, dataclasses.replace(SMALL, batch=3)
    participants = [HONEST, operator_provider("other", "eager", unchanged)]
    items = [
        types.SimpleNamespace(callspec=types.SimpleNamespace(params={"case": case, "provider": provider}))
        for case in (first, second)
        for provider in participants
    ]
    assert all(session.outcome(first, provider, items).samples for provider in participants)

    def fails(*_):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(comparison, "race", fails)
    outcomes = [session.outcome(second, provider, items) for provider in participants]
    assert [str(outcome.error) for outcome in outcomes] == ["an illegal memory access was encountered"] * 2
    assert not any(outcome.samples for outcome in outcomes)


def test_the_blocks_of_a_run_are_run_ahead():
    """Each of the models' once; what fails is left to its own test."""
    models_of = [cases.ModelCase("convnext_large", task, 224, 128, "pure-bf16") for task in ("training", "inference")]
    block = cases.BlockCase("v2", "training", 16, 7, 2, "autocast-bf16")
    models_of.append(dataclasses.replace(models_of[0], batch=32))  # which is not a goal's
    stages = ((192, 56), (384, 28), (768, 14), (1536, 7))
    assert ahead.blocks_of([*models_of, SMALL, block]) == [
        *(cases.BlockCase("v1", "training", *stage, 128, "pure-bf16") for stage in stages),
        block,
    ]
    wrong = dataclasses.replace(block, precision="no such one")
    assert ahead.compile_ahead([block, wrong], CPU, 2) == 1
    assert ahead.compile_ahead([SMALL], CPU, 2) == 0


@pytest.mark.parametrize(("kind", "skipped"), [("eager", True), ("ours", False)])
def test_what_does_not_fit_into_memory_leaves_the_others_alone(kind, skipped):
    def full(y):
        raise torch.OutOfMemoryError("CUDA out of memory.\nand much more")

    forward = dataclasses.replace(SMALL, task="forward")
    outcomes = compare(forward, [operator_provider("large", kind, full), HONEST])
    large = outcomes["large"]
    assert (large.skipped or str(large.error)) == "out of memory: CUDA out of memory."
    assert (large.error is None) == skipped
    assert outcomes["honest"].samples


def test_the_versions_of_the_depthwise_convolution_are_forced_and_forgotten(monkeypatch):
    seen = []

    class Looks(comparison.CheckedRunner):
        def run(self, call):
            seen.append((os.environ.get(providers.InVersion.VARIABLE), convnext_kernels.backends.current()))

        exact = eager = run

    for before in (None, "auto"):
        if before is None:
            monkeypatch.delenv(providers.InVersion.VARIABLE, raising=False)
        else:
            monkeypatch.setenv(providers.InVersion.VARIABLE, before)
        providers.InVersion(Looks(), "tensor").run(0)
        assert os.environ.get(providers.InVersion.VARIABLE) == before
    assert seen == [("tensor", "cuda")] * 2
    names = [p.name for p in providers.OPERATOR_PROVIDERS if p.covers(SMALL_BF16, "cuda", False)]
    assert {"ours-fma", "ours-tensor"} <= set(names)
    assert not {"ours-fma", "ours-tensor"} & {
        p.name for p in providers.OPERATOR_PROVIDERS if p.covers(SMALL_BF16, "cpu", False)
    }


@pytest.mark.parametrize("precision", cases.PRECISIONS)
@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(("task", "drop_path"), [("inference", 0.0), ("training", 0.0), ("training", 0.4)])
def test_every_block_provider_passes_the_check(version, task, drop_path, precision):
    """Its parameters are the reference's, each gradient stands under its own name, equal samples are dropped."""
    case = cases.BlockCase(version, task, 16, 5, 10, precision, drop_path)
    checked = []
    for provider in blocks.BLOCK_PROVIDERS:
        if provider.kind != "other" and provider.covers(case, "cpu", False):
            error = comparison.check(provider.build(case, CPU), case, provider.kind)
            assert error < 0.3
            checked.append(provider.name)
    assert {"ours", "eager", "eager-nchw", "timm"} <= set(checked)


@pytest.mark.parametrize("batch", [2, models.CHECKED_IMAGES + 1])
def test_model_providers_pass_the_check(batch):
    case = cases.ModelCase("convnext_atto", "training", 32, batch, "fp32")
    for provider in (models.OURS, models.TIMM, models.TIMM_NCHW):
        runner = provider.build(case, CPU)
        assert comparison.check(runner, case, provider.kind) < 1e-4
        assert len(runner.results()["logits"]) == min(batch, models.CHECKED_IMAGES)


@pytest.mark.parametrize("task", ["inference", "training"])
def test_a_compiled_model_sees_one_batch_only(task):
    """As one that would compile again for another; a wrong one is refused all the same."""
    case = cases.ModelCase("convnext_atto", task, 32, models.CHECKED_IMAGES + 1, "fp32")
    for factor in (1.0, 1.01):

        def execute(model, x, factor=factor):
            def run(images):
                assert images.shape == x.shape
                return factor * model(images)

            return run

        runner = models.ModelRunner(case, CPU, execute=execute, compiled=True)
        assert set(runner.results()) == {"logits"}
        if factor == 1:
            assert comparison.check(runner, case, "other") < 1e-4
        else:
            with pytest.raises(comparison.WrongResult):
                comparison.check(runner, case, "other")


def test_masked_pretraining_is_compared_with_masked_dense_convolutions():
    case = cases.ModelCase("convnextv2_atto", "training", 96, 2, "fp32", "masked pretraining")
    participants = [provider for provider in experiments.EXPERIMENT_PROVIDERS if provider.covers(case, "cpu", False)]
    outcomes = compare(case, participants, 0.01)
    assert outcomes.keys() == {"ours", "timm-masked"}
    assert all(outcome.error is None and outcome.samples for outcome in outcomes.values())
    ours, theirs = (outcomes[name].info for name in ("ours", "timm-masked"))
    assert ours["baseline"] == "timm-masked"
    assert ours["saved_bytes"] < 0.2 * theirs["saved_bytes"]


# --- memory


class Allocates(comparison.CheckedRunner):
    NUMBERS = 1 << 24  # 64 MiB in fp32

    def run(self, call):
        torch.full((self.NUMBERS,), 1.0)


def test_the_peak_of_a_known_allocation():
    peak = blocks.peak_growth(lambda: Allocates().run(0), CPU)
    assert peak == pytest.approx(4 * Allocates.NUMBERS, rel=0.02)


@pytest.mark.gpu
def test_the_peak_of_a_known_allocation_on_a_gpu():
    device = torch.device("cuda")
    peak = blocks.peak_growth(lambda: torch.full((Allocates.NUMBERS,), 1.0, device=device), device)
    assert peak == pytest.approx(4 * Allocates.NUMBERS, rel=0.02)


def test_the_peak_of_a_training_step_holds_what_is_saved():
    case = cases.BlockCase("v1", "training", 96, 28, 8, "fp32")
    memory = next(p for p in blocks.BLOCK_PROVIDERS if p.name == "eager").build(case, CPU).memory()
    assert memory["peak_bytes"] > memory["saved_bytes"]


@pytest.mark.parametrize(
    ("provider", "version", "precision", "expected"),
    [
        # x and z, and two numbers a row.
        ("ours", "v1", "fp32", 8 + 8 / 96),
        ("ours", "v2", "pure-bf16", 4 + 8 / 96),
        # Eager's, in numbers an element: x, z, normalised z, the branch 1 each; h and GELU(h) 4 each.
        ("eager", "v1", "fp32", 4 * 12 + 8 / 96),
    ],
)
def test_saved_bytes_of_a_block(provider, version, precision, expected):
    case = cases.BlockCase(version, "training", 96, 14, 4, precision)
    runner = next(p for p in blocks.BLOCK_PROVIDERS if p.name == provider).build(case, CPU)
    assert runner.memory()["saved_bytes_an_element"] == pytest.approx(expected, rel=0.02)


# --- counts


def test_roofline_of_a_depthwise_convolution():
    # 8 channels, a 4x4 map under a 7x7 kernel: every output sees all 16 pixels. 3 images.
    case = cases.OperatorCase("depthwise_conv2d", "forward", "v1", 8, 4, 3, "fp32")
    numbers = 3 * 8 * 16
    assert case.work() == (4 * (2 * numbers + 8 * 49 + 8), 2 * numbers * 16)
    # At the border of a larger map 3, 2 and 1 of 7 taps are missing on either side.
    assert cases.valid_taps(56) == 7 * 56 - 2 * (3 + 2 + 1)
    backward = dataclasses.replace(case, task="backward", precision="pure-bf16")
    assert backward.work() == (2 * (3 * numbers + 2 * (8 * 49 + 8)), 2 * 2 * numbers * 16)


def test_roofline_of_layer_norm():
    case = cases.OperatorCase("layer_norm", "backward", "v1", 96, 56, 4, "pure-bf16")
    assert case.work() == (2 * (3 * 4 * 56 * 56 * 96 + 2 * 2 * 96), 0)
    # Nothing but memory: 7.2 MB at 100 GB/s.
    assert CEILINGS.least_seconds(case) == pytest.approx(case.work().bytes / 1e11)


def test_roofline_of_a_block():
    case = cases.BlockCase("v1", "inference", 2, 1, 1, "fp32")
    # One pixel of two channels: one tap each, then 2x8 and 8x2. The kernel has 2 * 49 + 2 numbers, the norm 4, the
    # linear layers 16 + 8 + 16 + 2, the layer scale 2.
    assert case.work() == (4 * (2 + 2 + 100 + 4 + 42 + 2), 2 * 2 + 2 * 16 + 2 * 16)
    training = dataclasses.replace(case, task="training")
    assert training.work() == (4 * (5 * 2 + 3 * 148), 3 * 68)
    assert CEILINGS.least_seconds(training) == pytest.approx(4 * (10 + 444) / 1e11)
    in_bf16 = cases.BlockCase("v1", "inference", 768, 7, 256, "autocast-bf16")
    assert CEILINGS.least_seconds(in_bf16) == pytest.approx(in_bf16.work().operations / 2e12)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "convnext_tiny", "convnextv2_tiny"])
def test_parameters_of_the_models(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    case = cases.ModelCase(name, "inference", 224, 1, "fp32")
    assert case.parameters() == sum(p.numel() for p in model.parameters())


def test_operations_of_a_model():
    # ConvNeXt-T, 4.5e9 multiplications with an addition each (arXiv:2201.03545, table 9); padding is not counted here.
    work = cases.ModelCase("convnext_tiny", "inference", 224, 1, "fp32").work()
    assert work.operations == pytest.approx(2 * 4.47e9, rel=0.02)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("full", [False, True])
def test_cases_are_distinct_and_countable(device_type, full):
    for suite in ("operator", "block", "model", "scaling", "experiment"):
        make = getattr(cases, f"{suite}_cases")
        made = make(device_type, full)
        assert len({case.group for case in made}) == len(made)
        assert all(case.work().bytes > 0 for case in made)


def test_what_a_budget_leaves_out_of_the_operators_has_no_goal():
    """A minute and a half on a GPU gets through the first third."""
    first = [dataclasses.asdict(case) for case in cases.operator_cases("cuda", False)][:16]
    assert {case["precision"] for case in first} == {"pure-bf16"}
    for operator, task in (("depthwise_conv2d", "forward"), ("layer_norm_mlp", "forward"), ("layer_norm", "backward")):
        stages = [
            (case["channels"], case["side"]) for case in first if (case["operator"], case["task"]) == (operator, task)
        ]
        assert stages == list(cases.TINY_STAGES)


def test_the_shapes_that_acceptance_asks_for_are_there():
    shapes = {
        (case.channels, case.side, case.batch)
        for case in cases.operator_cases("cpu", False)
        if (case.operator, case.task, case.precision) == ("depthwise_conv2d", "backward", "pure-bf16")
    }
    assert shapes == {(96, 56, 4), (192, 28, 4), (384, 14, 4), (768, 7, 4)}
