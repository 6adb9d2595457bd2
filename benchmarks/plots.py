"""The plots of a report, from the rows of a result file (benchmarks/report.py) and the facts in its head."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_COLOURS = {
    "ours": "#0b5cad",
    "ours-keep-hidden": "#5b9bd5",
    "ours-reference": "#a9c9ea",
    "ours-compile": "#08366b",
    "eager": "#8c8c8c",
    "eager-nchw": "#bdbdbd",
    "timm": "#d95f02",
    "timm-nchw": "#f4a261",
    "torchvision": "#7a9a01",
    "compile": "#8e44ad",
    "max-autotune": "#c39bd3",
}
_OTHER_COLOUR = "#444444"


def _of(rows: list[Row], test: str) -> list[Row]:
    return [row for row in rows if row["test"] == test]


def _bars(axes: Any, title: str, unit: str, providers: dict[str, dict[str, float]]) -> None:
    """Horizontal bars: a cluster a case, a bar a provider."""
    names = [name for name in _COLOURS if any(name in values for values in providers.values())]
    names += sorted({name for values in providers.values() for name in values} - set(names))
    position, ticks, labelled = 0.0, [], set()
    for values in providers.values():
        present = [name for name in names if name in values]
        for i, name in enumerate(present):
            label = None if name in labelled else name
            labelled.add(name)
            axes.barh(position + i, values[name], color=_COLOURS.get(name, _OTHER_COLOUR), label=label, height=0.85)
            axes.text(values[name], position + i, f" {values[name]:.3g}", va="center", fontsize=7)
        ticks.append(position + (len(present) - 1) / 2)
        position += len(present) + 1
    axes.set_yticks(ticks, list(providers))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(unit)
    axes.set_title(title, loc="left")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _panels(figure_of: Any, panels: list[tuple[str, str, dict[str, dict[str, float]]]]) -> Any:
    heights = [1.0 + 0.19 * sum(len(values) + 1 for values in providers.values()) for _, _, providers in panels]
    figure, all_axes = figure_of(
        len(panels), 1, figsize=(9, sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for axes, panel in zip(all_axes[:, 0], panels):
        _bars(axes, *panel)
    return figure


def _values(
    rows: Iterable[Row], label: Callable[[Row], str], key: str, scale: float = 1.0
) -> dict[str, dict[str, float]]:
    out: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get(key) is not None:
            out.setdefault(label(row), {})[row["provider"]] = row[key] / scale
    return out


def throughput_plot(rows: list[Row], facts: dict[str, Any], pyplot: Any) -> Any:
    rows = _of(rows, "test_model")
    panels = []
    for task in ("inference", "training"):
        values = _values(
            (row for row in rows if row["case"]["task"] == task),
            lambda row: "{model}\n{precision}, {size} px, batch {batch}".format(**row["case"]),
            "images_a_second",
        )
        if values:
            panels.append((f"{task}, images a second", "img/s", values))
    return _panels(pyplot.subplots, panels) if panels else None


def memory_plot(rows: list[Row], facts: dict[str, Any], pyplot: Any) -> Any:
    blocks = [
        row for row in _of(rows, "test_block") if row["case"]["task"] == "training" and not row["case"]["drop_path"]
    ]
    models = [row for row in _of(rows, "test_model") if row["case"]["task"] == "training"]
    panels = []
    saved = _values(
        (row for row in blocks if row["case"]["channels"] == min(r["case"]["channels"] for r in blocks)),
        lambda row: "{version} {channels}@{side}\n{precision}".format(**row["case"]),
        "saved_bytes_an_element",
    )
    if saved:
        panels.append(("kept for the backward pass of a block", "bytes an input element", saved))
    peak = _values(models, lambda row: "{model}\n{precision}, batch {batch}".format(**row["case"]), "peak_bytes", 1e6)
    if peak:
        panels.append(("peak of a training step", "MB", peak))
    return _panels(pyplot.subplots, panels) if panels else None


def roofline_plot(rows: list[Row], facts: dict[str, Any], pyplot: Any) -> Any:
    """Operations a byte against operations a second; what computes no products is shown by its bytes a second."""
    rows = [row for row in rows if row["suite"] in ("operators", "blocks") and "operations" in row]
    rows = [row for row in rows if row["provider"] in ("ours", row["baseline"])]
    if not rows:
        return None
    bandwidth, matrix = facts["bandwidth_bytes_a_second"], facts["matrix_operations_a_second"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), width_ratios=(3, 2), layout="constrained")
    computing = [row for row in rows if row["operations"]]
    moving = [row for row in rows if not row["operations"]]
    intensities = [row["operations"] / row["least_bytes"] for row in computing]
    if computing:
        span = [min(intensities) / 2, max(intensities) * 2]
        for (dtype, rate), style in zip(matrix.items(), ("-", "--", ":")):
            knee = rate / bandwidth
            line = sorted({span[0], min(max(knee, span[0]), span[1]), span[1]})
            ceiling = [min(rate, bandwidth * x) / 1e12 for x in line]
            left.plot(line, ceiling, style, color="black", lw=1, label=f"roof, {dtype.removeprefix('torch.')}")
    markers = {"operators": "o", "blocks": "s"}
    for is_ours, label in ((False, "fastest eager"), (True, "ours")):
        colour = _COLOURS["ours" if is_ours else "eager"]
        for suite, marker in markers.items():
            chosen = [r for r in computing if (r["provider"] == "ours") is is_ours and r["suite"] == suite]
            left.scatter(
                [row["operations"] / row["least_bytes"] for row in chosen],
                [row["teraflops"] for row in chosen],
                edgecolors=colour,
                # Hollow: under the roof of fp32. Filled: of bf16.
                facecolors=["none" if row["case"]["precision"] == "fp32" else colour for row in chosen],
                marker=marker,
                s=16,
            )
            if chosen:
                left.scatter([], [], c=colour, marker=marker, s=16, label=f"{label}, {suite} (hollow: fp32)")
        chosen = [row for row in moving if (row["provider"] == "ours") is is_ours]
        right.scatter(
            [row["gigabytes_a_second"] for row in chosen],
            [f"{row['case']['operator']} {row['case']['task']}" for row in chosen],
            c=colour,
            s=16,
            label=label if chosen else None,
        )
    if computing:
        left.set(xscale="log", yscale="log")
        left.legend(fontsize=7)
    left.set(xlabel="operations a byte that must move", ylabel="TFLOP/s", title="with convolutions or matrix products")
    right.axvline(bandwidth / 1e9, color="black", lw=1, label="copy")
    right.set(xlabel="GB/s", title="memory alone")
    right.legend(fontsize=7)
    return figure


def scaling_plot(rows: list[Row], facts: dict[str, Any], pyplot: Any) -> Any:
    rows = _of(rows, "test_scaling")
    if not rows:
        return None
    figure, (by_batch, by_size) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, along, fixed, text in ((by_batch, "batch", "size", "batch"), (by_size, "size", "batch", "pixels a side")):
        counts = [row["case"][fixed] for row in rows]
        common = max(set(counts), key=counts.count)
        for provider in dict.fromkeys(row["provider"] for row in rows):
            chosen = [row for row in rows if row["provider"] == provider and row["case"][fixed] == common]
            points = sorted((row["case"][along], 1e3 / row["images_a_second"]) for row in chosen)
            colour = _COLOURS.get(provider, _OTHER_COLOUR)
            axes.plot(*zip(*points), "o-", color=colour, label=provider)
        axes.set(xlabel=text, ylabel="ms an image", title=f"{fixed} {common}")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    case = rows[0]["case"]
    figure.suptitle(f"{case['model']}, {case['task']}, {case['precision']}")
    return figure


PLOTS = {
    "throughput": throughput_plot,
    "memory": memory_plot,
    "roofline": roofline_plot,
    "scaling": scaling_plot,
}


def draw(rows: list[Row], facts: dict[str, Any], folder: Path) -> list[str]:
    """Writes the plots that the result has figures for, and returns their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, plot in PLOTS.items():
        figure = plot(rows, facts, pyplot)
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=120)
            pyplot.close(figure)
            written.append(name)
    return written
