"""Which implementation runs an operator here, and how to force one.

Backends:

``cpu``, ``cuda``
    our compiled kernels for that device (csrc/).
``triton``
    our Triton kernels (:mod:`convnext_kernels.triton_kernels`): fp32, fp16 and bf16 on GPUs from sm_80 on. With
    TRITON_INTERPRET=1 set before the import they run on CPU tensors instead, interpreted: for tests.
``reference``
    PyTorch's own kernels, composed in :mod:`convnext_kernels.reference_backend`: correct on every device, not fused.
``auto``
    the first of these that can run the operator on its arguments: on a GPU ``triton``, ``cuda``, ``reference`` for
    layer_norm_mlp and its backward, and ``cuda``, ``triton``, ``reference`` for the others; elsewhere the compiled
    kernels, then ``reference``. Anything but the first is logged once: it changes speed, never results beyond rounding.

The choice is ``auto`` unless the environment variable ``CONVNEXT_KERNELS_BACKEND``, :func:`use`, or a block's own
`backend` argument says otherwise; the last goes before the second, the second before the first. It is made at every
call on real tensors, in inference mode and inside compiled graphs too. A forced backend that cannot run an operator
raises; nothing falls back silently.

How a call gets there. A raw operator's Autograd kernel (operators/_registration.py) ends in :func:`call`. That runs
the chosen implementation at once where the arguments are plain tensors, and goes on through the dispatcher where
something wants to see the operator itself: tracing, a fake tensor, a tensor subclass. At the end of the dispatcher's
list stands :func:`route`, under BackendSelect: the last key before the devices', and one that inference mode, where
Autograd's is skipped, leaves in place.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, reference_backend

__all__ = ["BACKENDS", "OPERATORS", "Choice", "RefusedError", "choose", "current", "describe", "use"]

logger = logging.getLogger("convnext_kernels")

BACKENDS = ("auto", "cpu", "cuda", "triton", "reference")

#: The operators that a backend implements; `convnext_block` is composed from them.
OPERATORS = tuple(reference_backend.__all__)

#: Where the hidden channels K can be read off: the position of fc1_weight (K, C).
_FC1_WEIGHT = {"layer_norm_mlp": 4, "layer_norm_mlp_backward": 7}

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta", "mps": "MPS", "xpu": "XPU"}


def checked(name: str, source: str) -> str:
    """`name` if it is a backend's.

    Raises:
        ValueError: it is not; the message begins with `source`.
    """
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced = checked(os.environ.get("CONVNEXT_KERNELS_BACKEND") or "auto", "CONVNEXT_KERNELS_BACKEND")


def current() -> str:
    """The backend that is asked for now: 'auto' or a forced one."""
    return _forced


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Forces a backend inside a ``with`` block: ``auto``, ``cpu``, ``cuda``, ``triton`` or ``reference``.

    Applies to the whole process, and to compiled graphs that run inside it: what a graph was traced with does not
    matter. A block with a `backend` of its own keeps that.

    Raises:
        ValueError: unknown backend name.
    """
    global _forced
    previous, _forced = _forced, checked(backend, "convnext_kernels.use_backend: argument 'backend'")
    try:
        yield
    finally:
        _forced = previous


# --- what can run


@functools.cache
def _has_kernel(operator: str, device_type: str) -> bool:
    key = _DISPATCH_KEYS.get(device_type)
    name = f"convnext_kernels::{operator}"
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@functools.cache
def _triton_kernels() -> ModuleType | str:
    """The package of the Triton kernels, or why it cannot be imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    from . import triton_kernels

    return triton_kernels


@functools.cache
def triton_reason(device: torch.device) -> str:
    """Why no Triton kernel runs on a device, whatever the arguments; empty where they do."""
    kernels = _triton_kernels()
    if isinstance(kernels, str):
        return kernels
    if device.type == "cuda" and torch.cuda.device_count():  # without one, `info` asks what would run
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"Triton kernels need compute capability 8.0, and this GPU has {major}.{minor}"
    return kernels.launch.why_not_device(device) or ""


@functools.cache
def cuda_reason(device: torch.device) -> str:
    """Why no kernel of the CUDA library runs on a CUDA device, whatever the arguments; empty where they do."""
    build = native.build_info()  # None: a library without bindings says nothing of itself
    if build is None or not torch.cuda.device_count():  # as above
        return ""
    # The CUDA runtime inside the library takes any driver of its own major version or a later one.
    compiler, driver = build["cuda_version"], native.cuda_driver_version()
    if driver is not None and driver[0] < int(compiler.partition(".")[0]):
        return f"the CUDA library was compiled with CUDA {compiler}, and the driver is for {driver[0]}.{driver[1]}"
    capability = torch.cuda.get_device_capability(device)
    if native.has_code_for(build["cuda_architectures"], capability):
        return ""
    compiled = ", ".join(build["cuda_architectures"])
    return f"the CUDA library was compiled for {compiled}, and this GPU is sm_{capability[0]}{capability[1]}"


def _why_not(backend: str, operator: str, device: torch.device, arguments: tuple[Any, ...]) -> str:
    """Why `backend` cannot run the operator; empty where it can. Without arguments: whatever they are."""
    if backend == "reference":
        return ""
    if backend == "triton":
        reason = triton_reason(device)
        if not reason:
            kernels = _triton_kernels()
            if operator not in kernels.OPERATORS:
                return f"there is no Triton kernel for {operator}"
            reason = (kernels.why_not(operator, *arguments) if arguments else None) or ""
        return reason
    if backend != device.type:
        return f"the tensors are on '{device.type}'"
    if _has_kernel(operator, device.type):
        if device.type != "cuda":
            return ""
        reason = cuda_reason(device)
        if not reason and arguments and _lacks_products(operator, arguments):
            reason = "PyTorch has no fp16 products with fp32 results while allow_fp16_accumulation is on"
        return reason
    if device.type == "cuda":
        return native.status().cuda_reason or f"the CUDA library has no kernel for {operator}"
    return f"the {device.type.upper()} library has no kernel for {operator}"


def _lacks_products(operator: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the CUDA library's backward would ask PyTorch for a product that a setting of today's forbids."""
    if operator != "layer_norm_mlp_backward" or arguments[1].dtype != torch.float16:
        return False
    return torch._C._get_cublas_allow_fp16_accumulation()


def _preferences(operator: str, device_type: str) -> tuple[str, ...]:
    """What `auto` tries, best first."""
    if device_type == "cuda":
        return ("triton", "cuda", "reference") if operator in _FC1_WEIGHT else ("cuda", "triton", "reference")
    return ("cpu", "reference") if device_type == "cpu" else ("reference",)


class RefusedError(RuntimeError):
    """A forced backend cannot run an operator. Raised before anything has run."""


class Choice(NamedTuple):
    """What runs an operator, and why."""

    operator: str
    backend: str
    reason: str


_KINDS = {"cpu": "compiled kernel", "cuda": "compiled kernel", "triton": "Triton kernel"}


def _choose(operator: str, forced: str, device: torch.device, arguments: tuple[Any, ...] = ()) -> Choice:
    if forced != "auto":
        reason = _why_not(forced, operator, device, arguments)
        if reason:
            raise RefusedError(
                f"convnext_kernels::{operator}: backend '{forced}' is forced, but {reason}{_got(operator, arguments)}"
            )
        return Choice(operator, forced, "forced")
    refusals = []
    for backend in _preferences(operator, device.type):
        reason = _why_not(backend, operator, device, arguments)
        if not reason:
            if not refusals:
                kind = _KINDS.get(backend, f"no kernel of ours runs on device type '{device.type}'")
                return Choice(operator, backend, kind)
            return Choice(operator, backend, "; ".join(refusals))
        refusals.append(reason)
    raise AssertionError("the reference backend runs everywhere")


def _got(operator: str, arguments: tuple[Any, ...]) -> str:
    """The first argument of a refused call, by name."""
    if not arguments:
        return ""
    first = arguments[0]
    (name, *_) = getattr(torch.ops.convnext_kernels, operator).default._schema.arguments
    return f"; argument '{name.name}' is {first.dtype} of shape {tuple(first.shape)} on '{first.device}'"


def choose(operator: str, device: str | torch.device, forced: str | None = None) -> Choice:
    """The backend that runs `operator` on a device, for arguments that all of them take (C a multiple of 8, no fp64).

    Args:
        operator: one of OPERATORS.
        device: a device or its type.
        forced: a backend; by default :func:`current`.

    Raises:
        RefusedError: the forced backend cannot run it.
    """
    return _choose(operator, forced or _forced, torch.device(device))


def describe(device: str | torch.device) -> list[Choice]:
    """For every operator, which backend runs it on a device and why; 'none' where the forced one cannot."""
    return [_describe(operator, torch.device(device)) for operator in OPERATORS]


def _describe(operator: str, device: torch.device) -> Choice:
    try:
        choice = _choose(operator, _forced, device)
    except RefusedError as error:
        return Choice(operator, "none", str(error).partition(": ")[2])
    if choice.backend == "triton" and _forced == "auto":
        preferences = _preferences(operator, device.type)
        others = preferences[preferences.index("triton") + 1 :]
        second = next(backend for backend in others if not _why_not(backend, operator, device, ()))
        what = "fp64, or C or K no multiple of 8" if operator in _FC1_WEIGHT else "fp64"
        return choice._replace(reason=f"{choice.reason}; for {what}: {second}")
    return choice


@functools.cache
def _log_fallback(operator: str, device_type: str, backend: str, reason: str) -> None:
    kernels = "PyTorch's own kernels" if backend == "reference" else f"the backend '{backend}'"
    logger.warning("convnext_kernels::%s runs on '%s' through %s: %s", operator, device_type, kernels, reason)


# --- a call

_decided: dict[tuple[Any, ...], Callable[..., Any]] = {}


def _implementation(operator: str, forced: str, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that runs the operator on these arguments; decided once for each device, dtype and width."""
    first: Tensor = arguments[0]
    key: tuple[Any, ...] = (operator, forced, first.device, first.dtype)
    if operator == "depthwise_conv2d_cast":
        key += (arguments[3],)  # the dtype that it computes in
    elif operator in _FC1_WEIGHT:
        key += (first.shape[-1], arguments[_FC1_WEIGHT[operator]].shape[0], _lacks_products(operator, arguments))
    decided = _decided.get(key)
    if decided is None:
        decided = _decided[key] = _decide(operator, forced, first.device, arguments)
    return decided


def _decide(operator: str, forced: str, device: torch.device, arguments: tuple[Any, ...]) -> Callable[..., Any]:
    if device.type == "meta":  # the shape rules run there
        backend = "meta"
    else:
        backend, reason = _choose(operator, forced, device, arguments)[1:]
        if forced == "auto" and (backend == "reference" or backend != _preferences(operator, device.type)[0]):
            _log_fallback(operator, device.type, backend, reason)
    if backend == "reference":
        return _without_autocast(getattr(reference_backend, operator))
    if backend == "triton":
        return _triton_kernels().implementation(operator)
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _DISPATCH_KEYS[device.type]))
    return functools.partial(getattr(torch.ops.convnext_kernels, operator).default.redispatch, key)


_AUTOCAST = functools.reduce(
    lambda keys, device: keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device}")),
    ("CUDA", "XPU", "MPS", "HPU", "IPU", "PrivateUse1"),
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU),
)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """What dtypes an operator computes in is decided: autocast, on in a backward pass say, shall not cast in PyTorch's.

    The compiled kernels call none that it casts.
    """

    def run(*arguments: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return function(*arguments)

    return run


def _bits(*keys: str) -> int:
    bits = 0
    for key in keys:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key)).raw_repr()
    return bits


# What the dispatcher looks at beside the arguments' own keys in a thread where no mode and no transform is on.
_USUAL = _bits("BackendSelect", "ADInplaceOrView")
_UNUSUAL_TENSOR = _bits(
    "Python", "PythonTLSSnapshot", "Functionalize", "Conjugate", "Negative", "ZeroTensor", "FuncTorchBatched",
    "FuncTorchGradWrapper",
)  # fmt: skip
_PLAIN_TYPES = frozenset((Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, torch.dtype))


def are_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether a call may pass the dispatcher by: no tracing, no fake tensor or subclass, no transform. Takes 1 us."""
    return (
        _PLAIN_TYPES.issuperset(map(type, arguments))
        and not torch._C._dispatch_tls_local_include_set().raw_repr() & ~_USUAL
        and not torch._C._dispatch_keys(arguments[0]).raw_repr() & _UNUSUAL_TENSOR
    )


def call(operator: str, *arguments: Any) -> Any:
    """Runs a raw operator below autograd, through the backend chosen for its arguments."""
    with torch._C._AutoDispatchBelowAutograd():
        if are_plain(arguments):
            return _implementation(operator, _forced, arguments)(*arguments)
        return getattr(torch.ops.convnext_kernels, operator).default(*arguments)


def call_in(backend: str | None) -> Callable[..., Any]:
    """:func:`call` with a backend of its own instead of :func:`current`; None stands for that."""
    if backend is None:
        return call

    def call_forced(operator: str, *arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return _implementation(operator, backend, arguments)(*arguments)

    return call_forced


def route(operator: str) -> Callable[..., Any]:
    """The operator's kernel under BackendSelect: what is left of the dispatcher's list is to choose the backend."""

    def kernel(*arguments: Any) -> Any:
        return _implementation(operator, _forced, arguments)(*arguments)

    return kernel
