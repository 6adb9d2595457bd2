"""Compares the providers of one case: builds them, checks their results, times them in turns, measures their memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .cases import PRECISIONS, Case
from .timing import Ceilings, Lane, Quantiles, Race, Runner, lane_of, quantiles, race, ratios

#: The relative RMS error against fp64 that a result may have. Where PyTorch itself is further off in the same mode, the
#: allowance is twice its error.
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
#: For PyTorch's own eager results, which nothing else is there to compare with: more is a wrong function, not rounding.
EAGER_ALLOWED_ERROR = 0.5

Results = dict[str, Tensor]


class Unavailable(Exception):
    """A provider cannot do a case here; the message says why."""


class WrongResult(AssertionError):
    """A provider does not compute what the reference computes: there is nothing to time."""


class CheckedRunner(Runner):
    """A runner whose results can be checked and whose memory can be measured."""

    images = 1  # a call

    def results(self) -> Results:
        """Output, and in a backward pass or training step every gradient. Each call draws the same random numbers."""
        raise NotImplementedError

    def exact(self) -> Results:
        """The same results by the reference in fp64."""
        raise NotImplementedError

    def eager(self) -> Results:
        """The same results by eager PyTorch in the runner's own mode."""
        raise NotImplementedError

    def memory(self) -> dict[str, Any]:
        """`peak_bytes`: growth during a call; `saved_bytes`, `saved_bytes_an_element`: kept for the backward pass."""
        raise NotImplementedError


@dataclass(frozen=True)
class Provider:
    """A way of doing a case. `kind`: ours, eager (PyTorch or a library as it comes), other."""

    name: str
    kind: str
    build: Callable[[Case, torch.device], CheckedRunner]
    covers: Callable[[Case, str, bool], bool] = lambda case, device_type, full: True
    note: str = ""

    def __str__(self) -> str:
        return self.name


@dataclass
class Outcome:
    """What came of a provider in a case: samples and figures, or why there are none."""

    samples: list[float] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""
    error: Exception | None = None


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; NaN where there is one."""
    if got.shape != exact.shape:
        raise WrongResult(f"expected shape {tuple(exact.shape)}, got {tuple(got.shape)}")
    return float((got.double() - exact.double()).norm() / exact.double().norm())


def check(runner: CheckedRunner, case: Case, kind: str) -> float:
    """The largest relative error of the runner's results.

    Raises:
        WrongResult: one is not within its allowance, or is missing.
    """
    exact, results = runner.exact(), runner.results()
    if results.keys() != exact.keys():
        raise WrongResult(f"expected the results {sorted(exact)}, got {sorted(results)}")
    allowed = EAGER_ALLOWED_ERROR if kind == "eager" else ALLOWED_ERROR[PRECISIONS[case.precision].computed]
    errors = {name: relative_error(results[name], exact[name]) for name in exact}
    # "not <=", so that NaN is refused.
    doubtful = [name for name, error in errors.items() if not error <= allowed]
    eager = runner.eager() if doubtful and kind != "eager" else {}
    for name in doubtful:
        bound = max(allowed, 2 * relative_error(eager[name], exact[name])) if eager else allowed
        if not errors[name] <= bound:
            raise WrongResult(f"{case.group}: error {errors[name]:.2e} of {name} against fp64, allowed {bound:.2e}")
    return max(errors.values())


def compare(
    case: Case, providers: list[Provider], device: torch.device, ceilings: Ceilings, seconds: float
) -> dict[str, Outcome]:
    """An Outcome for each provider. What one raises is kept for its own test to raise; the others go on."""
    torch._dynamo.reset()  # each case compiles afresh; compiled code of earlier ones counts as a recompilation
    outcomes = {provider.name: Outcome() for provider in providers}
    runners: dict[str, CheckedRunner] = {}
    lanes: dict[str, Lane] = {}
    for provider in providers:
        outcome = outcomes[provider.name]
        runner = None
        try:
            runner = provider.build(case, device)
            outcome.info["relative_error"] = check(runner, case, provider.kind)
            # What does not fit into memory or a graph fails here, and the others are timed without it.
            if not runner.prepares:
                runner.run(0)
            lanes[provider.name] = lane_of(runner, device)
            runners[provider.name] = runner
        except Unavailable as reason:
            outcome.skipped = str(reason)
        except torch.OutOfMemoryError as error:
            # Its text only: the traceback would keep the tensors.
            text = f"out of memory: {str(error).splitlines()[0]}"
            if provider.kind == "ours":
                outcome.error = MemoryError(text)
            else:
                outcome.skipped = text
        except Exception as error:
            outcome.error = error
        if provider.name not in runners:
            del runner
            _free_memory(device)
    gc.collect()
    if runners:
        times = race(lanes, device, seconds)
        for provider in providers:
            if provider.name in runners:
                outcome = outcomes[provider.name]
                outcome.samples = times.samples[provider.name]
                outcome.info |= _figures(case, provider, runners[provider.name], times, ceilings)
                try:
                    outcome.info |= runners[provider.name].memory()
                except Exception as error:  # what autograd keeps may not fit where the step itself does
                    outcome.error = error
        kinds = {provider.name: provider.kind for provider in providers}
        images = {name: runner.images for name, runner in runners.items()}
        _add_ratios(kinds, images, times, outcomes)
    runners.clear()
    lanes.clear()
    _free_memory(device)
    return outcomes


def _free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _figures(case: Case, provider: Provider, runner: CheckedRunner, times: Race, ceilings: Ceilings) -> dict[str, Any]:
    """What the report needs, in SI units."""
    time = quantiles(times.samples[provider.name])
    out = {
        "suite": case.suite,
        "group": case.group,
        "case": asdict(case),
        "provider": provider.name,
        "kind": provider.kind,
        "note": provider.note,
        "seconds": _named(time),
        "calls_a_sample": times.calls[provider.name],
        "rounds": len(times.samples[provider.name]),
        "clock": times.clock,
        "images": runner.images,
        "images_a_second": runner.images / time.median,
    }
    if getattr(case, "experiment", "step") == "step":
        work, least = case.work(), ceilings.least_seconds(case)
        out |= {
            "least_bytes": work.bytes,
            "operations": work.operations,
            "gigabytes_a_second": work.bytes / time.median / 1e9,
            "teraflops": work.operations / time.median / 1e12,
            "roofline_seconds": least,
            "roofline_percent": 100 * least / time.median,
        }
    return out


def _add_ratios(kinds: dict[str, str], images: dict[str, int], times: Race, outcomes: dict[str, Outcome]) -> None:
    """How much faster each is than each other one, and than the fastest that is eager: the baseline."""
    # An image: providers that chose their own batch differ in images a call.
    an_image = {name: [seconds / images[name] for seconds in samples] for name, samples in times.samples.items()}
    medians = {name: quantiles(samples).median for name, samples in an_image.items()}
    eager = [name for name in medians if kinds[name] == "eager"]
    baseline = min(eager, key=lambda name: medians[name]) if eager else None
    for name, samples in an_image.items():
        against = {other: ratios(an_image[other], samples) for other in medians if other != name}
        info = outcomes[name].info
        info["faster_than"] = {other: _named(ratio) for other, ratio in against.items()}
        info["baseline"] = baseline
        info["ratio"] = _named(ratios(an_image[baseline], samples)) if baseline else None


def _named(values: Quantiles) -> dict[str, float]:
    return {"median": values.median, "quantile_20": values.low, "quantile_80": values.high}
