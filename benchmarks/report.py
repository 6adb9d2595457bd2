"""Result files of `pytest benchmarks --benchmark-json FILE` as a page with tables and plots, and compared.

python -m benchmarks.report RESULT.json ... --out FOLDER    FOLDER/report.md and its plots
python -m benchmarks.report RESULT.json ... --out FOLDER --readme README.md
                                    and the summary, between the README's lines <!-- benchmarks --> and
                                    <!-- /benchmarks -->
python -m benchmarks.report compare OLD.json NEW.json       exit status 1 if a ratio fell by more than 10 %
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plots

#: A ratio that falls below this part of its former value is flagged.
FALL = 0.9

#: The columns of the README's summary, where they were measured.
README_COLUMNS = ("timm", "torchvision", "compile", "onnxruntime", "openvino", "tensorrt")
README_MARKS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")

Row = dict[str, Any]


class ReportError(Exception):
    """A file is not what it should be; the message says which and how."""


@dataclass(frozen=True)
class Result:
    """A result file: where it was measured, and what; `rows` are the extra_info of each benchmark."""

    date: str
    commit: str
    facts: dict[str, Any]
    rows: list[Row]

    def of(self, test: str) -> list[Row]:
        return [row for row in self.rows if row["test"] == test]


def load(*paths: Path) -> Result:
    """Reads files that pytest-benchmark wrote for this harness, several as one: parts of the suite on one machine.

    The facts are the first file's. Of a benchmark that is in several files the last one counts.

    Raises:
        ReportError: there is no such file, it is another kind of file, or they are of different machines or versions.
    """
    first, *others = (_load(path) for path in paths)
    for path, other in zip(paths[1:], others):
        for name in ("chip", "driver", "threads", "torch", "triton"):
            if first.facts[name] != other.facts[name]:
                raise ReportError(
                    f"{path}: expected {name} {first.facts[name]} as in {paths[0]}, got {other.facts[name]}"
                )
        if first.commit != other.commit:
            raise ReportError(f"{path}: expected commit {first.commit} as in {paths[0]}, got {other.commit}")
    rows = {(row["test"], row["group"], row["provider"]): row for each in (first, *others) for row in each.rows}
    return dataclasses.replace(first, rows=list(rows.values()))


def _load(path: Path) -> Result:
    try:
        content = json.loads(path.read_text())
        facts = content["machine_info"]["convnext_kernels"]
        benchmarks, commit, date = content["benchmarks"], content["commit_info"], content["datetime"]
        rows = [
            {**benchmark["extra_info"], "test": benchmark["fullname"].split("::")[1].split("[")[0]}
            for benchmark in benchmarks
            if "provider" in benchmark["extra_info"]
        ]
    except OSError as error:
        raise ReportError(f"{path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError):
        raise ReportError(f"{path}: not a result of `pytest benchmarks --benchmark-json FILE`") from None
    identity = str(commit.get("id", "unknown")) + (" with changes" if commit.get("dirty") else "")
    return Result(date, identity, facts, rows)


def groups(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """Case by case, provider by provider."""
    out: dict[str, dict[str, Row]] = {}
    for row in rows:
        out.setdefault(row["group"], {})[row["provider"]] = row
    return out


# --- Markdown


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; every column but the first is flushed right."""
    rule = [":--", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def milliseconds(row: Row | None) -> str:
    return "" if row is None else f"{row['seconds']['median'] * 1e3:.4g}"


def times(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['median']:.2f}"


def spread(ratio: dict[str, float] | None) -> str:
    return "" if ratio is None else f"{ratio['quantile_20']:.2f} to {ratio['quantile_80']:.2f}"


def number(row: Row | None, key: str, form: str = ".3g", scale: float = 1.0) -> str:
    return "" if row is None or row.get(key) is None else format(row[key] / scale, form)


def facts_table(result: Result) -> str:
    facts = result.facts
    compared = ", ".join(f"{name} {version}" for name, version in facts["libraries_compared"].items() if version)
    rates = ", ".join(
        f"{rate / 1e12:.3g} TFLOP/s {dtype.removeprefix('torch.')}"
        for dtype, rate in facts["matrix_operations_a_second"].items()
    )
    kernels: dict[str, list[str]] = {}
    for choice in facts["backends"]:
        kernels.setdefault(choice["backend"] or "none", []).append(choice["operator"])
    rows = [
        ("chip", facts["chip"]),
        ("driver", facts["driver"] or "none"),
        ("threads", str(facts["threads"])),
        ("torch", facts["torch"]),
        ("triton", facts["triton"] or "none"),
        ("compared with", compared or "none"),
        ("convnext_kernels", f"{facts['convnext_kernels']}, commit {result.commit}"),
        ("our operators run on", "; ".join(f"{backend}: {', '.join(names)}" for backend, names in kernels.items())),
        ("date", result.date[:10]),
        ("copy, measured", f"{facts['bandwidth_bytes_a_second'] / 1e9:.4g} GB/s"),
        ("matrix product, measured", rates),
    ]
    return "\n".join(["| | |", "|:--|:--|", *(f"| {name} | {value} |" for name, value in rows)])


def summary_table(result: Result, against: Sequence[str] | None = None) -> str:
    """Geometric means of ours, against the fastest eager provider of each case and against single ones: those of
    `against` that were measured, or all."""
    collected: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    others: dict[str, None] = {}
    for row in result.rows:
        if row["provider"] != "ours" or row["test"] in ("test_scaling", "test_experiment") or row["ratio"] is None:
            continue
        means = collected.setdefault((row["suite"], row["case"]["task"], row["case"]["precision"]), {})
        means.setdefault("", []).append(row["ratio"]["median"])
        for other, ratio in row["faster_than"].items():
            if not other.startswith("ours") and (against is None or other in against):
                others[other] = None
                means.setdefault(other, []).append(ratio["median"])

    def mean(values: list[float] | None) -> str:
        return f"{statistics.geometric_mean(values):.2f}" if values else ""

    rows = [
        (
            f"{suite}, {task}, {precision}",
            str(len(means[""])),
            f"**{mean(means[''])}**",
            f"{min(means['']):.2f}",
            *(mean(means.get(other)) for other in others),
        )
        for (suite, task, precision), means in sorted(collected.items())
    ]
    header = (
        "times faster, geometric mean",
        "cases",
        "than the fastest eager",
        "least",
        *(f"than {o}" for o in others),
    )
    return markdown(header, rows)


def operators_table(rows: list[Row]) -> str:
    """A row a case, and on a GPU one for each of our backends and versions in it."""
    body = []
    for group, providers in groups(rows).items():
        for name, ours in providers.items():
            if ours["kind"] != "ours":
                continue
            eager = providers.get(ours["baseline"])
            body.append(
                (
                    group if name == "ours" else f"... {name.removeprefix('ours-')}",
                    milliseconds(ours),
                    milliseconds(eager),
                    ours["baseline"] or "",
                    times(ours["ratio"]),
                    spread(ours["ratio"]),
                    number(ours, "gigabytes_a_second"),
                    number(ours, "teraflops"),
                    number(ours, "roofline_percent", ".0f"),
                    number(eager, "roofline_percent", ".0f"),
                    number(ours, "peak_bytes", ".1f", 1e6),
                    number(eager, "peak_bytes", ".1f", 1e6),
                )
            )
    header = ("case", "ours ms", "eager ms", "which", "ratio", "20 % to 80 %", "GB/s", "TFLOP/s", "roofline %")
    return markdown((*header, "eager's %", "peak MB", "eager's MB"), body)


def providers_table(rows: list[Row]) -> str:
    """A row a provider of each case: time, throughput, memory."""
    body = []
    for group, providers in groups(rows).items():
        for index, (name, row) in enumerate(sorted(providers.items(), key=lambda pair: pair[1]["seconds"]["median"])):
            label = f"**{name}**" if name == "ours" else name
            body.append(
                (
                    group if index == 0 else "",
                    label,
                    milliseconds(row),
                    f"{row['images_a_second']:.4g}",
                    times(row["ratio"]),
                    spread(row["ratio"]),
                    number(row, "roofline_percent", ".0f"),
                    number(row, "saved_bytes", ".1f", 1e6),
                    number(row, "saved_bytes_an_element", ".1f"),
                    number(row, "peak_bytes", ".1f", 1e6),
                    number(row, "relative_error", ".1e"),
                )
            )
    header = ("case", "provider", "ms", "img/s", "times faster than the fastest eager", "20 % to 80 %", "roofline %")
    return markdown((*header, "saved MB", "saved B an element", "peak MB", "error against fp64"), body)


def experiments_table(rows: list[Row]) -> str:
    body = [
        (
            group,
            name,
            milliseconds(row),
            str(row["images"]),
            f"{row['images_a_second']:.4g}",
            number(row, "peak_bytes", ".1f", 1e6),
        )
        for group, providers in groups(rows).items()
        for name, row in providers.items()
    ]
    return markdown(("experiment", "provider", "ms", "images", "img/s", "peak MB"), body)


BUSY = """\
Some figures are above the roofline: the machine was busy when its bandwidth and matrix rates were measured, at the
start, or results went to memory that the processor's cache still held. Do not rely on the roofline percentages here."""


def is_above_roofline(row: Row) -> bool:
    return row.get("roofline_percent", 0) > 105


METHOD = """\
A ratio is the baseline's time an image over the provider's, sample by sample of the same round, and of these the
median; above 1 the provider is faster. Baseline: in each case the fastest of the providers that are plain eager PyTorch
(the official block, timm's, torchvision's; channels-last, NCHW). Providers take turns, after their results were checked
against fp64. An operator's backward pass is timed without its forward pass: ours computes again what eager has kept.
`autocast-bf16`: fp32 parameters and residual stream, the branch in bf16; `pure-bf16`: all in bf16. Roofline: the time
that the bytes which must move, or the operations of convolutions and matrix products, take at the rates measured above;
what a provider recomputes or moves twice does not count. Saved: kept for the backward pass. Peak: growth of {memory}
during a call. A model's results are checked for the first 8 images of a batch, gradients included; a compiled model's
logits only."""


def page(result: Result, names: list[str]) -> str:
    def plot(name: str, text: str) -> list[str]:
        return [f"![{text}]({name}.png)", ""] if name in names else []

    lines = [f"# convnext_kernels on {result.facts['chip']}", "", facts_table(result), ""]
    lines += ["## Summary", "", summary_table(result), ""]
    if result.facts["device"].startswith("cuda"):
        from . import goals  # which reads results by this module

        lines += ["## Goals", "", goals.table(result), ""]
    if models := result.of("test_model"):
        lines += ["## Models", "", *plot("throughput", "images a second"), providers_table(models), ""]
    if blocks := result.of("test_block"):
        lines += ["## Blocks", "", *plot("memory", "memory of a training step"), providers_table(blocks), ""]
    if operators := result.of("test_operator"):
        lines += ["## Operators", "", *plot("roofline", "roofline"), operators_table(operators), ""]
    if scaling := result.of("test_scaling"):
        lines += [
            "## As batch and resolution grow",
            "",
            *plot("scaling", "cost of an image"),
            providers_table(scaling),
            "",
        ]
    if experiments := result.of("test_experiment"):
        lines += [
            "## First step, varying and largest batches, masked pretraining",
            "",
            experiments_table(experiments),
            "",
        ]
    if any(map(is_above_roofline, result.rows)):
        lines[4:4] = [f"**{BUSY}**", ""]
    memory = "the memory allocated" if result.facts["device"].startswith("cuda") else "the resident set"
    lines += ["## How it was measured", "", METHOD.format(memory=memory), ""]
    return "\n".join(lines)


# --- the files


def write_report(paths: list[Path], folder: Path, readme: Path | None) -> list[Path]:
    """Writes report.md and the plots, and the README's section; returns the files."""
    result = load(*paths)
    if not result.rows:
        raise ReportError(f"{', '.join(map(str, paths))}: no benchmark in it was measured")
    if importlib.util.find_spec("matplotlib") is None:
        raise ReportError("the plots need matplotlib: pip install matplotlib")
    folder.mkdir(parents=True, exist_ok=True)
    names = plots.draw(result.rows, result.facts, folder)
    report = folder / "report.md"
    report.write_text(page(result, names))
    files = [report, *(folder / f"{name}.png" for name in names)]
    if readme is not None:
        _write_readme(result, readme, report, names)
        files.append(readme)
    return files


def _write_readme(result: Result, readme: Path, report: Path, names: list[str]) -> None:
    begin, end = README_MARKS
    text = readme.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ReportError(f"{readme}: expected one line {begin} and after it one line {end}")
    place = Path(os.path.relpath(report, readme.parent)).as_posix()
    picture = f"![images a second]({Path(place).parent.as_posix()}/throughput.png)\n\n" if "throughput" in names else ""
    section = (
        f"{begin}\n\nMeasured on {result.facts['chip']}, {result.facts['threads']} CPU threads, torch "
        f"{result.facts['torch']}, on {result.date[:10]}:\n\n{summary_table(result, README_COLUMNS)}\n\n"
        f"{picture}"
        f"[All figures, and how they were measured]({place})\n\n{end}"
    )
    readme.write_text(text[: text.index(begin)] + section + text[text.index(end) + len(end) :])


# --- comparison of two results


def compare(old: Result, new: Result) -> tuple[str, bool]:
    """A table of how the ratios of ours changed, and whether one fell by more than 10 %."""
    before, after = (
        {(row["group"], row["provider"]): row for row in result.rows if row["kind"] == "ours" and row["ratio"]}
        for result in (old, new)
    )
    body, fell = [], 0
    for key in sorted(before.keys() & after.keys()):
        was, now = (rows[key]["ratio"]["median"] for rows in (before, after))
        flag = ""
        if now < FALL * was:
            flag, fell = "FELL", fell + 1
        elif now > was / FALL:
            flag = "rose"
        body.append((f"{key[0]}, {key[1]}", f"{was:.2f}", f"{now:.2f}", f"{100 * (now / was - 1):+.0f} %", flag))
    lines = [markdown(("case", "old ratio", "new ratio", "change", ""), body), ""]
    for name in ("chip", "threads", "torch"):
        if old.facts[name] != new.facts[name]:
            lines.append(f"Not the same {name}: {old.facts[name]} and {new.facts[name]}.")
    gone = sorted(before.keys() - after.keys())
    lines += [f"Only in the old result: {group}, {provider}" for group, provider in gone]
    lines.append(f"{fell} of {len(body)} ratios fell by more than {100 * (1 - FALL):.0f} %.")
    return "\n".join(lines), fell > 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if arguments[:1] == ["compare"]:
            parser = argparse.ArgumentParser(
                prog="python -m benchmarks.report compare",
                description="How the ratios of two results differ. Exit status 1 if one fell by more than 10 %.",
            )
            parser.add_argument("old", type=Path)
            parser.add_argument("new", type=Path)
            options = parser.parse_args(arguments[1:])
            text, fell = compare(load(options.old), load(options.new))
            print(text)
            return 1 if fell else 0
        parser = argparse.ArgumentParser(
            prog="python -m benchmarks.report",
            description=__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("results", type=Path, nargs="+", help="files that --benchmark-json wrote, read as one")
        parser.add_argument("--out", type=Path, required=True, help="folder for report.md and the plots")
        parser.add_argument("--readme", type=Path, help="file whose benchmark section to write anew")
        options = parser.parse_args(arguments)
        for file in write_report(options.results, options.out, options.readme):
            print(file)
    except ReportError as error:
        print(f"benchmarks.report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
