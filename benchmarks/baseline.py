"""What ConvNeXt costs without this package: timm's and torchvision's models in eager PyTorch and under torch.compile.

    python benchmarks/baseline.py --part eager --out baseline.json
    python benchmarks/baseline.py --part compile --out baseline.json --budget-seconds 500

It needs torch, timm and torchvision and none of our kernels. A part runs within its budget, the most telling cases
first. Every case is written to the file as soon as it is measured, and a run that finds the file goes on where the last
one stopped; so a part that does not fit into one run takes several.

The cases run in a process of their own, one after the other. What runs out of memory, fails, or takes longer than
--case-seconds is recorded as such. Inputs are random, weights freshly initialised, stochastic depth off.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TIMM_MODELS = (
    "convnext_tiny", "convnextv2_tiny", "convnext_base", "convnextv2_base", "convnext_small", "convnext_large",
    "convnextv2_large",
)  # fmt: skip
TORCHVISION_MODELS = ("convnext_tiny", "convnext_base", "convnext_small", "convnext_large")

#: part: libraries, how the model is executed, and the seconds that must be left for a case to be started on a GPU.
PARTS = {
    "eager": (("timm",), "eager", 8),
    "torchvision": (("torchvision",), "eager", 8),
    "compile": (("timm", "torchvision"), "compile", 60),
    "max-autotune": (("timm", "torchvision"), "max-autotune", 150),
}


@dataclass(frozen=True)
class Case:
    """One model in one way of running it."""

    library: str
    model: str
    task: str  # inference, training
    precision: str  # autocast-bf16, pure-bf16
    execution: str  # eager, compile, max-autotune
    batch: int
    size: int
    layout: str  # channels-last, NCHW

    def __str__(self) -> str:
        return (
            f"{self.library} {self.model} {self.task} {self.precision} {self.execution} {self.layout} "
            f"batch {self.batch} {self.size} px"
        )


def cases_of(options: argparse.Namespace) -> Iterator[Case]:
    """The cases of a part, the most telling first."""
    libraries, execution, _ = PARTS[options.part]
    for batch in options.batch:
        for layout in options.layout:
            for precision in options.precision:
                for library in libraries:
                    defaults = TIMM_MODELS if library == "timm" else TORCHVISION_MODELS
                    for model in options.models or defaults:
                        for task in options.task:
                            yield Case(library, model, task, precision, execution, batch, options.size, layout)


# --- the worker: measures one case after the other


def environment(device_name: str) -> dict[str, Any]:
    """Chip, driver, versions and commit."""
    import timm
    import torch
    import torchvision

    def output(*command: str) -> str | None:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
        except (OSError, subprocess.CalledProcessError):
            return None  # not installed, or no repository: the fact is unknown

    triton = None
    with contextlib.suppress(ImportError):
        import triton
    cuda = torch.device(device_name).type == "cuda"
    return {
        "chip": torch.cuda.get_device_name(device_name) if cuda else "CPU",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": None if triton is None else triton.__version__,
        "timm": timm.__version__,
        "torchvision": torchvision.__version__,
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": output("git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"),
        "settings": "cudnn.benchmark on; AdamW, fused on CUDA; stochastic depth 0; random weights and inputs",
    }


def build_model(case: Case) -> Any:
    import timm
    import torchvision

    if case.library == "timm":
        return timm.create_model(case.model, drop_path_rate=0.0)
    return torchvision.models.get_model(case.model, weights=None, stochastic_depth_prob=0.0)


def run_case(case: Case, device_name: str, iterations: int | None) -> dict[str, Any]:
    """Builds the model, warms it up, times it. CUDA events on a GPU, a clock on a CPU."""
    import torch

    device = torch.device(device_name)
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    pure = case.precision == "pure-bf16"
    dtype = torch.bfloat16 if pure else torch.float32
    memory_format = torch.channels_last if case.layout == "channels-last" else torch.contiguous_format
    with device:
        model = build_model(case)
    model = model.to(dtype=dtype, memory_format=memory_format).train(case.task == "training")
    x = torch.randn(case.batch, 3, case.size, case.size, device=device, dtype=dtype).to(memory_format=memory_format)
    labels = torch.randint(0, 1000, (case.batch,), device=device)
    autocast = contextlib.nullcontext if pure else lambda: torch.autocast(device.type, torch.bfloat16)

    run = model
    if case.execution != "eager":
        # dynamic=False: a shape seen for the second time, with another batch, is compiled for what it is.
        mode = None if case.execution == "compile" else "max-autotune"
        run = torch.compile(model, mode=mode, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=cuda)

    def train() -> Any:
        if case.execution == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast():
            loss = torch.nn.functional.cross_entropy(run(x).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    @torch.inference_mode()
    def infer() -> Any:
        if case.execution == "max-autotune":
            torch.compiler.cudagraph_mark_step_begin()
        with autocast():
            return run(x)

    step = train if case.task == "training" else infer

    def synchronise() -> None:
        if cuda:
            torch.cuda.synchronize(device)

    start = time.perf_counter()
    first = step().detach().float().clone()
    synchronise()
    first_step = time.perf_counter() - start
    if not bool(first.isfinite().all()):
        raise ArithmeticError("the first result is not finite")
    figures: dict[str, Any] = {"first_step_seconds": first_step}
    if case.task == "inference" and case.execution != "eager":
        with torch.inference_mode(), autocast():
            eager = model(x).float()
        figures["relative_difference_from_eager"] = difference = float((first - eager).norm() / eager.norm())
        if not difference < 0.1:
            raise ArithmeticError(f"the compiled model's result differs from eager's by {difference:.2e}")
        del eager
    del first

    for _ in range(3 if cuda else 1):
        step()
    synchronise()
    start = time.perf_counter()
    step()
    synchronise()
    seconds = time.perf_counter() - start
    count = iterations or max(8, min(40, round(3.0 / seconds)))
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    milliseconds = time_steps(step, count, cuda)
    median, low, high = (quantile(milliseconds, q) for q in (0.5, 0.2, 0.8))
    figures |= {
        "ms": median,
        "ms_quantile_20": low,
        "ms_quantile_80": high,
        "iterations": count,
        "images_a_second": case.batch / median * 1e3,
        "parameters": sum(p.numel() for p in model.parameters()),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device) if cuda else None,
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device) if cuda else None,
    }
    return figures


def time_steps(step: Callable[[], Any], count: int, cuda: bool) -> list[float]:
    """Milliseconds of each of `count` steps. On CUDA the host runs ahead and waits once, at the end."""
    import torch

    if not cuda:
        out = []
        for _ in range(count):
            start = time.perf_counter()
            step()
            out.append((time.perf_counter() - start) * 1e3)
        return out
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def quantile(values: list[float], q: float) -> float:
    """By linear interpolation."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def work(device_name: str, iterations: int | None) -> None:
    """Reads a case a line from stdin, answers with a line of figures. What libraries print goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    import gc

    import torch

    answer(environment(device_name))
    for line in sys.stdin:
        try:
            answer({"status": "ok", **run_case(Case(**json.loads(line)), device_name, iterations)})
        except torch.OutOfMemoryError as error:
            answer({"status": "out of memory", "message": str(error).splitlines()[0]})
        except Exception as error:
            # Whatever a model or compiler raises is this case's result; the next one starts in a fresh process.
            answer({"status": "failed", "message": f"{type(error).__name__}: {error}"[:600]})
            return
        if json.loads(line)["execution"] != "eager":
            torch._dynamo.reset()
        gc.collect()
        if torch.device(device_name).type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


# --- the parent: hands out cases, keeps time, writes the file


class Worker:
    """The measuring process, started again after it failed or was stopped."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, Any] | None = None

    def _start(self, deadline: float) -> bool:
        # A process group of its own: compilers started by torch.compile are stopped with it.
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        facts = self._read(deadline)
        if facts is not None:
            self.environment = facts
        return facts is not None

    def _read(self, deadline: float) -> dict[str, Any] | None:
        """The next answer; None if the process ended or the deadline passed."""
        stream = self._process.stdout.fileno()
        received = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while not received.endswith(b"\n"):
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                piece = os.read(stream, 65536)
                if not piece:
                    return None
                received += piece
        return json.loads(received)

    def measure(self, case: Case, deadline: float) -> dict[str, Any] | None:
        """A case's result; None where the deadline passed first."""
        if self._process is None and not self._start(deadline):
            return self._lost(deadline)
        self._process.stdin.write(json.dumps(asdict(case)).encode() + b"\n")
        self._process.stdin.flush()
        result = self._read(deadline)
        if result is None:
            return self._lost(deadline)
        if result["status"] == "failed":
            self.stop()
        return result

    def _lost(self, deadline: float) -> dict[str, Any] | None:
        late = time.monotonic() >= deadline
        code = self._process.poll() if late else self._process.wait()
        self.stop()
        return None if late else {"status": "failed", "message": f"the process ended with code {code}"}

    def stop(self) -> None:
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


def write(path: Path, content: dict[str, Any]) -> None:
    """The whole file or the old one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    partial.replace(path)


def check_same_machine(before: dict[str, Any] | None, now: dict[str, Any] | None, path: Path) -> None:
    """Figures of two machines or installations must not stand in one file."""
    for key in ("chip", "driver", "torch", "triton", "timm", "torchvision"):
        if before and now and before[key] != now[key]:
            raise SystemExit(
                f"{path} was measured with {key} {before[key]}, and this is {now[key]}: name another --out"
            )


def render(results: list[dict[str, Any]]) -> str:
    rows = [("model", "task", "precision", "execution", "layout", "batch", "ms", "img/s", "peak GB", "first s")]
    for result in results:
        ok = result["status"] == "ok"
        peak = result.get("peak_allocated_bytes")
        rows.append(
            (
                f"{result['library']} {result['model']}",
                *(result[key] for key in ("task", "precision", "execution", "layout")),
                str(result["batch"]),
                f"{result['ms']:.2f}" if ok else result["status"],
                f"{result['images_a_second']:.0f}" if ok else "",
                f"{peak / 1e9:.1f}" if peak else "",
                f"{result['first_step_seconds']:.1f}" if ok else "",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i > 4 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--part", choices=PARTS, default="eager", help="which cases (default: eager)")
    add("--out", type=Path, default=Path("baseline.json"), help="file to write, and to go on with (baseline.json)")
    add("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    add("--budget-seconds", type=float, default=500, help="start nothing that does not fit into this time (500)")
    add("--case-seconds", type=float, default=300, help="give a case up after this time (300)")
    add("--models", nargs="+", metavar="NAME", help="instead of the part's models")
    add("--task", nargs="+", choices=("training", "inference"), default=["training", "inference"])
    add("--precision", nargs="+", choices=("autocast-bf16", "pure-bf16"), default=["autocast-bf16", "pure-bf16"])
    add("--layout", nargs="+", choices=("channels-last", "NCHW"), default=["channels-last"])
    add("--batch", nargs="+", type=int, default=[128, 256], help="images (128 256)")
    add("--size", type=int, default=224, help="pixels a side (224)")
    add("--iters", type=int, help="timed steps (default: 3 s of them, 8 to 40)")
    add("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(*options.batch, options.size, options.iters or 1) < 1:
        parser.error("--batch, --size and --iters: expected numbers of at least 1")
    if not options.out.absolute().parent.is_dir():
        parser.error(f"--out: the folder of {options.out} does not exist")
    return options


def main(arguments: list[str] | None = None) -> int:
    """0 if every case of the part has a result and none failed; 3 if the budget ended first; 1 for failed cases."""
    options = parse(arguments)
    if options.worker:
        work(options.device, options.iters)
        return 0
    start = time.monotonic()
    end = start + options.budget_seconds
    report = json.loads(options.out.read_text()) if options.out.exists() else {"what": "baseline", "results": []}
    results = report["results"]
    done = {Case(**{key: result[key] for key in Case.__dataclass_fields__}) for result in results}
    cases = list(cases_of(options))
    todo = [case for case in cases if case not in done]
    least = PARTS[options.part][2] if options.device.startswith("cuda") else 0

    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--device", options.device]
    worker = Worker(command + (["--iters", str(options.iters)] if options.iters else []))
    remaining = len(todo)
    try:
        for case in todo:
            if end - time.monotonic() < least:
                break
            deadline = time.monotonic() + options.case_seconds
            print(f"{time.monotonic() - start:5.0f} s  {case}", file=sys.stderr, flush=True)
            result = worker.measure(case, min(deadline, end))
            if result is None:
                if deadline > end:
                    break  # the budget ended, not the case's own time: the next run tries it again
                result = {"status": "timeout", "message": f"not done after {options.case_seconds:.0f} s"}
            remaining -= 1
            check_same_machine(report.setdefault("environment", worker.environment), worker.environment, options.out)
            results.append({**asdict(case), "date": now(), **result})
            write(options.out, report)
    finally:
        worker.stop()
    chosen = [r for r in results if any(all(r[k] == v for k, v in asdict(case).items()) for case in cases)]
    print(render(chosen))
    failed = [result for result in chosen if result["status"] == "failed"]
    for result in failed:
        print(f"failed: {result['library']} {result['model']} {result['task']}: {result['message']}", file=sys.stderr)
    if remaining:
        print(f"{remaining} of {len(cases)} cases are left: run again with the same --out", file=sys.stderr)
    return 1 if failed else 3 if remaining else 0


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
