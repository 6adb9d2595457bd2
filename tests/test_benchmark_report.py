"""What is made of the benchmarks' results: report, floors, goals, comparison with an earlier one."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark_suite import (
    CEILINGS,
    ROOT,
    SMALL,
    blocks,
    cases,
    compare,
    comparison,
    conftest,
    experiments,
    floors,
    goals,
    models,
    providers,
    report,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the report


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


# The second case sends the signal to the run's processes, twice, as `timeout` does, and never ends.
ENDED = """
import os, signal, time
from benchmarks import conftest, timing

compare = conftest.compare

def compare_one(case, *rest):
    if case.task == "backward":
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(100)
    return compare(case, *rest)

conftest.compare = compare_one
conftest.measure_ceilings = lambda device: timing.Ceilings(1e9, {"torch.float32": 1e9})
"""


def test_a_run_that_is_ended_has_written_what_it_measured(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "ended.py").write_text(ENDED)
    command = [sys.executable, "-m", "pytest", "benchmarks/test_operators.py", "--benchmark-only", "-p", "ended"]
    command += ["-k", "bias_gelu and fp32 and 384x14", "--seconds", "0", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)])}
    done = subprocess.run(
        [*command, "--benchmark-json", str(tmp_path / "result.json")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == pytest.ExitCode.INTERRUPTED, done.stdout + done.stderr
    result = report.load(tmp_path / "result.json")
    assert [(row["provider"], row["case"]["task"]) for row in result.rows] == [
        ("ours", "forward"),
        ("eager", "forward"),
    ]
