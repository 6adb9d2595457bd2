"""What each kernel of an operator waits for: hardware counters of one call, read with NVIDIA's ncu (Nsight Compute).

python -m benchmarks.counters                          every operator, forward and backward, at a ConvNeXt-T's stages
python -m benchmarks.counters -k 'depthwise and 96@56' those whose name holds every word ('and' is left out)
... --budget SECONDS                                   no case begins after so long; those before are in the result
... --json FILE                                        the same as data
... --csv FILE                                         of what ncu wrote before: no GPU is needed

128 images in pure bf16. ncu runs this module again as its target, which prepares every case, then calls each once with
the profiler on. A kernel of PyTorch's that only waits stands between the cases in ncu's list and tells them apart.
ncu replays a kernel several times with the caches flushed, so times are for one kernel on cold caches; for time a call
use the harness. The clocks are left alone.

Needs a GPU whose counters may be read, and ncu on PATH (or NCU=/path/to/ncu).
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats")
MARKER = "spin_kernel"  # of torch.cuda._sleep
PROVIDERS = ("ours", "ours-fma", "ours-tensor")

_SECONDS = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}
_SECONDS |= {"nsecond": 1e-9, "usecond": 1e-6, "msecond": 1e-3, "second": 1.0}
_STALL = re.compile(r"issue_stalled_(\w+?)_per_")


class CountersError(Exception):
    """No tool, no GPU, or output that is not ncu's; the message says which."""


@dataclass(frozen=True)
class KernelCounters:
    """One kernel of a case's call. Shares are per cent of the chip's peak while it ran; None: not in the file."""

    case: str
    kernel: str
    seconds: float
    grid: str
    block: str
    registers: int | None
    occupancy: float | None  # warps that were resident, of those that a multiprocessor can hold
    multiprocessors: float | None  # their busiest part
    memory: float | None  # DRAM
    stalls: dict[str, float]  # reason -> warps that waited for it, for each instruction issued; the greatest first


# --- what ncu wrote


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None  # empty, or n/a


def parse(text: str, cases: Sequence[str]) -> list[KernelCounters]:
    """Reads the page `raw` that ncu writes with --csv: a line of names, one of units, a line a kernel.

    Args:
        cases: the names of the cases, in the order in which they were called.

    Raises:
        CountersError: no such page, or markers that do not fit the cases.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        told = "; ".join(line for line in lines if line.startswith("==ERROR=="))
        raise CountersError(f"ncu wrote no counters{': ' + told if told else ''}")
    # ncu's own remarks may stand between the lines.
    units, *rows = csv.DictReader(io.StringIO("\n".join(line for line in lines[start:] if line.startswith('"'))))
    out, case = [], -1
    for row in rows:
        if MARKER in row["Kernel Name"]:
            case += 1
            continue
        if not 0 <= case < len(cases):
            raise CountersError(f"kernel {row['Kernel Name']!r} is in none of the {len(cases)} cases")
        out.append(_kernel(cases[case], row, units))
    if case + 1 != len(cases):
        raise CountersError(f"expected {len(cases)} markers, one a case, got {case + 1}")
    return out


def _kernel(case: str, row: dict[str, str], units: dict[str, str]) -> KernelCounters:
    def value(name: str) -> float | None:
        return _number(row.get(name) or "")

    time = "gpu__time_duration.sum"
    stalls = {}
    for name in row:
        found = _STALL.search(name)
        number = _number(row[name] or "") if found else None
        if number and not found[1].endswith("not_issued") and found[1] != "selected":
            stalls[found[1]] = number
    registers = value("launch__registers_per_thread")
    return KernelCounters(
        case=case,
        kernel=row["Kernel Name"],
        seconds=(value(time) or 0.0) * _SECONDS[units[time]],
        grid=row.get("Grid Size", ""),
        block=row.get("Block Size", ""),
        registers=None if registers is None else int(registers),
        occupancy=value("sm__warps_active.avg.pct_of_peak_sustained_active"),
        multiprocessors=value("sm__throughput.avg.pct_of_peak_sustained_elapsed"),
        memory=value("gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"),
        stalls=dict(sorted(stalls.items(), key=lambda pair: -pair[1])),
    )


def _short(kernel: str) -> str:
    """Without return type, namespaces and parameters, and not too long."""
    name = re.sub(r"^void |\w+::|\(.*$", "", kernel)
    return name if len(name) <= 60 else name[:57] + "..."


def render(kernels: Iterable[KernelCounters]) -> str:
    from convnext_kernels.cli.terminal import table

    def share(number: float | None) -> str:
        return "" if number is None else f"{number:.0f}"

    rows, case = [], None
    for each in kernels:
        top = ", ".join(f"{reason} {number:.1f}" for reason, number in list(each.stalls.items())[:3])
        rows.append(
            (
                each.case if each.case != case else "",
                _short(each.kernel),
                f"{each.seconds * 1e6:.1f}",
                share(each.multiprocessors),
                share(each.memory),
                share(each.occupancy),
                "" if each.registers is None else str(each.registers),
                top,
            )
        )
        case = each.case
    header = ("case", "kernel", "us", "SM %", "DRAM %", "occupancy %", "registers", "warps waiting an instruction")
    return table(header, rows, right=(2, 3, 4, 5, 6))


# --- the cases


def select(words: str) -> list[tuple[Any, Any]]:
    """Case and provider of every pair whose name holds all the words."""
    from .cases import operator_cases
    from .providers import OPERATOR_PROVIDERS

    wanted = [word for word in words.split() if word != "and"]
    return [
        (case, provider)
        for case in operator_cases("cuda", False)
        if case.precision == "pure-bf16"
        for provider in OPERATOR_PROVIDERS
        if provider.name in PROVIDERS and provider.covers(case, "cuda", False)
        if all(word in name_of(case, provider) for word in wanted)
    ]


def name_of(case: Any, provider: Any) -> str:
    return f"{case.group} {provider.name}"


def call_each(words: str, names: Path, budget: float) -> None:
    """What ncu profiles: every case once, prepared before; their names go to a file, in this order."""
    import torch

    start = time.monotonic()
    device = torch.device("cuda", torch.cuda.current_device())
    called = []
    for case, provider in select(words):
        if time.monotonic() - start > budget:
            print(f"benchmarks.counters: {budget:g} s had passed before {name_of(case, provider)}", file=sys.stderr)
            break
        runner = provider.build(case, device)
        for call in range(2):  # compiled, and its memory taken from the driver
            runner.run(call)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        torch.cuda._sleep(1)
        runner.run(2)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
        called.append(name_of(case, provider))
        names.write_text(json.dumps(called))
        del runner
        torch.cuda.empty_cache()


# --- the command


def profile(words: str, budget: float) -> tuple[str, list[str]]:
    """ncu's output, and the names of the cases in it."""
    tool = os.environ.get("NCU") or shutil.which("ncu")
    if tool is None:
        raise CountersError("ncu is needed (Nsight Compute): it is not on PATH, and NCU names none")
    with tempfile.TemporaryDirectory() as folder:
        log, names = Path(folder, "log.csv"), Path(folder, "names.json")
        command = [tool, "--csv", "--page", "raw", "--profile-from-start", "off", "--clock-control", "none"]
        command += ["--target-processes", "all", "--log-file", str(log)]
        for section in SECTIONS:
            command += ["--section", section]
        command += [sys.executable, "-m", "benchmarks.counters", "-k", words, "--budget", str(budget)]
        command += ["--call-each", str(names)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "LC_ALL": "C"})
        text = log.read_text() if log.exists() else ""
        if done.returncode:
            told = "\n".join(line for line in text.splitlines() if line.startswith("==ERROR=="))
            raise CountersError(f"ncu ended with exit code {done.returncode}\n{told}".rstrip())
        return text, json.loads(names.read_text()) if names.exists() else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.counters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-k", default="", metavar="WORDS", help="only cases whose name holds all of them")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no case after so long")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the counters there")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="keep what ncu wrote there; read it if it is there")
    parser.add_argument("--call-each", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.call_each is not None:
        call_each(options.k, options.call_each, options.budget)
        return 0
    try:
        cases = [name_of(*pair) for pair in select(options.k)]
        if not cases:
            raise CountersError(f"no case's name holds all of {options.k!r}")
        if options.csv is not None and options.csv.exists():
            text = options.csv.read_text()
            cases = cases[: text.count(MARKER)]  # a budget may have left some out
        else:
            text, cases = profile(options.k, options.budget)
            if options.csv is not None:
                options.csv.write_text(text)
        kernels = parse(text, cases)
    except CountersError as error:
        print(f"benchmarks.counters: {error}", file=sys.stderr)
        return 2
    print(render(kernels))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(kernel) for kernel in kernels], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
