"""The harness: `pytest benchmarks --benchmark-only` measures what this machine can run and prints the comparison.

    pytest benchmarks --benchmark-only                              the cases of a CPU, or of the GPU if there is one
    pytest benchmarks --benchmark-only -k 'block and training'      some of them
    pytest benchmarks --benchmark-only --full                       every stage, model, batch and resolution: days
    pytest benchmarks --benchmark-only --budget 500                 no case is begun after 500 seconds
    pytest benchmarks --benchmark-only --benchmark-json result.json
    python -m benchmarks.report result.json --out folder            tables and plots

A test is one provider in one case. The first test of a case builds all its providers that were asked for, checks
their results against fp64, and times them in turns, a sample each a round, so that a drift of the machine meets all.
Each test then hands its own samples to pytest-benchmark. 'ratio' is how many times less time an image than the
baseline ours takes: the median over the rounds. The baseline is the fastest provider of the case that is plain eager
PyTorch: the official block or timm's or torchvision's, channels-last or NCHW.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from convnext_kernels import backends
from convnext_kernels.cli.environment import describe_backends, describe_environment
from convnext_kernels.cli.terminal import table

from .ahead import compile_ahead
from .cases import Case
from .comparison import Outcome, Provider, compare
from .report import BUSY, is_above_roofline
from .timing import CLOCK, Ceilings, measure_ceilings

_COLUMNS = "median,iqr,rounds,iterations"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("convnext_kernels benchmarks")
    group.addoption("--device", default=None, help="cpu or cuda (default: cuda if there, else cpu)")
    group.addoption("--full", action="store_true", help="every case of benchmarks/cases.py; takes very long")
    group.addoption(
        "--budget", type=float, metavar="SECONDS", help="begin no case after so long; the result file has the others"
    )
    group.addoption(
        "--jobs",
        type=int,
        default=min(16, os.cpu_count() or 1),
        help="processes that compile our Triton kernels before the first case on a GPU; 1: none (default: one a core)",
    )
    group.addoption("--seconds", type=float, default=0.3, help="of timing a provider in a case (default: 0.3)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cases(cases, providers): what a benchmark runs over")
    if not any(argument.startswith("--benchmark-columns") for argument in config.invocation_params.args):
        config.option.benchmark_columns = _COLUMNS.split(",")
    config.stash[_STATE] = _Session(config)


def pytest_sessionstart() -> None:
    """What ends a run that takes too long is SIGTERM: as after Ctrl-C, what was measured by then is written."""

    def interrupt(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # `timeout` sends it twice, to the process and to its group
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("cases")
    if marker is None:
        return
    cases, providers = marker.args
    state = metafunc.config.stash[_STATE]
    device_type, full = state.device.type, metafunc.config.getoption("--full")
    pairs = [
        pytest.param(case, provider, id=f"{case.group.replace(' ', '-').replace('@', 'x')}-{provider}")
        for case in cases(device_type, full)
        for provider in providers
        if provider.covers(case, device_type, full)
    ]
    metafunc.parametrize(("case", "provider"), pairs)


#: Libraries that providers come from, as pip names them.
COMPARED = ("timm", "torchvision", "transformers", "onnxruntime", "openvino", "liger-kernel", "torch-tensorrt")


class _Session:
    """What tests share: the device, its measured ceilings, and the outcomes of the case at hand."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        name = config.getoption("--device") or ("cuda" if torch.cuda.device_count() else "cpu")
        self.device = torch.device(name, torch.cuda.current_device() if name == "cuda" else None)
        self.measured: list[dict[str, Any]] = []
        self._case: Case | None = None
        self._outcomes: dict[str, Outcome] = {}
        self._start = time.monotonic()

    @functools.cached_property
    def ceilings(self) -> Ceilings:
        """Measured before the first case, and the device made ready with it."""
        if self.device.type == "cuda":
            # Not the default stream, which cannot be captured into graphs.
            torch.cuda.set_stream(torch.cuda.Stream(self.device))
            torch.backends.cudnn.benchmark = True
        return measure_ceilings(self.device)

    def outcome(self, case: Case, provider: Provider, items: list[pytest.Item]) -> Outcome:
        if case != self._case:
            if self._case is None and self.device.type == "cuda" and self._config.getoption("--jobs") > 1:
                cases = {item.callspec.params["case"]: None for item in items if getattr(item, "callspec", None)}
                compile_ahead(cases, self.device, self._config.getoption("--jobs"))
            providers = [
                item.callspec.params["provider"]
                for item in items
                if getattr(item, "callspec", None) and item.callspec.params.get("case") == case
            ]
            self._case, self._outcomes = case, {}
            budget = self._config.getoption("--budget")
            if budget is not None and time.monotonic() - self._start > budget:
                late = Outcome(skipped=f"the budget of {budget:g} s ended before this case")
                self._outcomes = {each.name: late for each in providers}
            else:
                seconds = self._config.getoption("--seconds")
                try:
                    self._outcomes = compare(case, providers, self.device, self.ceilings, seconds)
                except Exception as error:  # of the device, say: it is no single provider's, and each says so
                    self._outcomes = {each.name: Outcome(error=error) for each in providers}
        return self._outcomes[provider.name]

    def facts(self) -> dict[str, Any]:
        """The head of a result file."""
        on_cuda = self.device.type == "cuda"
        environment = describe_environment()
        return environment | {
            "device": str(self.device),
            "chip": torch.cuda.get_device_name(self.device) if on_cuda else environment["processor"],
            "driver": _driver() if on_cuda else None,
            "libraries_compared": {name: _version(name) for name in COMPARED},
            "backends": [b for b in describe_backends() if b["device"] == self.device.type],
            "bandwidth_bytes_a_second": self.ceilings.bandwidth,
            "matrix_operations_a_second": self.ceilings.matrix,
        }


_STATE = pytest.StashKey[_Session]()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return None  # a driver without its tool


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """A function of case and provider that measures, skips with the reason, or raises what the provider raised."""
    state = request.config.stash[_STATE]

    def run(case: Case, provider: Provider) -> None:
        outcome = state.outcome(case, provider, request.session.items)
        if outcome.skipped:
            pytest.skip(outcome.skipped)
        if outcome.error is not None:
            raise outcome.error
        benchmark.group, benchmark.name = case.group, str(provider)
        benchmark.extra_info.update(outcome.info)
        state.measured.append(outcome.info)
        CLOCK.load(outcome.samples)
        benchmark.pedantic(CLOCK.advance, rounds=len(outcome.samples), iterations=1)

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["convnext_kernels"] = config.stash[_STATE].facts()
    machine_info.get("cpu", {}).pop("flags", None)


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    """A copy without its repository, like a source distribution, has its commit in the file COMMIT."""
    recorded = Path(__file__).resolve().parent.parent / "COMMIT"
    if commit_info.get("id") in (None, "unknown", "unversioned") and recorded.is_file():
        commit_info["id"] = recorded.read_text().strip()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    for benchmark in output_json["benchmarks"]:
        # Python objects; the case is in extra_info.
        benchmark["params"] = {"provider": str(benchmark["params"]["provider"])}
        # Every sample of hundreds of benchmarks would be megabytes; quantiles and ratios by round are in extra_info.
        benchmark["stats"].pop("data", None)
        del benchmark["options"]
        benchmark["extra_info"] = _rounded(benchmark["extra_info"])


def _rounded(value: Any) -> Any:
    """Every float to six digits."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    state = config.stash[_STATE]
    if not state.measured:
        return
    terminalreporter.section("convnext_kernels against eager PyTorch")
    terminalreporter.write_line(render(state.measured))
    if any(map(is_above_roofline, state.measured)):
        terminalreporter.write_line(f"\n{BUSY}")
    fallbacks = [c.operator for c in backends.describe(state.device.type) if c.backend == "reference"]
    if fallbacks:
        terminalreporter.write_line("\nNo kernel of ours on this device, so PyTorch's own run: " + ", ".join(fallbacks))


def render(measured: list[dict[str, Any]]) -> str:
    """A row a case: ours against the baseline; and the geometric means."""
    rows, ratios = [], {}
    by_name = {(info["group"], info["provider"]): info for info in measured}
    for info in measured:
        if info["provider"] != "ours" or info["ratio"] is None:
            continue
        baseline = by_name.get((info["group"], info["baseline"]))
        ratio = info["ratio"]
        rows.append(
            (
                info["group"],
                f"{info['seconds']['median'] * 1e3:.3f}",
                f"{baseline['seconds']['median'] * 1e3:.3f}" if baseline else "",
                info["baseline"],
                f"{ratio['median']:.2f}x",
                f"{ratio['quantile_20']:.2f}-{ratio['quantile_80']:.2f}",
                f"{info['roofline_percent']:.0f}" if "roofline_percent" in info else "",
                *(_megabytes(i) for i in (info, baseline)),
            )
        )
        key = (info["suite"], info["case"]["task"], info["case"]["precision"])
        ratios.setdefault(key, []).append(ratio["median"])
    if not rows:
        return "nothing to compare: ours or every eager provider was deselected, skipped or refused"
    header = ("case", "ours ms", "eager ms", "which", "ratio", "20-80 %", "roof %", "peak MB", "eager's")
    lines = [table(header, rows, right=(1, 2, 4, 5, 6, 7, 8)), ""]
    for (suite, task, precision), values in sorted(ratios.items()):
        mean, count = statistics.geometric_mean(values), len(values)
        lines.append(f"{suite}, {task}, {precision}: {mean:.2f}x (geometric mean of {count}, least {min(values):.2f}x)")
    return "\n".join(lines)


def _megabytes(info: dict[str, Any] | None) -> str:
    return "" if info is None or info.get("peak_bytes") is None else f"{info['peak_bytes'] / 1e6:.1f}"
