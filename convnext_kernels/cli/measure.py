"""Time and memory of a function on a device: what ``bench`` measures with."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Timing", "peak_growth", "saved_bytes", "time_interleaved"]

_LEAST_ROUNDS = 3
_LEAST_SAMPLE_SECONDS = 0.004  # of one timed sample: short functions are repeated up to this


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call: the median over the rounds, and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float
    rounds: int
    calls_a_round: int


def _sampler(function: Callable[[], Any], device: torch.device) -> tuple[Callable[[], Callable[[], float]], int]:
    """A function that runs a sample and returns a promise of its milliseconds a call; and the calls in a sample."""
    cuda = device.type == "cuda"

    def synchronised_seconds() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        function()
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    synchronised_seconds()  # warm-up: libraries are loaded, algorithms chosen
    calls = max(1, round(_LEAST_SAMPLE_SECONDS / min(synchronised_seconds() for _ in range(2))))

    def sample() -> Callable[[], float]:
        if cuda:
            # Events on the stream: the host runs ahead, and nothing waits until the round is over.
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                function()
            end.record()
            return lambda: start.elapsed_time(end) / calls
        begin = time.perf_counter()
        for _ in range(calls):
            function()
        milliseconds = (time.perf_counter() - begin) * 1e3 / calls
        return lambda: milliseconds

    return sample, calls


def time_interleaved(
    functions: dict[str, Callable[[], Any]], device: torch.device, seconds: float
) -> dict[str, Timing]:
    """Times the functions in turns, so that a drift of the machine meets all of them.

    Each round runs every function, starting with another one each time. Rounds go on for `seconds`, and there are at
    least three.
    """
    samplers = {name: _sampler(function, device) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    start, rounds = time.perf_counter(), 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() - start < seconds:
        turn = rounds % len(names)
        promises = {name: samplers[name][0]() for name in names[turn:] + names[:turn]}
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        for name, promise in promises.items():
            samples[name].append(promise())
        rounds += 1
    out = {}
    for name, values in samples.items():
        quintiles = statistics.quantiles(values, n=5, method="inclusive")
        out[name] = Timing(statistics.median(values), quintiles[0], quintiles[3], rounds, samplers[name][1])
    return out


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes that autograd keeps after `forward` for the backward pass, parameters not counted.

    Counted by ``saved_tensors_hooks``, each storage once.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # holds the graph, hence every counted storage, until all are counted
    total = sum(kept.values())
    del y
    return total


def peak_growth(function: Callable[[], Any], device: torch.device) -> int | None:
    """Bytes by which memory grows at most while `function` runs, over what was in use before.

    CUDA: the caching allocator's statistics. CPU: the peak of the resident set, which Linux lets a process reset; None
    where it does not.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not _reset_resident_peak():
        return None
    before = _resident("VmRSS")
    function()
    return max(0, _resident("VmHWM") - before)


def _resident(key: str) -> int:
    with open("/proc/self/status") as lines:
        for line in lines:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def _reset_resident_peak() -> bool:
    """Gives freed memory back to the system, so that it counts when it is taken again, and resets the peak."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")
    except (AttributeError, OSError):
        return False  # another C library, another system, or no right to
    return True
