"""``convnext-kernels tune``: measures the Triton kernels' configurations on this GPU and keeps the fastest."""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import backends
from .terminal import (
    Progress,
    allocating,
    check_sizes,
    count_argument,
    device_argument,
    show,
    stage_argument,
    table,
    threads_argument,
)

__all__ = ["Compilers", "Tuner", "add_parser", "variants"]

#: Channels and side of the stages of ConvNeXt-T, -B, -L and -XL at 224 px.
STAGES = (
    *("96@56", "192@28", "384@14", "768@7", "128@56", "256@28", "512@14", "1024@7"),
    *("192@56", "384@28", "768@14", "1536@7", "256@56", "512@28", "1024@14", "2048@7"),
)
#: One for each bucket of rows that these stages come to.
BATCHES = (1, 8, 128)

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

#: A candidate whose results are further from the present configuration's (relative RMS) is not taken.
_TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


@dataclass(frozen=True)
class Workload:
    """A raw operator on a stage: what is timed."""

    operator: str
    variant: str
    channels: int
    side: int
    batch: int
    dtype: torch.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.operator}{self.variant} {self.channels}@{self.side} batch {self.batch} {dtype}"


def workloads(stages: list[tuple[int, int]], batches: list[int], dtypes: list[torch.dtype]) -> list[Workload]:
    """Every operator that has a Triton kernel, on every stage."""
    from .. import triton_kernels

    for (channels, side), batch in itertools.product(stages, batches):
        check_sizes(f"{channels}@{side} batch {batch}", batch, channels, side)
    kinds = [
        (operator, variant)
        for operator in backends.OPERATORS
        if operator in triton_kernels.OPERATORS
        for variant in ((" V1", " V2") if operator.startswith("layer_norm_mlp") else ("",))
    ]
    return [
        Workload(operator, variant, channels, side, batch, dtype)
        for (channels, side), batch, dtype, (operator, variant) in itertools.product(stages, batches, dtypes, kinds)
    ]


def arguments_of(workload: Workload, device: torch.device) -> tuple[Any, ...]:
    """The raw operator's arguments (csrc/operators.cpp), of a trained network's order of size.

    On the meta device they have shapes and dtypes alone.
    """
    n, side, c, dtype = workload.batch, workload.side, workload.channels, workload.dtype
    k = 4 * c
    generator = None if device.type == "meta" else torch.Generator(device).manual_seed(2201)

    def normal(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    def image() -> Tensor:
        return normal(n, side, side, c).permute(0, 3, 1, 2)

    def statistics() -> tuple[Tensor, Tensor]:
        mean = normal(n, side, side, scale=0.1, dtype=torch.float32)
        return mean, 1 + mean.square()

    def mlp_parameters() -> tuple[Tensor | None, ...]:
        grn = (normal(k, scale=0.2), normal(k, scale=0.2)) if workload.variant == " V2" else (None, None)
        scale = None if workload.variant == " V2" else 1 + normal(c, scale=0.2)
        first, second = (normal(k, c, scale=c**-0.5), normal(k)), (normal(c, k, scale=k**-0.5), normal(c))
        return 1 + normal(c, scale=0.2), normal(c), *first, *grn, *second, scale, None

    if workload.operator == "depthwise_conv2d":
        return image(), normal(c, 1, 7, 7, scale=1 / 7), normal(c), 1, None
    if workload.operator == "depthwise_conv2d_cast":
        return image().float(), normal(c, 1, 7, 7, scale=1 / 7), normal(c), dtype, None
    if workload.operator == "depthwise_conv2d_input_grad":
        return image(), normal(c, 1, 7, 7, scale=1 / 7), image(), 1, [0, 0], None
    if workload.operator == "depthwise_conv2d_weight_grad":
        return image(), image(), 7, 1, None
    if workload.operator == "layer_norm":
        return normal(n, side, side, c), normal(c), normal(c), 1e-6, dtype
    if workload.operator == "layer_norm_backward":
        rows = normal(n, side, side, c), normal(n, side, side, c)
        return *rows, *statistics(), normal(c), True, True, True
    if workload.operator == "bias_gelu":
        return normal(n, side, side, k), normal(k), "none"
    if workload.operator == "bias_gelu_backward":
        return normal(n, side, side, k), normal(n, side, side, k), normal(k), "none"
    if workload.operator == "layer_norm_mlp":
        rows = normal(n, side, side, c), normal(n, side, side, c)
        return *rows, *mlp_parameters(), 1e-6, "none", dtype, False
    if workload.operator == "layer_norm_mlp_backward":
        rows = normal(n, side, side, c), normal(n, side, side, c)
        hidden = torch.empty((0,), dtype=dtype, device=device)
        mask = 0b0111111111 if workload.variant == " V2" else 0b1110011111
        return *rows, *statistics(), hidden, *mlp_parameters(), "none", mask
    raise ValueError(f"tune: no arguments are known for the operator {workload.operator!r}")


class Tuner:
    """Finds the fastest configuration of every kernel that a function launches.

    A kernel's choice may decide which other kernels run (one fused kernel, or two): under each of its candidates those
    are tuned first, then the candidates are compared at their best.

    Args:
        time: seconds that a call of a function takes.
        refuses: whether an error means that the chip or the compiler cannot run a candidate; such a one is passed over.
        tolerance: relative RMS by which results may differ from those of the configuration that runs now.
        announce: called with what is being tried.
    """

    def __init__(
        self,
        time: Callable[[Callable[[], Any]], float],
        refuses: Callable[[Exception], bool] = lambda error: False,
        tolerance: float = 1e-2,
        announce: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._time, self._refuses, self._tolerance, self._announce = time, refuses, tolerance, announce
        self.refused: list[str] = []

    def tune(self, run: Callable[[], tuple[Tensor, ...]], known: dict[Any, Any] | None = None) -> dict[Any, Any]:
        """(kernel, problem) -> the fastest Config, for the kernels that `run` launches and `known` lacks."""
        from ..triton_kernels import config

        self._run, self._known, self._found = run, known or {}, {}
        self._best: dict[str, Any] = {}  # kernel -> Config, for the problems of this function
        with config.watched() as asked:
            self._expected = [result.clone() for result in run()]
        self._tune_all(asked)
        return self._found

    def _tune_all(self, asked: dict[str, Any]) -> None:
        for kernel, problem in asked.items():
            if (kernel, problem) in self._known:
                self._best[kernel] = self._known[kernel, problem]
            elif (kernel, problem) not in self._found:
                self._tune_one(kernel, problem)

    def _tune_one(self, kernel: str, problem: Any) -> None:
        from ..triton_kernels import config

        best, least = None, float("inf")
        self._found[kernel, problem] = None  # in progress: what it launches does not come back to it
        for candidate in config.candidates(kernel, problem):
            with config.override(kernel, candidate):
                try:
                    with self._at_their_best(), config.watched() as asked:
                        self._run()
                    self._tune_all(asked)
                    with self._at_their_best():
                        self._announce(f"{kernel} {candidate}")
                        seconds = self._time(self._run) if self._agrees(kernel, candidate) else float("inf")
                except Exception as error:
                    if not self._refuses(error):
                        raise
                    (reason, *_) = str(error).splitlines() or [type(error).__name__]
                    self.refused.append(f"{kernel} {candidate}: {reason}")
                    continue
            if seconds < least:
                best, least = candidate, seconds
        if best is None:
            raise RuntimeError(f"tune: no configuration of the kernel {kernel!r} runs for {problem}")
        self._found[kernel, problem] = self._best[kernel] = best

    def _agrees(self, kernel: str, candidate: Any) -> bool:
        for result, expected in zip(self._run(), self._expected, strict=True):
            error, size = (result.double() - expected.double()).norm(), expected.double().norm()
            if not error <= self._tolerance * size:  # NaN too
                self.refused.append(f"{kernel} {candidate}: its results are off by {float(error / size):.1e}")
                return False
        return True

    @contextlib.contextmanager
    def _at_their_best(self) -> Iterator[None]:
        """The other kernels run with what was found for them; the one being tuned is overridden already."""
        with _overridden(self._best):
            yield


# --- compiling ahead


def variants(run: Callable[[], Any], known: Collection[Any] = ()) -> list[dict[str, Any]]:
    """What tuning `run` compiles: kernel -> Config, of every candidate of every kernel it may launch, one by one.

    Where a kernel's choice decides which others are launched, their variants have it too. `known`: pairs of kernel and
    problem that are not tuned again.
    """
    from ..triton_kernels import config

    found: list[dict[str, Any]] = [{}]
    seen: set[str] = set()
    for overrides in found:  # which grows meanwhile
        with _overridden(overrides), config.watched() as asked:
            run()
        for kernel, problem in asked.items():
            if kernel not in seen:
                seen.add(kernel)
                if (kernel, problem) not in known:
                    found += [{**overrides, kernel: candidate} for candidate in config.candidates(kernel, problem)]
    return found


@contextlib.contextmanager
def _overridden(overrides: dict[str, Any]) -> Iterator[None]:
    from ..triton_kernels import config

    with contextlib.ExitStack() as stack:
        for kernel, chosen in overrides.items():
            stack.enter_context(config.override(kernel, chosen))
        yield


class Compilers:
    """Processes that compile what tuning is going to launch, into Triton's cache on disk: a compiler uses one core.

    Args:
        jobs: how many; with 1 there are none, and tuning compiles as it goes.
        chip: triton_kernels.launch.Chip of the GPU.
    """

    def __init__(self, jobs: int, chip: Any, announce: Callable[[str], None] = lambda what: None) -> None:
        self._chip, self._announce = chip, announce
        # Not forked: CUDA is running in this process.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(jobs, mp_context=context) if jobs > 1 else None

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def compile(self, workload: Workload, known: Collection[Any]) -> None:
        """Everything that tuning the workload launches, before it returns. What does not compile is left to tuning."""
        if self._pool is None:
            return
        from ..triton_kernels import launch

        with launch.recorded(self._chip):
            wanted = variants(_call_on_meta(workload), known)
        self._announce(f"compiling {len(wanted)} variants")
        jobs = [
            self._pool.submit(
                _compile_variant,
                workload,
                [(kernel, dict(c.blocks), c.num_warps, c.num_stages) for kernel, c in overrides.items()],
                self._chip,
            )
            for overrides in wanted
        ]
        try:
            for job in jobs:
                job.result()
        except BrokenProcessPool:
            # The compiler itself crashed. Alone, and announced, a candidate says which one it is.
            print("\nconvnext-kernels tune: a compiling process ended; compiling one by one from here", file=sys.stderr)
            self._pool = None


def _call_on_meta(workload: Workload) -> Callable[[], Any]:
    from .. import triton_kernels

    arguments = arguments_of(workload, torch.device("meta"))
    return functools.partial(triton_kernels.implementation(workload.operator), *arguments)


def _compile_variant(workload: Workload, overrides: list[tuple[str, dict[str, int], int, int]], chip: Any) -> None:
    """In a process of its own."""
    from ..triton_kernels import config, launch, offline

    chosen = {kernel: config.Config(blocks, warps, stages) for kernel, blocks, warps, stages in overrides}
    run = _call_on_meta(workload)
    with _overridden(chosen), launch.recorded(chip) as launches:
        run()
    for each in launches:
        key = repr((each.kernel.__name__, offline.specialised(each, chip.capability)))
        if key not in _compiled:
            _compiled.add(key)
            try:
                offline.compile_launch(each, chip.capability)
            except Exception as error:  # tuning meets it again, and lists it
                if not refuses(error):
                    raise


_compiled: set[str] = set()


#: How the messages of Triton's C++ begin that come as plain RuntimeErrors: of MLIR's passes, and of the way to LLVM.
_COMPILER_FAILURES = ("PassManager::run failed", "failed to translate module to LLVM IR")
_DRIVER_FAILURE = "Triton Error [CUDA]"


def refuses(error: Exception) -> bool:
    """Whether the compiler gave up on a candidate, or the chip cannot hold it.

    Raises:
        RuntimeError: a kernel has failed while it ran; nothing runs in this process any more.
    """
    import triton

    named = triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, triton.compiler.CompilationError
    if isinstance(error, named):
        return True
    if type(error) is not RuntimeError:  # PyTorch's own are of classes below it
        return False
    if str(error).startswith(_DRIVER_FAILURE):
        torch.cuda.synchronize()  # raises again what an earlier launch left behind: that is no candidate's refusal
        return True
    return str(error).startswith(_COMPILER_FAILURES)


# --- the command


def _stage_argument(text: str) -> tuple[int, int]:
    channels, side = stage_argument(text)
    if channels % 8:
        raise argparse.ArgumentTypeError(f"expected channels in multiples of 8, got {text!r}")
    return channels, side


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="find the fastest configurations of the Triton kernels on this GPU",
        description="Times every configuration of every Triton kernel on this GPU and keeps the fastest ones in the "
        "user's cache ($CONVNEXT_KERNELS_CACHE_DIR, else convnext_kernels in the platform's folder for caches), where "
        "later processes with this chip and these versions find them. What has been found is written after each "
        "operator: an interrupted run is not lost.",
    )
    parser.add_argument("--device", type=device_argument, help="cuda or cuda:N (default: cuda)")
    parser.add_argument("--stages", nargs="+", type=_stage_argument, metavar="C@SIZE", help="default: those of T to XL")
    parser.add_argument("--batch", nargs="+", type=count_argument, default=list(BATCHES), help="default: 1 8 128")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"], help="default: bf16")
    parser.add_argument(
        "--jobs",
        type=threads_argument,
        default=min(16, os.cpu_count() or 1),
        help="processes that compile (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    device = options.device or torch.device("cuda")
    if device.type != "cuda" or not torch.cuda.device_count():
        missing = "PyTorch sees none" if not torch.cuda.device_count() else f"not {str(device)!r}"
        print(f"convnext-kernels tune: it measures on a GPU, and {missing}", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    reason = backends.triton_reason(device)
    if reason:
        print(f"convnext-kernels tune: {reason}", file=sys.stderr)
        return 2
    import triton

    from .. import triton_kernels
    from ..triton_kernels import config, launch

    def time(run: Callable[[], Any]) -> float:
        return triton.testing.do_bench(run, warmup=5, rep=30, return_mode="median") * 1e-3

    name = config.chip_name(device)
    stages = options.stages or [_stage_argument(text) for text in STAGES]
    todo = workloads(stages, options.batch, [DTYPES[dtype] for dtype in options.dtype])
    found: dict[Any, Any] = {}
    refused: list[str] = []
    chip = launch.chip_of(torch.empty((), device=device))
    with (
        torch.cuda.device(device),
        Progress(len(todo)) as progress,
        Compilers(options.jobs, chip, progress.note) as pool,
    ):
        for workload in todo:
            progress.step(str(workload))
            pool.compile(workload, found)
            tuner = Tuner(time, refuses, _TOLERANCES[workload.dtype], progress.note)
            implementation = triton_kernels.implementation(workload.operator)
            with allocating(str(workload)):
                arguments = arguments_of(workload, device)

                def run(implementation: Any = implementation, arguments: Any = arguments) -> tuple[Tensor, ...]:
                    results = implementation(*arguments)
                    return results if isinstance(results, tuple) else (results,)

                new = tuner.tune(run, found)
            refused += tuner.refused
            if new:
                found |= new
                config.write_cache(name, found)
    _report(found, refused, name)
    return 0


def _report(found: dict[Any, Any], refused: list[str], name: str) -> None:
    from ..triton_kernels import config

    rows = [
        (kernel, str(p.channels), str(p.hidden), str(p.dtype).removeprefix("torch."), _rows_up_to(p.rows), _short(best))
        for (kernel, p), best in found.items()
    ]
    show(table(("kernel", "C", "K", "dtype", "rows", "fastest"), rows, right=(1, 2, 4)))
    show(f"\n{len(found)} configurations for {name} are in {config.cache_file(name)}")
    if refused:
        show(f"{len(refused)} candidates do not run on this chip or differ, the first: {refused[0]}")


def _rows_up_to(bound: int) -> str:
    return "more" if bound >= 1 << 62 else f"<= {bound}"


def _short(best: Any) -> str:
    return " ".join(f"{key}={value}" for key, value in best.meta.items())
