"""The benchmark harness itself: whether it can be believed."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

import convnext_kernels  # first: the one that is installed, where there is one

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
try:
    from benchmarks import (
        blocks,
        cases,
        comparison,
        conftest,
        experiments,
        floors,
        goals,
        models,
        providers,
        report,
        timing,
    )
finally:
    sys.path.remove(str(ROOT))

CPU = torch.device("cpu")
CEILINGS = timing.Ceilings(1e11, {"torch.float32": 1e12, "torch.bfloat16": 2e12})
SMALL = cases.OperatorCase("depthwise_conv2d", "backward", "v1", 16, 7, 2, "fp32")
SMALL_BF16 = dataclasses.replace(SMALL, precision="pure-bf16")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors, on machines that do other things too: threads would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def compare(case, participants, seconds=0.05):
    return comparison.compare(case, participants, CPU, CEILINGS, seconds)


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
    race = timing.race({"fast": Sleeper(0.02), "slow": Sleeper(0.06)}, CPU, 0.3)
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


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("forward", lambda y: y * 1.001),
        ("forward", lambda y: y * math.nan),
        ("forward", lambda y: y[:1]),
        ("backward", WrongGradient.apply),
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


def test_the_shapes_that_acceptance_asks_for_are_there():
    shapes = {
        (case.channels, case.side, case.batch)
        for case in cases.operator_cases("cpu", False)
        if (case.operator, case.task, case.precision) == ("depthwise_conv2d", "backward", "pure-bf16")
    }
    assert shapes == {(96, 56, 4), (192, 28, 4), (384, 14, 4), (768, 7, 4)}


# --- the report


def test_masked_pretraining_is_compared_with_masked_dense_convolutions():
    case = cases.ModelCase("convnextv2_atto", "training", 96, 2, "fp32", "masked pretraining")
    participants = [provider for provider in experiments.EXPERIMENT_PROVIDERS if provider.covers(case, "cpu", False)]
    outcomes = compare(case, participants, 0.01)
    assert outcomes.keys() == {"ours", "timm-masked"}
    assert all(outcome.error is None and outcome.samples for outcome in outcomes.values())
    ours, theirs = (outcomes[name].info for name in ("ours", "timm-masked"))
    assert ours["baseline"] == "timm-masked"
    assert ours["saved_bytes"] < 0.2 * theirs["saved_bytes"]


def as_recorded(test, outcomes):
    return [
        {"fullname": f"benchmarks/test_x.py::{test}[{name}]", "extra_info": outcome.info}
        for name, outcome in outcomes.items()
    ]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A result file as pytest-benchmark writes it, of cases that take no time."""
    few = [p for p in blocks.BLOCK_PROVIDERS if p.name in ("ours", "eager", "timm")]
    eager = [p for p in providers.OPERATOR_PROVIDERS if p.name in ("ours", "eager")]
    model = cases.ModelCase("convnext_atto", "training", 32, 2, "fp32")
    norm = dataclasses.replace(SMALL, operator="layer_norm", task="forward")
    benchmarks = as_recorded("test_operator", compare(SMALL, eager, 0.01))
    benchmarks += as_recorded("test_operator", compare(norm, eager, 0.01))
    block = cases.BlockCase("v1", "training", 16, 7, 2, "fp32")
    benchmarks += as_recorded("test_block", compare(block, few, 0.01))
    outcomes = compare(model, models.SCALING_PROVIDERS, 0.01)
    benchmarks += as_recorded("test_model", outcomes)
    for change in ({}, {"batch": 3}, {"size": 64}):
        case = dataclasses.replace(model, **change)
        facts_of_case = {"group": case.group, "case": dataclasses.asdict(case)}
        benchmarks += as_recorded(
            "test_scaling",
            {name: comparison.Outcome(info=outcome.info | facts_of_case) for name, outcome in outcomes.items()},
        )
    varying = cases.ModelCase("convnext_atto", "training", 32, 8, "fp32", "varying batches")
    benchmarks += as_recorded("test_experiment", compare(varying, experiments.EXPERIMENT_PROVIDERS[:2], 0.01))
    facts = {
        "chip": "a chip",
        "driver": None,
        "device": "cpu",
        "threads": 2,
        "torch": "2",
        "triton": None,
        "convnext_kernels": "0",
        "libraries_compared": {"timm": "1"},
        "backends": [{"backend": "cpu", "operator": "layer_norm"}],
        "bandwidth_bytes_a_second": 1e11,
        "matrix_operations_a_second": CEILINGS.matrix,
    }
    path = tmp_path_factory.mktemp("recorded") / "result.json"
    content = {
        "machine_info": {"convnext_kernels": facts},
        "commit_info": {"id": "abc", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": benchmarks,
    }
    path.write_text(json.dumps(content))
    assert len(benchmarks) == 17
    return path


def is_drawn(path):
    """A PNG with something in it."""
    image = pytest.importorskip("matplotlib.image").imread(path)
    return image.shape[0] > 100 and image[..., :3].std() > 0.02


def test_report_has_tables_and_plots(recorded, tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n")
    assert report.main([str(recorded), "--out", str(tmp_path / "out"), "--readme", str(readme)]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    rows = json.loads(recorded.read_text())["benchmarks"]
    for row in rows:
        assert row["extra_info"]["group"] in text
    ours = next(row["extra_info"] for row in rows if row["extra_info"]["suite"] == "blocks")
    line = next(line for line in text.splitlines() if "**ours**" in line and ours["group"] in text)
    assert line.count("|") == 12
    assert f"{ours['ratio']['median']:.2f}" in text
    for name in ("throughput", "memory", "roofline", "scaling"):
        assert f"({name}.png)" in text
        assert is_drawn(tmp_path / "out" / f"{name}.png")
    # Every line of a table has its header's columns.
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table
    written = readme.read_text()
    assert "old" not in written
    assert "(out/report.md)" in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")


def test_parts_of_the_suite_are_read_as_one(recorded, tmp_path):
    content = json.loads(recorded.read_text())
    benchmarks = content["benchmarks"]
    again = json.loads(json.dumps(benchmarks[0]))
    again["extra_info"]["seconds"]["median"] = 123.0
    for name, part in (("a", benchmarks[:9]), ("b", [*benchmarks[9:], again])):
        (tmp_path / name).write_text(json.dumps({**content, "benchmarks": part}))
    whole, parts = report.load(recorded), report.load(tmp_path / "a", tmp_path / "b")
    assert parts.rows[1:] == whole.rows[1:]
    assert parts.rows[0]["seconds"]["median"] == 123.0
    content["machine_info"]["convnext_kernels"]["chip"] = "another"
    (tmp_path / "b").write_text(json.dumps(content))
    with pytest.raises(report.ReportError, match=r"expected chip a chip as in .*, got another"):
        report.load(tmp_path / "a", tmp_path / "b")


# --- floors


@pytest.mark.parametrize(("known", "said"), [("unversioned", "0123456789ab"), ("fedcba", "fedcba")])
def test_the_commit_of_a_copy_without_its_repository(tmp_path, monkeypatch, known, said):
    monkeypatch.setattr(conftest, "__file__", str(tmp_path / "benchmarks" / "conftest.py"))
    (tmp_path / "COMMIT").write_text("0123456789ab\n")
    commit = {"id": known, "dirty": False}
    conftest.pytest_benchmark_update_commit_info(None, commit)
    assert commit == {"id": said, "dirty": False}


def test_floors():
    chip = floors.Chip(bandwidth=1e12, matrix=1e15, lanes=1000, clock=1e9)
    convolution = cases.OperatorCase("depthwise_conv2d", "forward", "v1", 96, 56, 128, "pure-bf16")
    assert floors.floor_of(convolution, chip) == (convolution.work().bytes / 1e12, 0, 0)
    mlp = dataclasses.replace(convolution, operator="layer_norm_mlp", task="backward")
    floor = floors.floor_of(mlp, chip)
    assert floor.matrix == pytest.approx(mlp.work().operations / 1e15)
    assert floor.gelu == pytest.approx(4 * mlp.elements * floors.INSTRUCTIONS["backward"] / 1e12)
    assert floor.seconds == floor.gelu == max(floor)
    gelu = dataclasses.replace(convolution, operator="bias_gelu")
    assert floors.floor_of(gelu, chip).gelu == pytest.approx(gelu.elements * floors.INSTRUCTIONS["forward"] / 1e12)


def test_the_table_of_floors(capsys):
    assert floors.main(["--bandwidth", "4.8"]) == 0
    lines = capsys.readouterr().out.splitlines()
    # 154.2 MB at 4.8 TB/s.
    assert "| depthwise_conv2d forward 96@56 batch 128 | 154.2 | 32.1 |  |  | 32.1 |" in lines
    assert len(lines) == 2 + sum(case.precision == "pure-bf16" for case in cases.operator_cases("cuda", False))
    with pytest.raises(SystemExit):
        floors.main(["--clock", "0"])


def test_the_notes_quote_the_floors():
    notes = (ROOT / "benchmarks" / "NOTES.md").read_text()
    for operator, task in (("depthwise_conv2d", "forward"), ("layer_norm", "backward"), ("layer_norm_mlp", "forward")):
        stages = [
            floors.floor_of(cases.OperatorCase(operator, task, "v1", channels, side, 128, "pure-bf16"), floors.Chip())
            for channels, side in cases.TINY_STAGES
        ]
        row = " | ".join(f"{floor.seconds * 1e6:.1f}" for floor in stages)
        assert re.search(rf"{operator} {task}.* \| {re.escape(row)} \|", notes), row


# --- goals


def measured(suite, provider, case, seconds=1.0, faster_than=(), **figures):
    """A row as the harness records it."""
    return {
        "test": f"test_{suite[:-1]}",
        "suite": suite,
        "group": case.group,
        "provider": provider,
        "kind": "ours" if provider.startswith("ours") else "other",
        "case": dataclasses.asdict(case),
        "seconds": {"median": seconds},
        "faster_than": {name: {"median": ratio} for name, ratio in faster_than},
        **figures,
    }


def goal_lines(*rows):
    facts = {"bandwidth_bytes_a_second": 4e12, "matrix_operations_a_second": {"torch.bfloat16": 8e14}}
    return {line.goal: line for line in goals.lines(report.Result("", "", facts, list(rows)))}


def test_goals_that_were_not_measured_are_said_to_be():
    lines = goal_lines()
    assert len(lines) > 30
    assert all(line.got is None and line.met is None for line in lines.values())


def test_goals_of_models():
    case = cases.ModelCase("convnext_large", "training", 224, 128, "pure-bf16")
    against = [("timm", 2.5), ("compile", 1.4), ("ours-cuda", 0.5)]
    rows = [
        measured("models", "ours", case, 0.07, against, images_a_second=1828.6, peak_bytes=30e9),
        measured("models", "timm", case, 0.2, images_a_second=640, peak_bytes=96e9),
    ]
    lines = goal_lines(*rows)
    name = "convnext_large, batch 128, pure-bf16"
    training = lines[f"{name}: training"]
    assert (training.bound, training.got, training.met) == (1.5, 1.4, False)
    assert training.note == "than compile; measured: compile, timm"
    assert lines[f"{name}: training throughput"].got == 1828.6
    assert lines[f"{name}: training throughput"].met
    assert lines[f"{name}: peak memory of training"].met
    assert lines[f"{name}: inference"].got is None
    v1, v2 = (
        cases.ModelCase(model, "inference", 224, 256, "autocast-bf16") for model in ("convnext_base", "convnextv2_base")
    )
    rows = [measured("models", "ours", case, images_a_second=rate) for case, rate in ((v1, 4000), (v2, 3700))]
    line = goal_lines(*rows)["convnextv2_base, batch 256, autocast-bf16: inference throughput"]
    assert line.got == pytest.approx(0.925)
    assert line.met is False


def test_goals_of_operators():
    convolution = cases.OperatorCase("depthwise_conv2d", "forward", "v1", 96, 56, 128, "pure-bf16")
    norm = dataclasses.replace(convolution, operator="layer_norm")
    mlp = dataclasses.replace(convolution, operator="layer_norm_mlp", channels=384, side=14)
    lines = goal_lines(
        measured("operators", "ours-fma", convolution, 74e-6),
        measured("operators", "ours-tensor", convolution, 46e-6),
        measured("operators", "ours", norm, gigabytes_a_second=3500.0),
        measured("operators", "ours", mlp, teraflops=600.0),
    )
    assert lines["depthwise_conv2d forward, 128 x 96@56, ours-fma"].met
    assert lines["depthwise_conv2d forward, 128 x 96@56, ours-tensor"].met is False
    assert lines["layer_norm forward, 128 x 96@56"].got == pytest.approx(87.5)
    assert lines["layer_norm_mlp forward, 128 x 384@14"].got == pytest.approx(75)
    assert lines["layer_norm_mlp forward, 128 x 384@14"].met is False


def test_goals_are_cases_of_a_gpu():
    """What the goals look for is what the harness measures there."""
    measured_models = {(c.model, c.batch, c.task, c.precision) for c in cases.model_cases("cuda", False)}
    for model, batch in cases.GOAL_MODELS:
        assert model in goals.MODEL_GOALS
        for precision in goals.PRECISIONS:
            assert {(model, batch, task, precision) for task in ("training", "inference")} <= measured_models
    operators = {
        (c.operator, c.task, c.channels, c.side, c.batch, c.precision) for c in cases.operator_cases("cuda", False)
    }
    assert ("depthwise_conv2d", "forward", 96, 56, 128, "pure-bf16") in operators
    assert ("layer_norm_mlp", "forward", 768, 7, 128, "pure-bf16") in operators


def test_goals_of_a_result_of_a_cpu_are_not_measured(recorded, capsys):
    content = json.loads(recorded.read_text())
    content["machine_info"]["convnext_kernels"]["matrix_operations_a_second"] |= {"torch.bfloat16": 1e12}
    path = recorded.with_name("goals.json")
    path.write_text(json.dumps(content))
    assert goals.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert "convnext_tiny, batch 256, autocast-bf16: training | 2.5 x | not measured" in out
    assert goals.main([str(path.with_name("absent.json"))]) == 2


def changed(path, factor, target):
    """The result with the ratio of ours in one case multiplied."""
    content = json.loads(path.read_text())
    ours = next(b["extra_info"] for b in content["benchmarks"] if b["extra_info"]["provider"] == "ours")
    ours["ratio"]["median"] *= factor
    target.write_text(json.dumps(content))
    return ours["group"]


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (0.92, 0), (0.88, 1), (1.3, 0)])
def test_compare_flags_a_drop(recorded, tmp_path, capsys, factor, status):
    group = changed(recorded, factor, tmp_path / "new.json")
    assert report.main(["compare", str(recorded), str(tmp_path / "new.json")]) == status
    lines = capsys.readouterr().out.splitlines()
    flagged = [line for line in lines if "FELL" in line]
    assert len(flagged) == status
    assert all(group in line for line in flagged)
    assert any("rose" in line for line in lines) == (factor > 1.2)


@pytest.mark.parametrize("content", [None, "not JSON", '{"what": "baseline", "results": []}'])
def test_report_names_a_file_that_is_no_result(tmp_path, capsys, content):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert report.main([str(path), "--out", str(tmp_path)]) == 2
    assert str(path) in capsys.readouterr().err


# --- the command


def test_the_command_in_both_invocations(tmp_path):
    """`python -m pytest` puts the checkout first on sys.path, `pytest` does not. The report reads what they wrote."""
    pytest.importorskip("pytest_benchmark")
    script = Path(sys.executable).parent / "pytest"
    commands = [[sys.executable, "-m", "pytest"]] + ([[str(script)]] if script.exists() else [])
    processes = []
    for i, command in enumerate(commands):
        command += ["benchmarks", "--benchmark-only", "-k", "bias_gelu and forward and fp32 and 384x14"]
        command += ["--seconds", "0", "--device", "cpu", "--benchmark-json", str(tmp_path / f"{i}.json")]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))
    for i, process in enumerate(processes):
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0, output
        assert "2 passed" in output
        assert re.search(r"bias_gelu forward 384@14 batch 4 fp32 +[\d.]+ +[\d.]+  eager +[\d.]+x", output), output
        result = report.load(tmp_path / f"{i}.json")
        assert [row["provider"] for row in result.rows] == ["ours", "eager"]
        assert result.facts["bandwidth_bytes_a_second"] > 1e8
        assert report.page(result, [])
    command = [sys.executable, "-m", "benchmarks.report", "compare", *[str(tmp_path / "0.json")] * 2]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "0 of 1 ratios fell" in done.stdout
