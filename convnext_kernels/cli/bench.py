"""``convnext-kernels bench``: the fused block against the same block in eager PyTorch, on this device."""

from __future__ import annotations

import argparse
import copy
import datetime
import math
import re
import statistics
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..block import FusedConvNeXtBlock
from ..reference import ReferenceConvNeXtBlock
from .environment import describe_backends, describe_environment
from .measure import Timing, peak_growth, saved_bytes, time_interleaved
from .terminal import (
    Progress,
    allocating,
    check_sizes,
    count_argument,
    device_argument,
    json_file_argument,
    number_argument,
    show,
    stage_argument,
    table,
    threads_argument,
)

__all__ = ["add_parser"]

#: The stages of ConvNeXt-T at 224 px: channels and side of the feature map.
STAGES = ("96@56", "192@28", "384@14", "768@7")

#: name: dtype of input and parameters, autocast's dtype, and the error allowed against fp64 (relative RMS). A bound for
#: each result, and not a comparison with eager's, whose LayerNorm gradients are off by a tenth on CPU in bf16.
PRECISIONS = {
    "fp32": (torch.float32, None, 1e-4),
    "autocast-bf16": (torch.float32, torch.bfloat16, 3e-2),
    "pure-bf16": (torch.bfloat16, None, 3e-2),
}

#: The inputs are of order 1, and so are the results. An RMS below this is what is left where almost everything cancels,
#: as in most gradients that pass a LayerNorm of one channel, which are 0: their errors are taken as they are.
_SMALL = 0.1


class WrongResultError(RuntimeError):
    """The fused block does not compute the block: there is nothing to time."""


@dataclass(frozen=True)
class Setting:
    """One row: a block of a stage in a precision."""

    version: str
    channels: int
    size: int
    precision: str
    batch: int

    def __str__(self) -> str:
        return f"{self.version.upper()} {self.channels}@{self.size} {self.precision}"


class Subject:
    """A block with its input in one memory format: an inference, a training step, and the results of one."""

    def __init__(self, block: nn.Module, x: Tensor, grad: Tensor, autocast: torch.dtype | None) -> None:
        self._block, self._grad, self._autocast = block, grad, autocast
        self._x = x.detach().requires_grad_()
        self._parameters = list(block.parameters())

    def _forward(self, x: Tensor) -> Tensor:
        if self._autocast is None:
            return self._block(x)
        with torch.autocast(x.device.type, self._autocast):
            return self._block(x)

    def infer(self) -> Tensor:
        with torch.inference_mode():
            return self._forward(self._x.detach())

    def train(self) -> Tensor:
        """Forward and backward, gradients of the input and of every parameter."""
        self._x.grad = None
        for parameter in self._parameters:
            parameter.grad = None
        y = self._forward(self._x)
        y.backward(self._grad.to(y.dtype))
        return y

    def results(self) -> dict[str, Tensor]:
        """The branch's output and every gradient. The residual is taken off, it would hide a wrong branch."""
        y = self.train()
        out = {"output": y.detach() - self._x.detach(), "grad x": self._x.grad - self._grad}
        out |= {f"grad {name}": parameter.grad for name, parameter in self._block.named_parameters()}
        return {name: tensor.detach().clone() for name, tensor in out.items()}

    def saved_bytes(self, batch: int) -> int:
        x = self._x.detach()[:batch].clone(memory_format=torch.preserve_format).requires_grad_()
        return saved_bytes(lambda: self._forward(x), self._parameters)

    def peak(self) -> int | None:
        def step() -> None:
            self.train()  # the output is freed before the gradients are: as in a training loop

        for parameter in (self._x, *self._parameters):
            parameter.grad = None
        growth = peak_growth(step, self._x.device)
        for parameter in (self._x, *self._parameters):
            parameter.grad = None
        return growth


def _randomise(block: nn.Module, generator: torch.Generator) -> None:
    """Parameters of a trained network's order of size: a layer scale of 1e-6 would hide the branch."""
    for name, parameter in block.named_parameters():
        scale, mean = (0.2, 1.0) if name in ("norm.weight", "gamma") else (parameter[0].numel() ** -0.5, 0.0)
        if parameter.dim() == 1 and mean == 0.0:
            scale = 0.2
        values = torch.randn(parameter.shape, generator=generator) * scale + mean
        with torch.no_grad():
            parameter.copy_(values)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _errors(results: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """The RMS error of each result, relative to the exact one's RMS unless that is small."""
    out = {}
    for name, expected in exact.items():
        if results[name].shape != expected.shape:
            raise WrongResultError(f"{name}: expected shape {tuple(expected.shape)}, got {tuple(results[name].shape)}")
        scale = _rms(expected)
        out[name] = _rms(results[name].double() - expected) / (scale if scale > _SMALL else 1.0)
    return out


def _worst(errors: dict[str, float]) -> dict[str, Any]:
    """The result with the largest error; NaN counts as the largest."""
    name = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
    return {"rms": errors[name], "result": name}


def _subjects(setting: Setting, device: torch.device) -> dict[str, Subject]:
    """The fused block; the reference in both memory formats, as which is faster depends on the shape; and in fp64."""
    dtype, autocast, _ = PRECISIONS[setting.precision]
    generator = torch.Generator().manual_seed(2301)
    options: dict[str, Any] = {"use_grn": setting.version == "v2", "device": device, "dtype": dtype}
    fused = FusedConvNeXtBlock(setting.channels, **options)
    eager = ReferenceConvNeXtBlock(setting.channels, **options)
    _randomise(eager, generator)
    fused.load_state_dict(eager.state_dict())
    shape = (setting.batch, setting.channels, setting.size, setting.size)
    x, grad = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    last = [t.contiguous(memory_format=torch.channels_last) for t in (x, grad)]
    return {
        "fused": Subject(fused, *last, autocast),
        "channels-last": Subject(eager, *last, autocast),
        "NCHW": Subject(eager, x, grad, autocast),
        "exact": Subject(copy.deepcopy(eager).double(), *(t.double() for t in last), None),
    }


def _saved_an_element(subject: Subject, setting: Setting) -> float:
    """Saved bytes an input element: what a second sample adds, so that casts of weights are not counted."""
    growth = subject.saved_bytes(2) - subject.saved_bytes(1)
    return growth / (setting.channels * setting.size**2)


def measure(setting: Setting, device: torch.device, seconds: float) -> dict[str, Any]:
    """One row's figures. PyTorch's times are those of the faster memory format, for each task by itself.

    Raises:
        WrongResultError: the fused block's results are not the reference's.
    """
    subjects = _subjects(setting, device)
    exact = subjects.pop("exact").results()
    errors = {
        side: _worst(_errors(subjects[key].results(), exact))
        for side, key in (("fused", "fused"), ("pytorch", "channels-last"))
    }
    del exact
    error, bound = errors["fused"], PRECISIONS[setting.precision][2]
    if not error["rms"] <= bound:
        raise WrongResultError(
            f"{setting}: error {error['rms']:.2e} of {error['result']} against fp64, allowed {bound:.0e}"
        )

    out: dict[str, Any] = {**asdict(setting), "relative_error": errors}
    fastest = {}
    for task in ("infer", "train"):
        timings = time_interleaved({key: getattr(s, task) for key, s in subjects.items()}, device, seconds)
        eager = {key: timing for key, timing in timings.items() if key != "fused"}
        fastest[task] = min(eager, key=lambda key: eager[key].median)
        out[task] = {
            "fused": _timing(timings["fused"], setting),
            "pytorch": _timing(eager[fastest[task]], setting) | {"memory_format": fastest[task]},
            "speedup": eager[fastest[task]].median / timings["fused"].median,
        }
    reference = subjects[fastest["train"]]
    ours = subjects["fused"]
    two = _subjects(Setting(setting.version, setting.channels, setting.size, setting.precision, 2), device)
    out["saved_bytes_an_element"] = {
        "fused": _saved_an_element(two["fused"], setting),
        "pytorch": _saved_an_element(two[fastest["train"]], setting),
    }
    out["peak_bytes"] = {"fused": ours.peak(), "pytorch": reference.peak()}
    return out


def _timing(timing: Timing, setting: Setting) -> dict[str, Any]:
    return {
        "ms": timing.median,
        "ms_quantile_20": timing.low,
        "ms_quantile_80": timing.high,
        "rounds": timing.rounds,
        "calls_a_round": timing.calls_a_round,
        "images_a_second": setting.batch / timing.median * 1e3,
    }


# --- the table


def _row(result: dict[str, Any]) -> list[str]:
    def milliseconds(task: str) -> list[str]:
        task_result = result[task]
        return [f"{task_result[side]['ms']:.2f}" for side in ("fused", "pytorch")] + [f"{task_result['speedup']:.2f}x"]

    def megabytes(count: int | None) -> str:
        return "n/a" if count is None else f"{count / 1e6:.0f}"

    return [
        f"{result['version'].upper()} {result['channels']}@{result['size']}",
        result["precision"],
        *milliseconds("infer"),
        *milliseconds("train"),
        *(f"{result['train'][side]['images_a_second']:.0f}" for side in ("fused", "pytorch")),
        *(f"{result['saved_bytes_an_element'][side]:.1f}" for side in ("fused", "pytorch")),
        *(megabytes(result["peak_bytes"][side]) for side in ("fused", "pytorch")),
    ]


def render(results: list[dict[str, Any]]) -> str:
    """The table, 120 columns at most, with the geometric means of the speed-ups below."""
    header = ["block", "precision"]
    groups = [("inference ms", 3), ("training step ms", 3), ("train img/s", 2), ("saved B/elem", 2), ("peak MB", 2)]
    for _, columns in groups:
        header += ["fused", "PyTorch", ""][:columns]
    rows = [_row(result) for result in results]
    body = table(header, rows, right=range(2, len(header)), gap=1).splitlines()
    # The captions stand over their columns, whose places the rule under the header shows.
    starts = [match.start() for match in re.finditer("-+", body[1])]
    caption, column = "", 2
    for text, columns in groups:
        caption = caption.ljust(starts[column]) + text
        column += columns
    lines = [caption, *body, ""]
    for precision in dict.fromkeys(result["precision"] for result in results):
        chosen = [result for result in results if result["precision"] == precision]
        means = {task: statistics.geometric_mean(r[task]["speedup"] for r in chosen) for task in ("infer", "train")}
        figures = f"inference {means['infer']:.2f}x, training step {means['train']:.2f}x"
        lines.append(f"{precision}: {figures} (geometric means)")
    return "\n".join(lines)


_EXPLANATION = """\
fused against the same block in eager PyTorch (the faster of channels-last and NCHW), batch {batch}, {threads}, {what}.
saved: bytes kept for backward, an input element. peak: growth of {memory} in a training step."""


# --- the command


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time and memory of the fused block against eager PyTorch on this device",
        description="Inference and training step of ConvNeXt-T's blocks, fused against eager PyTorch (the faster of "
        "its two memory formats), in turns, medians. Results are checked against fp64 before anything is timed.",
    )
    add = parser.add_argument
    stages, precisions = [stage_argument(stage) for stage in STAGES], ["fp32", "autocast-bf16"]
    of_map = f"channels and side of the feature map (default: {' '.join(STAGES)})"
    add("--device", type=device_argument, help="cpu, cuda or cuda:N (default: cuda if there, else cpu)")
    add("--dtype", nargs="+", choices=PRECISIONS, default=precisions, help=f"default: {' '.join(precisions)}")
    add("--batch", type=count_argument, help="images (default: 128 on cuda, 4 on cpu)")
    add("--threads", type=threads_argument, help="CPU threads (default: PyTorch's)")
    add("--stages", nargs="+", type=stage_argument, metavar="C@SIZE", default=stages, help=of_map)
    add("--versions", nargs="+", choices=("v1", "v2"), default=["v1", "v2"], help="of the block (default: v1 v2)")
    add("--seconds", type=number_argument(float), default=0.8, help="of timing a task and row (default: 0.8)")
    add("--json", type=json_file_argument, metavar="FILE", help="write the figures there too, row by row")
    parser.set_defaults(run=_run)


def _settings(options: argparse.Namespace, batch: int) -> Iterable[Setting]:
    for version in options.versions:
        for channels, size in options.stages:
            for precision in options.dtype:
                yield Setting(version, channels, size, precision, batch)


def _run(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or torch.device("cuda" if torch.cuda.device_count() else "cpu")
    batch = options.batch or (128 if device.type == "cuda" else 4)
    settings = list(_settings(options, batch))
    for setting in settings:
        check_sizes(str(setting), batch, setting.channels, setting.size)
    results: list[dict[str, Any]] = []
    report = {
        "what": "convnext-kernels bench",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": describe_environment(),
        "backends": describe_backends(),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "results": results,
    }
    try:
        with Progress(len(settings)) as progress:
            for setting in settings:
                progress.step(str(setting))
                with allocating(str(setting)):
                    results.append(measure(setting, device, options.seconds))
                if options.json and not options.json.stream:
                    options.json.write(report)
    except WrongResultError as error:
        print(f"convnext-kernels bench: {error}", file=sys.stderr)
        return 1
    if options.json and options.json.stream:
        options.json.write(report)
    cuda = device.type == "cuda"
    what = torch.cuda.get_device_name(device) if cuda else report["environment"]["processor"]
    memory = "the memory allocated" if cuda else "the resident set"
    show(render(results))
    show()
    show(_EXPLANATION.format(batch=batch, threads=f"CPU threads: {report['threads']}", what=what, memory=memory))
    return 0
