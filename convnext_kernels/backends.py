"""Which implementation runs an operator here, and how to force one.

Backends:

``cpu``, ``cuda``
    our compiled kernels for that device (csrc/).
``reference``
    PyTorch's own kernels, composed in :mod:`convnext_kernels.reference_backend`: correct on every device, not fused.
``auto``
    the compiled kernels where there are any for the operator and the device, else ``reference`` (logged once an
    operator: it changes speed, never results beyond rounding).

The choice is ``auto`` unless the environment variable ``CONVNEXT_KERNELS_BACKEND`` or :func:`use` says otherwise.
A forced backend that cannot run an operator raises; nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, reference_backend

__all__ = ["BACKENDS", "OPERATORS", "Choice", "current", "describe", "use"]

logger = logging.getLogger("convnext_kernels")

BACKENDS = ("auto", "cpu", "cuda", "reference")

#: The operators that a backend implements; `convnext_block` is composed from them.
OPERATORS = tuple(reference_backend.__all__)

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta", "mps": "MPS", "xpu": "XPU"}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = _checked(os.environ.get("CONVNEXT_KERNELS_BACKEND") or "auto", "CONVNEXT_KERNELS_BACKEND")


def current() -> str:
    """The backend that is asked for now: 'auto' or a forced one."""
    return _forced


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Forces a backend inside a ``with`` block: ``auto``, ``cpu``, ``cuda`` or ``reference``.

    Applies to the whole process. A compiled graph (``torch.compile``) keeps the backend it was traced with.

    Raises:
        ValueError: unknown backend name.
    """
    global _forced
    previous, _forced = _forced, _checked(backend, "convnext_kernels.use_backend: argument 'backend'")
    try:
        yield
    finally:
        _forced = previous


@functools.cache
def _has_kernel(operator: str, device_type: str) -> bool:
    key = _DISPATCH_KEYS.get(device_type)
    name = f"convnext_kernels::{operator}"
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _why_not(operator: str, device_type: str) -> str:
    if device_type == "cuda":
        return native.status().cuda_reason or f"the CUDA library has no kernel for {operator}"
    if device_type == "cpu":
        return f"the CPU library has no kernel for {operator}"
    return f"no kernel of ours runs on device type '{device_type}'"


class Choice(NamedTuple):
    """What runs an operator on a device type, and why."""

    operator: str
    backend: str
    reason: str


def choose(operator: str, device_type: str) -> Choice:
    """The backend that runs `operator` on tensors of `device_type`.

    Raises:
        RuntimeError: the forced backend cannot run it.
    """
    if _forced == "reference":
        return Choice(operator, "reference", "forced")
    compiled = _has_kernel(operator, device_type)
    if _forced == "auto":
        if compiled:
            return Choice(operator, device_type, "compiled kernel")
        return Choice(operator, "reference", _why_not(operator, device_type))
    if _forced != device_type:
        raise RuntimeError(
            f"convnext_kernels::{operator}: backend '{_forced}' is forced, but the tensors are on '{device_type}'"
        )
    if not compiled:
        raise RuntimeError(
            f"convnext_kernels::{operator}: backend '{_forced}' is forced, but {_why_not(operator, device_type)}"
        )
    return Choice(operator, device_type, "forced")


def describe(device_type: str) -> list[Choice]:
    """For every operator, which backend runs it on `device_type` and why."""
    return [choose(operator, device_type) for operator in OPERATORS]


@functools.cache
def _log_fallback(operator: str, device_type: str, reason: str) -> None:
    logger.warning("convnext_kernels::%s runs on '%s' through PyTorch's own kernels: %s", operator, device_type, reason)


def call(operator: str, *arguments: Any) -> Any:
    """Runs a raw operator below autograd, through the backend chosen for the device of its first argument."""
    first: Tensor = arguments[0]
    device_type = first.device.type
    implementation: Callable[..., Any] = getattr(torch.ops.convnext_kernels, operator).default
    if _forced == "reference" and device_type != "meta":
        implementation = getattr(reference_backend, operator)
    elif device_type != "meta":  # on the meta device the shape rules run
        choice = choose(operator, device_type)
        if choice.backend == "reference":  # where the dispatcher's fallback is reference_backend too
            _log_fallback(operator, device_type, choice.reason)
    with torch._C._AutoDispatchBelowAutograd():
        return implementation(*arguments)
