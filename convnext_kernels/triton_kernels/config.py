"""Which tile sizes, warps and stages a Triton kernel runs with.

A kernel declares itself once, beside its code::

    config.declare("layer_norm", default=_default, candidates=_candidates)

and asks at every launch::

    chosen = config.choose("layer_norm", channels=c, hidden=0, dtype=x.dtype, rows=rows, device=x.device)
    kernel[grid](..., **chosen.meta)

The answer comes from, in this order,

1. the user cache, which ``convnext-kernels tune`` writes for the GPU at hand (:func:`cache_file`),
2. the table in the repository (:mod:`.table`),
3. the kernel's own `default`, which must compile and fit on every chip from sm_80 on. That is logged, once a chip.

It depends on the kernel, the channels, the hidden channels, the dtype, the chip and the *bucket* of the number of rows,
never on the exact batch size, and nothing is ever measured here: a launch inside a CUDA graph's capture, or with a new
batch size, costs a dictionary look-up. This module needs no Triton.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .._version import __version__

__all__ = [
    "ROW_BUCKETS",
    "Config",
    "Entry",
    "Problem",
    "bucket_of",
    "cache_file",
    "candidates",
    "chip_name",
    "chip_of",
    "choose",
    "declare",
    "declared",
    "forget",
    "of_rows",
    "override",
    "problem_of",
    "read_cache",
    "watched",
    "write_cache",
]

logger = logging.getLogger("convnext_kernels")

#: A problem's bucket is the first of these that its rows do not exceed: less than a tile for each multiprocessor, a
#: few, many, and so many that only the steady state counts.
ROW_BUCKETS = (1024, 8192, 65536, 1 << 62)


class Config:
    """Block sizes (the kernel's own ``tl.constexpr`` names), warps and pipeline stages. Immutable.

    `meta` is everything as the keyword arguments of a launch; ``config["BLOCK_C"]`` reads one of them.
    """

    __slots__ = ("blocks", "meta", "num_stages", "num_warps")

    blocks: Mapping[str, int]
    meta: Mapping[str, int]
    num_stages: int
    num_warps: int

    def __init__(self, blocks: Mapping[str, int], num_warps: int = 4, num_stages: int = 1) -> None:
        if num_warps not in (1, 2, 4, 8, 16, 32) or num_stages < 1:
            raise ValueError(f"Config: expected 1 to 32 warps and at least one stage, got {num_warps}, {num_stages}")
        set_once = functools.partial(object.__setattr__, self)
        set_once("blocks", MappingProxyType(dict(blocks)))
        set_once("num_warps", num_warps)
        set_once("num_stages", num_stages)
        set_once("meta", MappingProxyType({**blocks, "num_warps": num_warps, "num_stages": num_stages}))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"Config is immutable: cannot set {name!r}")

    def __getitem__(self, name: str) -> int:
        return self.meta[name]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and dict(self.meta) == dict(other.meta)

    def __hash__(self) -> int:
        return hash(tuple(sorted(self.meta.items())))

    def __repr__(self) -> str:
        return f"Config({dict(self.blocks)}, num_warps={self.num_warps}, num_stages={self.num_stages})"


def of_rows(m: int, k: int, warps: int, stages: int = 2, programs: int = 1) -> Config:
    """Of a kernel that holds BLOCK_M whole rows and takes BLOCK_K hidden columns a turn; PROGRAMS: blocks that the
    registers of a multiprocessor must hold (launch.constants_of)."""
    return Config({"BLOCK_M": m, "BLOCK_K": k, "PROGRAMS": programs}, num_warps=warps, num_stages=stages)


class Problem(NamedTuple):
    """What a configuration may depend on. `rows` is a bucket's upper bound, `chip` 80, 86, 90, ..."""

    channels: int
    hidden: int
    dtype: torch.dtype
    rows: int
    chip: int


class Entry(NamedTuple):
    """A line of the table: None, or an absent dtype or chip, stands for any."""

    config: Config
    channels: int | None = None
    hidden: int | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    chips: tuple[int, ...] = ()
    rows: int | None = None

    def fits(self, problem: Problem) -> bool:
        return (
            self.channels in (None, problem.channels)
            and self.hidden in (None, problem.hidden)
            and (not self.dtypes or problem.dtype in self.dtypes)
            and (not self.chips or problem.chip in self.chips)
            and self.rows in (None, problem.rows)
        )


class _Kernel(NamedTuple):
    default: Callable[[Problem], Config]
    candidates: Callable[[Problem], Iterable[Config]]


_kernels: dict[str, _Kernel] = {}
_overrides: dict[str, Config] = {}
_watched: dict[str, Problem] | None = None


def declare(
    kernel: str,
    *,
    default: Callable[[Problem], Config],
    candidates: Callable[[Problem], Iterable[Config]] | None = None,
) -> None:
    """Makes a kernel known, at import of its file.

    Args:
        kernel: its name, unique in the package.
        default: a configuration that compiles and fits on every chip from sm_80 on, for any problem.
        candidates: what ``convnext-kernels tune`` tries; by default nothing but `default`.
    """
    if kernel in _kernels:
        raise ValueError(f"config.declare: argument 'kernel': {kernel!r} is declared already")
    _kernels[kernel] = _Kernel(default, candidates or (lambda problem: (default(problem),)))


def declared() -> tuple[str, ...]:
    """The names of all declared kernels."""
    return tuple(_kernels)


def candidates(kernel: str, problem: Problem) -> list[Config]:
    """What tuning tries for a problem: the configuration that runs now, then the kernel's candidates, each once."""
    return list(dict.fromkeys([_resolve(kernel, problem)[0], *_kernels[kernel].candidates(problem)]))


def bucket_of(rows: int) -> int:
    """The upper bound of the bucket of `rows`."""
    for bound in ROW_BUCKETS:
        if rows <= bound:
            return bound
    raise ValueError(f"config.bucket_of: argument 'rows': expected at most 2^62, got {rows}")


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def chip_of(device: torch.device) -> int:
    """The chip of a device: 80, 86, 89, 90, 100, ...

    The interpreter's CPU counts as sm_90; on the meta device it is the chip that launches are recorded for.
    """
    if device.type == "cuda":
        return _capability(torch.cuda.current_device() if device.index is None else device.index)
    if device.type == "meta":
        from . import launch

        return launch.chip_of(torch.empty((), device=device)).capability
    return 90


def problem_of(*, channels: int, hidden: int, dtype: torch.dtype, rows: int, device: torch.device) -> Problem:
    """What :func:`choose` looks up for these arguments."""
    return Problem(channels, hidden, dtype, bucket_of(rows), chip_of(device))


def choose(kernel: str, *, channels: int, hidden: int, dtype: torch.dtype, rows: int, device: torch.device) -> Config:
    """The configuration that `kernel` runs with; about a microsecond once a problem has been seen.

    Args:
        kernel: a declared kernel.
        channels, hidden: C, and K of the MLP (0 where the kernel knows none; the kernel size for a convolution).
        dtype: of the main input.
        rows: N * H * W, or whatever the kernel's grid grows with; only its bucket counts.
        device: of the tensors; a CPU device means the interpreter, the meta device that launches are recorded.
    """
    if _watched is not None:
        _watched.setdefault(kernel, Problem(channels, hidden, dtype, bucket_of(rows), chip_of(device)))
    if _overrides and kernel in _overrides:
        return _overrides[kernel]
    if device.type == "meta":
        return _resolve(kernel, Problem(channels, hidden, dtype, bucket_of(rows), chip_of(device)))[0]
    return _chosen(kernel, channels, hidden, dtype, bucket_of(rows), device)


@functools.lru_cache(maxsize=4096)
def _chosen(kernel: str, channels: int, hidden: int, dtype: torch.dtype, rows: int, device: torch.device) -> Config:
    problem = Problem(channels, hidden, dtype, rows, chip_of(device))
    if device.type == "cuda":
        cached = _cached(kernel, problem, device)
        if cached is not None:
            return cached
    config, found = _resolve(kernel, problem)
    if not found and device.type == "cuda":
        _log_default(kernel, problem.chip)
    return config


def _resolve(kernel: str, problem: Problem) -> tuple[Config, bool]:
    """The repository's configuration, and whether the table has it."""
    from .table import TABLE

    for entry in TABLE.get(kernel, ()):
        if entry.fits(problem):
            return entry.config, True
    return _kernels[kernel].default(problem), False


_untuned_chips: set[int] = set()


def _log_default(kernel: str, chip: int) -> None:
    """Once a chip: a model asks for a dozen kernels."""
    if chip not in _untuned_chips:
        _untuned_chips.add(chip)
        logger.warning(
            "the Triton kernels (%s is the first) run with default configurations: none are known for these problems "
            "on sm_%d (`convnext-kernels tune` finds them)",
            kernel,
            chip,
        )


@contextlib.contextmanager
def override(kernel: str, config: Config) -> Iterator[None]:
    """Runs `kernel` with `config` inside a ``with`` block, whatever the problem: for tuning and for tests."""
    if kernel not in _kernels:
        raise ValueError(f"config.override: argument 'kernel': expected one of {declared()}, got {kernel!r}")
    before = _overrides.get(kernel)
    _overrides[kernel] = config
    try:
        yield
    finally:
        if before is None:
            del _overrides[kernel]
        else:
            _overrides[kernel] = before


@contextlib.contextmanager
def watched() -> Iterator[dict[str, Problem]]:
    """Which kernels ask for a configuration inside a ``with`` block, in order, and for which problem."""
    global _watched
    previous, _watched = _watched, {}
    try:
        yield _watched
    finally:
        _watched = previous


# --- the user cache


def _cache_folder() -> Path:
    """CONVNEXT_KERNELS_CACHE_DIR, else `convnext_kernels` in the platform's folder for caches."""
    named = os.environ.get("CONVNEXT_KERNELS_CACHE_DIR")
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "convnext_kernels"


@functools.cache
def _versions() -> dict[str, str]:
    import triton

    return {"convnext_kernels": __version__, "triton": triton.__version__}


def _key(chip_name: str) -> dict[str, str]:
    return {"chip": chip_name, **_versions()}


def cache_file(chip_name: str) -> Path:
    """Where the tuned configurations of a chip, say 'NVIDIA H200 sm_90', are kept for these versions."""
    name = "-".join(_key(chip_name).values())
    return _cache_folder() / f"triton-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}.json"


def write_cache(chip_name: str, found: Mapping[tuple[str, Problem], Config]) -> Path:
    """Adds tuned configurations to the user cache and returns its file. The old file stays until the new is whole."""
    path = cache_file(chip_name)
    path.parent.mkdir(parents=True, exist_ok=True)
    merged = {**read_cache(chip_name), **found}
    entries = [
        {
            "kernel": kernel,
            **problem._asdict(),
            "dtype": str(problem.dtype).removeprefix("torch."),
            "blocks": dict(config.blocks),
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
        for (kernel, problem), config in merged.items()
    ]
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({**_key(chip_name), "entries": entries}, indent=1) + "\n")
    partial.replace(path)
    forget()
    return path


def read_cache(chip_name: str) -> dict[tuple[str, Problem], Config]:
    """The tuned configurations of a chip; empty where there are none. A file that is no cache is named and left."""
    path = cache_file(chip_name)
    try:
        content = json.loads(path.read_text())
        return {
            (e["kernel"], Problem(e["channels"], e["hidden"], _dtype(e["dtype"]), e["rows"], e["chip"])): Config(
                e["blocks"], e["num_warps"], e["num_stages"]
            )
            for e in content["entries"]
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        logger.warning(
            "the tuned configurations in %s cannot be used (%r): delete the file, or tune again", path, error
        )
        return {}


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a dtype, got {name!r}")
    return dtype


def chip_name(device: torch.device) -> str:
    """A CUDA device's name and architecture, the chip's part of the cache's key."""
    return f"{torch.cuda.get_device_name(device)} sm_{chip_of(device)}"


@functools.cache
def _cache_of(name: str) -> dict[tuple[str, Problem], Config]:
    return read_cache(name)


def _cached(kernel: str, problem: Problem, device: torch.device) -> Config | None:
    config = _cache_of(chip_name(device)).get((kernel, problem))
    # The kernel's parameters may have other names in another commit of the same version.
    if config is None or config.blocks.keys() != _kernels[kernel].default(problem).blocks.keys():
        return None
    return config


def forget() -> None:
    """Forgets every choice, so that a changed cache or table is read again."""
    _chosen.cache_clear()
    _cache_of.cache_clear()
