"""Times runners in turns, and measures what the device can do at best."""

from __future__ import annotations

import functools
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .cases import PRECISIONS, Case

MOST_ROUNDS = 400
LEAST_SAMPLE_SECONDS = 0.004  # of one timed sample: what is shorter is repeated up to this
WARM_UP_CALLS = 4  # or fewer, once they have taken this long:
WARM_UP_SECONDS = 0.2

#: What the device's best is measured with: numbers in a copy, rows and columns of a matrix, and for how long at least.
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}
MULTIPLIED = {"cpu": 1536, "cuda": 8192}
BEST_SECONDS = 1.0


class Quantiles(NamedTuple):
    median: float
    low: float  # 20 %
    high: float  # 80 %


def quantiles(values: list[float]) -> Quantiles:
    if len(values) == 1:
        return Quantiles(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Quantiles(statistics.median(values), fifths[0], fifths[3])


class Runner:
    """One provider's way of doing a case. Subclasses hold inputs and parameters, built and ready."""

    #: Whether `run` may be captured into a CUDA graph, so that launching from Python is not what is timed.
    capturable = False
    #: Whether every call has something to prepare that is not to be timed; it is then timed call by call.
    prepares = False
    least_rounds = 5

    def prepare(self) -> None:
        """What comes before a call and is not timed."""

    def run(self, call: int) -> None:
        """The call that is timed. `call` counts, so that inputs can rotate: what was just used is in the cache."""
        raise NotImplementedError


@dataclass(frozen=True)
class Race:
    """Seconds a call: for each runner a sample a round. Samples of the same round stand next to each other in time."""

    samples: dict[str, list[float]]
    calls: dict[str, int]  # in a sample
    clock: str  # host, events, graph


def race(lanes: dict[str, Lane], device: torch.device, seconds: float) -> Race:
    """Runs all in turns, starting each round with another one, for `seconds` a lane and a least number of rounds.

    On CUDA a round is timed with events on the stream, and nothing waits for the device until the round is over.
    """
    gc.collect()
    samples: dict[str, list[float]] = {name: [] for name in lanes}
    names = list(lanes)
    start, rounds = time.perf_counter(), 0
    least_rounds = min(lane.least_rounds for lane in lanes.values())
    enabled = gc.isenabled()
    gc.disable()
    try:
        while rounds < MOST_ROUNDS:
            if rounds >= least_rounds and time.perf_counter() - start > seconds * len(names):
                break
            turn = rounds % len(names)
            promises = {name: lanes[name].sample() for name in names[turn:] + names[:turn]}
            _synchronize(device)
            for name, promise in promises.items():
                samples[name].append(promise())
            rounds += 1
    finally:
        if enabled:
            gc.enable()
    clocks = sorted({lane.clock for lane in lanes.values()})
    return Race(samples, {name: lane.calls for name, lane in lanes.items()}, " and ".join(clocks))


@dataclass
class Lane:
    """A runner on the track: `sample` runs `calls` calls and promises their seconds a call."""

    sample: Callable[[], Callable[[], float]]
    calls: int
    clock: str
    least_rounds: int


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lane_of(runner: Runner, device: torch.device) -> Lane:
    """The runner warmed up, its calls in a sample counted, and captured where it may be."""
    count, least_rounds = 0, runner.least_rounds

    def once() -> float:
        nonlocal count
        runner.prepare()
        _synchronize(device)
        start = time.perf_counter()
        runner.run(count)
        _synchronize(device)
        count += 1
        return time.perf_counter() - start

    if runner.prepares:
        return Lane(lambda: (lambda seconds: lambda: seconds)(once()), 1, "host", least_rounds)
    warm_up = [once()]
    while sum(warm_up) < WARM_UP_SECONDS and len(warm_up) < WARM_UP_CALLS:
        warm_up.append(once())
    calls = max(1, round(LEAST_SAMPLE_SECONDS / min(warm_up)))

    def repeat() -> None:
        nonlocal count
        for _ in range(calls):
            runner.run(count)
            count += 1

    if device.type != "cuda":

        def sample_on_host() -> Callable[[], float]:
            start = time.perf_counter()
            repeat()
            seconds = (time.perf_counter() - start) / calls
            return lambda: seconds

        return Lane(sample_on_host, calls, "host", least_rounds)

    body, clock = repeat, "events"
    if runner.capturable:
        graph = torch.cuda.CUDAGraph()
        # On the current stream: a backward pass runs where its forward pass ran.
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream(device)):
            repeat()
        body, clock = graph.replay, "graph"

    def sample_on_stream() -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        body()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3 / calls

    return Lane(sample_on_stream, calls, clock, least_rounds)


def ratios(slower: list[float], faster: list[float]) -> Quantiles:
    """How many times faster, round by round: a drift of the machine that meets both in a round cancels."""
    return quantiles([a / b for a, b in zip(slower, faster, strict=True)])


class ReplayClock:
    """Plays recorded samples to pytest-benchmark: it reads the clock before and after `advance`, and sees a sample."""

    def __init__(self) -> None:
        self._now = 0.0
        self._left: Iterator[float] = iter(())

    def read(self) -> float:
        return self._now

    def load(self, samples: list[float]) -> None:
        # From zero for each benchmark: a large reading would cost small samples their digits.
        self._now, self._left = 0.0, iter(samples)

    def advance(self) -> None:
        self._now += next(self._left)


CLOCK = ReplayClock()


# --- the device's best


@dataclass(frozen=True)
class Ceilings:
    """What was measured on this device: bytes a second of a large copy (read plus written), operations a second of a
    large matrix product by the dtype of its operands."""

    bandwidth: float
    matrix: dict[str, float]

    def least_seconds(self, case: Case) -> float:
        """The roofline: the time that memory or the matrix units need at least."""
        work, computed = case.work(), PRECISIONS[case.precision].computed
        return max(work.bytes / self.bandwidth, work.operations / self.matrix[str(computed)])


def measure_ceilings(device: torch.device) -> Ceilings:
    cuda = device.type == "cuda"
    source = torch.randn(COPIED[device.type], device=device)
    bandwidth = 2 * source.nbytes / _best(functools.partial(torch.empty_like(source).copy_, source), device)
    del source
    size = MULTIPLIED[device.type]
    matrix = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        products = [functools.partial(torch.mm, a, b, out=torch.empty_like(a))]
        if not cuda:
            # mm gives fp32 to MKL, of which a convolution, oneDNN's, is twice as fast on some processors.
            image, filters = a.view(1, size, 1, size).permute(0, 3, 1, 2), b.view(size, size, 1, 1)
            products.append(functools.partial(torch.conv2d, image, filters))
        matrix[str(dtype)] = 2 * size**3 / min(_best(product, device) for product in products)
    return Ceilings(bandwidth, matrix)


def _best(function: Callable[[], Any], device: torch.device) -> float:
    seconds: list[float] = []
    while len(seconds) < 10 or sum(seconds) < BEST_SECONDS:
        _synchronize(device)
        start = time.perf_counter()
        function()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def cache_bytes(device: torch.device) -> int:
    """The last-level cache: inputs that rotate through twice as much are read from memory."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = (os.sysconf(name) for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE") if name in os.sysconf_names)
    return max([32 << 20, *sizes])
