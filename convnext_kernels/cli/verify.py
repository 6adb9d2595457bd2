"""``convnext-kernels verify``: every operator of every backend here, forward and gradients, against fp64."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import backends, operators, reference
from .accuracy import Verdict, judge, nudged
from .environment import describe_environment
from .terminal import (
    CommandError,
    Progress,
    allocating,
    device_argument,
    json_file_argument,
    lacks_memory,
    show,
    table,
    threads_argument,
)

__all__ = ["add_parser"]

Results = dict[str, Tensor]

#: The raw operators (csrc/operators.cpp) that run when a public operator is called and differentiated.
RAW_OPERATORS = {
    "depthwise_conv2d": ("depthwise_conv2d", "depthwise_conv2d_input_grad", "depthwise_conv2d_weight_grad"),
    "layer_norm": ("layer_norm", "layer_norm_backward"),
    "bias_gelu": ("bias_gelu", "bias_gelu_backward"),
    "layer_norm_mlp": ("layer_norm_mlp", "layer_norm_mlp_backward"),
}
RAW_OPERATORS["convnext_block"] = (
    *("depthwise_conv2d_cast", *RAW_OPERATORS["depthwise_conv2d"]),  # the first under autocast
    *RAW_OPERATORS["layer_norm_mlp"],
)


@dataclass(frozen=True)
class Mode:
    """A precision: the dtype of the tensors, and autocast's if it is on."""

    name: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def context(self, device_type: str) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device_type, self.autocast)


MODES = (
    Mode("fp64", torch.float64),
    Mode("fp32", torch.float32),
    Mode("fp16", torch.float16),
    Mode("bf16", torch.bfloat16),
    Mode("autocast bf16", torch.float32, torch.bfloat16),
)


@dataclass(frozen=True)
class Case:
    """One call of an operator. `draw` makes its tensors, in fp64, from a random generator."""

    operator: str
    name: str
    draw: Callable[[torch.Generator], dict[str, Tensor]]
    options: dict[str, Any] = field(default_factory=dict)


# --- the inputs


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale + mean


def _image(generator: torch.Generator, n: int, c: int, h: int, w: int) -> Tensor:
    """(N, C, H, W), channels-last in memory."""
    return _normal(generator, n, h, w, c).permute(0, 3, 1, 2)


def _convolution(shape: tuple[int, ...], kernel: int, bias: bool, generator: torch.Generator) -> dict[str, Tensor]:
    c = shape[1]
    tensors = {"x": _image(generator, *shape), "weight": _normal(generator, c, 1, kernel, kernel, scale=1 / kernel)}
    return tensors | ({"bias": _normal(generator, c)} if bias else {})


def _norm(shape: tuple[int, ...], affine: bool, mean: float, generator: torch.Generator) -> dict[str, Tensor]:
    x = _normal(generator, *shape, mean=mean)
    if not affine:
        return {"x": x}
    c = shape[-1]
    return {"x": x, "weight": _normal(generator, c, scale=0.2, mean=1), "bias": _normal(generator, c, scale=0.2)}


def _gelu(shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    return {"x": _normal(generator, *shape, scale=3), "bias": _normal(generator, shape[-1])}


def _mlp_parameters(c: int, k: int, grn: bool, generator: torch.Generator) -> dict[str, Tensor | None]:
    return {
        "norm_weight": _normal(generator, c, scale=0.2, mean=1),
        "norm_bias": _normal(generator, c, scale=0.2),
        "fc1_weight": _normal(generator, k, c, scale=c**-0.5),
        "fc1_bias": _normal(generator, k, scale=0.2),
        "grn_weight": _normal(generator, k, scale=0.5) if grn else None,
        "grn_bias": _normal(generator, k, scale=0.5) if grn else None,
        "fc2_weight": _normal(generator, c, k, scale=k**-0.5),
        "fc2_bias": _normal(generator, c, scale=0.2),
        "layer_scale": None if grn else _normal(generator, c, scale=0.5, mean=1),
    }


def _sample_scale(n: int, drop: bool) -> dict[str, Tensor]:
    """Drops the second sample of three: 0, and 1 / keep for the others."""
    return {"sample_scale": torch.tensor([1.5, 0.0, 1.5][:n], dtype=torch.float64)} if drop else {}


def _mlp(
    shape: tuple[int, ...], ratio: int, grn: bool, residual: bool, drop: bool, generator: torch.Generator
) -> dict[str, Tensor | None]:
    return {
        "z": _normal(generator, *shape),
        "residual": _normal(generator, *shape) if residual else None,
        **_mlp_parameters(shape[-1], ratio * shape[-1], grn, generator),
        **_sample_scale(shape[0], drop),
    }


def _block(
    shape: tuple[int, ...], kernel: int, grn: bool, drop: bool, generator: torch.Generator
) -> dict[str, Tensor | None]:
    c = shape[1]
    return {
        "x": _image(generator, *shape),
        "conv_weight": _normal(generator, c, 1, kernel, kernel, scale=1 / kernel),
        "conv_bias": _normal(generator, c, scale=0.2),
        **_mlp_parameters(c, 4 * c, grn, generator),
        **_sample_scale(shape[0], drop),
    }


CASES = (
    Case("depthwise_conv2d", "96@14x14 k7", partial(_convolution, (2, 96, 14, 14), 7, True)),
    Case("depthwise_conv2d", "40@13x9 k7 stride 2", partial(_convolution, (2, 40, 13, 9), 7, True), {"stride": 2}),
    Case("depthwise_conv2d", "3@9x7 k5 no bias", partial(_convolution, (2, 3, 9, 7), 5, False)),
    Case("depthwise_conv2d", "100@8x11 k3 stride 2", partial(_convolution, (1, 100, 8, 11), 3, False), {"stride": 2}),
    Case("depthwise_conv2d", "16@6x12 k11", partial(_convolution, (2, 16, 6, 12), 11, True)),
    Case("layer_norm", "98x96", partial(_norm, (2, 7, 7, 96), True, 0.0)),
    Case("layer_norm", "35x100, mean 20", partial(_norm, (5, 7, 100), True, 20.0)),
    Case("layer_norm", "12x40 no weights", partial(_norm, (12, 40), False, 0.0)),
    Case("bias_gelu", "70x160 erf", partial(_gelu, (2, 5, 7, 160))),
    Case("bias_gelu", "9x40 erf", partial(_gelu, (9, 40))),
    Case("bias_gelu", "37x100 tanh", partial(_gelu, (37, 100)), {"approximate": "tanh"}),
    Case("layer_norm_mlp", "V1 96@7x7 dropped sample", partial(_mlp, (3, 7, 7, 96), 4, False, True, True)),
    Case("layer_norm_mlp", "V2 40@9x5 dropped sample", partial(_mlp, (3, 9, 5, 40), 4, True, True, True)),
    Case("layer_norm_mlp", "V2 24@5 dropped sample", partial(_mlp, (3, 5, 24), 4, True, True, True)),
    Case(
        "layer_norm_mlp", "V1 100@6 tanh no residual", partial(_mlp, (2, 6, 100), 3, False, False, False),
        {"approximate": "tanh"},
    ),
    Case("convnext_block", "V1 96@14x14", partial(_block, (2, 96, 14, 14), 7, False, False)),
    Case("convnext_block", "V2 96@14x14", partial(_block, (2, 96, 14, 14), 7, True, False)),
    Case("convnext_block", "V1 40@9x11 dropped sample", partial(_block, (3, 40, 9, 11), 7, False, True)),
    Case(
        "convnext_block", "V2 384@7x7 hidden kept", partial(_block, (1, 384, 7, 7), 7, True, False),
        {"recompute": False},
    ),
    Case("convnext_block", "V1 16@3x3 dropped sample", partial(_block, (3, 16, 3, 3), 7, False, True)),
    Case("convnext_block", "V2 16@3x3 dropped sample", partial(_block, (3, 16, 3, 3), 7, True, True)),
    Case(
        "convnext_block", "V1 37@5x4 k3 tanh", partial(_block, (2, 37, 5, 4), 3, False, False),
        {"approximate": "tanh"},
    ),
)  # fmt: skip


# --- the check


def _evaluate(
    function: Callable[..., Tensor],
    tensors: dict[str, Tensor | None],
    options: dict[str, Any],
    grad: Tensor,
    mode: Mode,
) -> Results:
    """The output and the gradient of every tensor but the drop-path vector."""
    leaves = {
        name: None if tensor is None else tensor.detach().requires_grad_(name != "sample_scale")
        for name, tensor in tensors.items()
    }
    with mode.context(grad.device.type):
        y = function(**leaves, **options)
    wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), grad.to(y.dtype))
    return {"output": y.detach(), **{f"grad {name}": value for name, value in zip(wanted, grads, strict=True)}}


def _cast(tensors: dict[str, Tensor | None], mode: Mode, device: torch.device) -> dict[str, Tensor | None]:
    accumulation = torch.float64 if mode.dtype == torch.float64 else torch.float32
    return {
        name: None if t is None else t.to(device, accumulation if name == "sample_scale" else mode.dtype)
        for name, t in tensors.items()
    }


def available_backends(operator: str, device: torch.device) -> list[str]:
    """The backends that can run every part of `operator` on `device`, and 'auto' where it mixes them."""

    def can_be_forced(backend: str) -> bool:
        try:
            for raw in RAW_OPERATORS[operator]:
                backends.choose(raw, device, backend)
        except backends.RefusedError:
            return False
        return True

    mixed = len({backends.choose(raw, device).backend for raw in RAW_OPERATORS[operator]}) > 1
    return [name for name in backends.BACKENDS if (mixed if name == "auto" else can_be_forced(name))]


_INTERPRETED_ELEMENTS = 500  # of the input: a case of more would take minutes


def _is_for_the_interpreter(inputs: dict[str, Tensor | None], mode: Mode) -> bool:
    """Triton's interpreter is a thousand times slower than a GPU, and its bf16 truncates and multiplies raw bits."""
    first = next(iter(inputs.values()))
    return mode.name in ("fp32", "fp16") and first.numel() <= _INTERPRETED_ELEMENTS


@dataclass(frozen=True)
class Outcome:
    """One result of one case: what a row of the JSON says. `raised`: what came instead of it."""

    operator: str
    device: str
    backend: str
    mode: str
    case: str
    result: str
    verdict: Verdict
    repeats: bool
    raised: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict.ok and self.repeats

    def to_json(self) -> dict[str, Any]:
        # NaN and infinity are no JSON: they go as strings.
        verdict = {
            key: value if value - value == 0 else str(value)
            for key, value in (*vars(self.verdict).items(), ("share", self.verdict.share))
        }
        labels = {key: value for key, value in vars(self).items() if key != "verdict"}
        return {**labels, **verdict, "ok": self.ok}


def _check(case: Case, mode: Mode, device: torch.device) -> Iterator[Outcome]:
    """Runs one case in one precision on every backend. Each result is computed twice: the bits must be the same."""
    generator = torch.Generator().manual_seed(2201 + CASES.index(case))
    inputs = _cast(case.draw(generator), mode, device)
    exact_inputs = {name: None if t is None else t.double() for name, t in inputs.items()}
    exact_mode = Mode("fp64", torch.float64)
    reference_options = {name: value for name, value in case.options.items() if name != "recompute"}
    meaning = getattr(reference, case.operator)
    with torch.no_grad():
        shape = meaning(**exact_inputs, **reference_options).shape
    grad = _normal(generator, *shape).to(device, mode.autocast or mode.dtype)
    if grad.dim() == 4 and case.operator in ("depthwise_conv2d", "convnext_block"):
        grad = grad.contiguous(memory_format=torch.channels_last)

    exact = _evaluate(meaning, exact_inputs, reference_options, grad.double(), exact_mode)
    moved_inputs = {
        name: t if t is None or name == "sample_scale" else nudged(t, mode.dtype, generator)
        for name, t in exact_inputs.items()
    }
    moved_grad = nudged(grad.double(), mode.dtype, generator)
    moved = _evaluate(meaning, moved_inputs, reference_options, moved_grad, exact_mode)
    pytorch = _evaluate(meaning, inputs, reference_options, grad, mode)

    for backend in available_backends(case.operator, device):
        if backend == "triton" and device.type == "cpu" and not _is_for_the_interpreter(inputs, mode):
            continue
        with backends.use(backend):
            function = getattr(operators, case.operator)
            try:
                ours = _evaluate(function, inputs, case.options, grad, mode)
                again = _evaluate(function, inputs, case.options, grad, mode)
            except backends.RefusedError:  # this dtype, or this number of channels: info says which
                continue
            except Exception as error:
                yield _raised(error, case, mode, device, backend)
                continue
        for name, result in ours.items():
            repeats = torch.equal(result, again[name]) or bool(result.isnan().any())
            verdict = judge(result, pytorch[name], exact[name], moved[name])
            yield Outcome(case.operator, str(device), backend, mode.name, case.name, name, verdict, repeats)


def _raised(error: Exception, case: Case, mode: Mode, device: torch.device, backend: str) -> Outcome:
    """An error as a wrong result: the others are still worth knowing. Not what is the machine's, or the user's."""
    if lacks_memory(error) or isinstance(error, backends.RefusedError):
        raise error
    none = Verdict(math.inf, 0.0, 0.0, math.inf, 0.0)
    what = f"{type(error).__name__}: {error}"
    return Outcome(case.operator, str(device), backend, mode.name, case.name, "none", none, False, what)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "verify",
        help="check every operator of every backend here against fp64",
        description="Runs every operator, forward and all gradients, on every backend available here and in every "
        "precision, and compares with fp64 PyTorch. Allowed: twice the error of PyTorch's own kernels in the same "
        "precision plus a rounding floor, and the same bits from a second run. Exit code 1 if anything fails.",
    )
    parser.add_argument("--device", type=device_argument, help="cpu, cuda or cuda:N (default: cpu, and cuda if there)")
    parser.add_argument(
        "--json",
        nargs="?",
        type=json_file_argument,
        const=sys.stdout,
        metavar="FILE",
        help="write every single result as JSON, case by case; without FILE to stdout, in place of the table",
    )
    parser.add_argument(
        "--jobs",
        type=threads_argument,
        default=1,
        help="processes; on a GPU most of the time is Triton's compiler, which uses one core (default: 1)",
    )
    parser.set_defaults(run=_run)


def _summary(outcomes: list[Outcome]) -> str:
    """A row for each operator, backend and precision, with the result that comes closest to what is allowed."""
    groups: dict[tuple[str, ...], list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault((outcome.operator, outcome.device, outcome.backend, outcome.mode), []).append(outcome)
    rows = []
    for (operator, device, backend, mode), members in groups.items():
        failed = [outcome for outcome in members if not outcome.ok]
        worst = max(failed or members, key=lambda outcome: outcome.verdict.share)
        verdict = worst.verdict
        figures = (f"{verdict.error:.2e}", f"{verdict.pytorch_error:.2e}", f"{verdict.allowed:.2e}")
        ok = f"no: {len(failed)} of {len(members)}" if failed else f"yes, {len(members)}"
        rows.append((operator, device, backend, mode, *figures, ok, worst.result))
    header = ("operator", "device", "backend", "precision", "error", "PyTorch's", "allowed", "ok", "closest result")
    return table(header, rows, right=(4, 5, 6))


def _explain(outcome: Outcome) -> str:
    verdict = outcome.verdict
    how = f"{outcome.backend} on {outcome.device}, {outcome.mode}, {outcome.case}"
    where = f"{outcome.operator} [{how}] {outcome.result}"
    if outcome.raised:
        return f"FAILED {where}: {outcome.raised}"
    if not verdict.ok:
        return (
            f"FAILED {where}: RMS error {verdict.error:.3e}, allowed {verdict.allowed:.3e}; "
            f"maximum {verdict.maximum:.3e}, allowed {verdict.maximum_allowed:.3e}"
        )
    return f"FAILED {where}: a second run gave other bits"


@contextlib.contextmanager
def _in_processes(
    checks: list[tuple[torch.device, Case, Mode]], jobs: int
) -> Iterator[Iterator[Callable[[], list[Outcome]]]]:
    """For each of the checks what gives its outcomes: here and then, or from a process that has begun with it."""
    if jobs == 1:
        yield (partial(_list, device, CASES.index(case), MODES.index(mode)) for device, case, mode in checks)
        return
    # Not forked: CUDA may be running in this process.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_use_one_thread)
    try:
        started = [pool.submit(_list, device, CASES.index(case), MODES.index(mode)) for device, case, mode in checks]
        yield (each.result for each in started)
    except BrokenProcessPool:
        raise CommandError("a process ended before its results were there: --jobs 1 shows which", 1) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _list(device: torch.device, case: int, mode: int) -> list[Outcome]:
    out = []
    try:
        for outcome in _check(CASES[case], MODES[mode], device):
            out.append(outcome)
    except Exception as error:  # a kernel failed while it ran: PyTorch's own get no further in this process
        out.append(_raised(error, CASES[case], MODES[mode], device, "any"))
    return out


def _results(outcomes: list[Outcome], complete: bool) -> dict[str, Any]:
    return {
        "complete": complete,
        "ok": complete and all(outcome.ok for outcome in outcomes),
        "results": [outcome.to_json() for outcome in outcomes],
    }


def _run(options: argparse.Namespace) -> int:
    devices = [options.device] if options.device else [torch.device("cpu")]
    if not options.device and torch.cuda.device_count():
        devices.append(torch.device("cuda"))
    outcomes: list[Outcome] = []
    report = {"what": "convnext-kernels verify", "environment": describe_environment()}
    checks = [(device, case, mode) for device in devices for case in CASES for mode in MODES]
    with Progress(len(checks)) as progress, _in_processes(checks, options.jobs) as results:
        for (device, case, mode), result in zip(checks, results):
            what = f"{device} {case.operator} {case.name} {mode.name}"
            progress.step(what)
            with allocating(what):
                outcomes += result()
            if options.json not in (None, sys.stdout) and not options.json.stream and mode is MODES[-1]:
                options.json.write(report | _results(outcomes, complete=False))
    failed = [outcome for outcome in outcomes if not outcome.ok]
    report |= _results(outcomes, complete=True)
    if options.json is sys.stdout:
        show(json.dumps(report, indent=1))
    else:
        if options.json:
            options.json.write(report)
        show(_summary(outcomes))
        show(f"\n{len(outcomes)} results against fp64, {len(failed)} wrong")
    for outcome in failed:
        print(_explain(outcome), file=sys.stderr)
    return 1 if failed else 0
