"""benchmarks/counters.py without a GPU: it reads what ncu writes, and asks for it, from a stand-in."""

import json
import os
import sys

import pytest

import convnext_kernels  # noqa: F401  (first: the one that is installed, where there is one)
from benchmarks import counters

# The page `raw` as Nsight Compute prints it: names, units, a line a kernel; remarks around and between.
STALLS = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {
    "ID": "", "Process ID": "", "Process Name": "", "Host Name": "", "Kernel Name": "", "Context": "", "Stream": "",
    "Block Size": "", "Grid Size": "", "Device": "", "CC": "",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "%", "gpu__time_duration.sum": "us",
    "launch__registers_per_thread": "register/thread", "sm__throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "%",
    STALLS.format("long_scoreboard"): "inst", STALLS.format("barrier"): "inst", STALLS.format("selected"): "inst",
    STALLS.format("long_scoreboard_not_issued"): "inst",
}  # fmt: skip
CASES = ["layer_norm forward ours", "depthwise_conv2d forward ours"]


def line(values):
    return ",".join(f'"{value}"' for value in values)


def kernel(name, dram, time, registers, multiprocessors, occupancy, *stalls):
    place = ["0", "1", "python3", "host", name, "1", "13", "(128, 1, 1)", "(132, 1, 1)", "0", "9.0"]
    return line([*place, dram, time, registers, multiprocessors, occupancy, *stalls])


SPIN = kernel("at::cuda::spin_kernel(long)", "0.1", "1.5", "16", "0.2", "1.5", "0", "0", "1", "0")
PAGE = "\n".join(
    [
        "==PROF== Connected to process 7 (/usr/bin/python3)",
        line(COLUMNS),
        line(COLUMNS.values()),
        SPIN,
        kernel(
            "void ck::forward_kernel<float>(Params)", "91.5", "1,234.5", "40", "33.1", "87.2", "9.5", "0.25", "1", "3"
        ),
        SPIN,
        "==WARNING== a remark of the tool's",
        kernel("_convolution_kernel", "", "20.25", "n/a", "80", "25", "0.5", "2.5", "1", "3"),
        kernel("column_sums_kernel", "1", "2", "32", "3", "4", "0", "0", "1", "0"),
    ]
)


def test_counters_of_each_kernel():
    norm, convolution, add = counters.parse(PAGE, CASES)
    assert (norm.case, convolution.case, add.case) == (CASES[0], CASES[1], CASES[1])
    assert norm.seconds == pytest.approx(1234.5e-6)
    assert (norm.memory, norm.multiprocessors, norm.occupancy, norm.registers) == (91.5, 33.1, 87.2, 40)
    assert (convolution.memory, convolution.registers) == (None, None)
    # The greatest first; what was selected did not wait.
    assert list(norm.stalls.items()) == [("long_scoreboard", 9.5), ("barrier", 0.25)]
    assert list(convolution.stalls) == ["barrier", "long_scoreboard"]
    assert add.stalls == {}


@pytest.mark.parametrize(
    ("text", "cases", "message"),
    [
        ("==ERROR== ERR_NVGPUCTRPERM", CASES, "wrote no counters: ==ERROR== ERR_NVGPUCTRPERM"),
        (PAGE, CASES[:1], "kernel '_convolution_kernel' is in none of the 1 cases"),
        (PAGE, [*CASES, "third"], "expected 3 markers, one a case, got 2"),
        (PAGE.replace(SPIN, "==", 1), CASES, "forward_kernel<float>.* is in none of the 2 cases"),
    ],
)
def test_what_is_not_as_expected_is_an_error(text, cases, message):
    with pytest.raises(counters.CountersError, match=message):
        counters.parse(text, cases)


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """A stand-in that notes how it was called and writes PAGE, for two cases."""
    tool = tmp_path / "ncu"
    tool.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        f"json.dump(sys.argv, open({str(tmp_path / 'call.json')!r}, 'w'))\n"
        "value = lambda name: sys.argv[sys.argv.index(name) + 1]\n"
        f"open(value('--log-file'), 'w').write({PAGE!r})\n"
        f"json.dump({CASES!r}, open(value('--call-each'), 'w'))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("NCU", str(tool))
    return tool


def test_the_command(ncu, tmp_path, capsys):
    assert counters.main(["-k", "layer_norm and 96@56", "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "forward_kernel<float>" in out
    assert "long_scoreboard 9.5, barrier 0.2" in out
    assert [row["kernel"] for row in json.loads((tmp_path / "out.json").read_text())][1:] == [
        "_convolution_kernel",
        "column_sums_kernel",
    ]
    call = json.loads((tmp_path / "call.json").read_text())
    target = call[call.index(sys.executable) :]
    assert target[:-1] == [
        sys.executable,
        "-m",
        "benchmarks.counters",
        "-k",
        "layer_norm and 96@56",
        "--budget",
        "inf",
        "--call-each",
    ]
    assert {"--clock-control", "WarpStateStats", "--profile-from-start"} <= set(call)


def test_no_tool_and_no_case(monkeypatch, capsys):
    monkeypatch.delenv("NCU", raising=False)
    monkeypatch.setenv("PATH", os.devnull)
    assert counters.main([]) == 2
    assert "ncu is needed" in capsys.readouterr().err
    assert counters.main(["-k", "no_such_operator"]) == 2
    assert "no case's name holds all of 'no_such_operator'" in capsys.readouterr().err


def test_a_failing_tool_is_an_error(tmp_path, monkeypatch, capsys):
    tool = tmp_path / "ncu"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("NCU", str(tool))
    assert counters.main(["-k", "layer_norm"]) == 2
    assert "ncu ended with exit code 9" in capsys.readouterr().err


def test_the_cases_are_those_of_a_gpu():
    names = [counters.name_of(*pair) for pair in counters.select("")]
    assert len(names) == len(set(names)) > 50
    assert {
        f"depthwise_conv2d forward 96@56 batch 128 pure-bf16 ours-{version}" for version in ("fma", "tensor")
    } < set(names)
