"""From tensors to a Triton launch: what a machine can run, its limits, and the one door every launch goes through.

`run` is that door, so that tests and `benchmarks/resources.py` can record what an operator would launch on any chip (on
meta tensors, without a GPU) and compile exactly that.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "DTYPES",
    "INTERPRETED",
    "MOST_ROWS",
    "OPTIONS",
    "Chip",
    "Launch",
    "check_mlp",
    "check_tensors",
    "chip_of",
    "column_pieces",
    "constants_of",
    "device_guard",
    "next_power_of_2",
    "recorded",
    "row_tiles",
    "run",
    "sample_order",
    "tiles_of",
    "why_not_device",
    "why_not_mlp",
    "why_not_tensor",
]

#: What the kernels take; fp64 runs elsewhere.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: layer_norm_mlp and its backward take no more rows (of C elements, of which there may be more than 2^31): they count
#: rows in int32, and 2^16 are left for those that only round up a tile or a program's share.
MOST_ROWS = 2**31 - 2**16

#: What every kernel is compiled with, beside its warps and stages. A product and a sum are one FMA, which halves the
#: convolution's instructions: Triton's own default is that up to 3.9 only, and an environment variable's to change.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}

#: Triton reads TRITON_INTERPRET when it decorates a kernel: with this package's import it is settled.
INTERPRETED: bool = triton.knobs.runtime.interpret


# --- chips


@dataclasses.dataclass(frozen=True)
class Chip:
    """What of a GPU the choice of a configuration depends on."""

    key: str  # of the configuration table: 'sm_90'
    capability: int  # 90
    multiprocessors: int
    shared_bytes: int  # a block may have, with opt-in

    @property
    def tma(self) -> bool:
        """Tensor descriptors become TMA copies; elsewhere the compiler would make slow loads of them."""
        return self.capability >= 90


# The architectures' limits (CUDA C++ Programming Guide, technical specifications); multiprocessors of a large part.
_ARCHITECTURES = {
    80: (108, 163),
    86: (84, 99),
    87: (16, 163),
    89: (142, 99),
    90: (132, 227),
    100: (148, 227),
    103: (148, 227),
    110: (20, 227),
    120: (188, 99),
    121: (48, 99),
}


@functools.cache
def chip_of_architecture(capability: int) -> Chip:
    """A chip of a compute capability (90 for sm_90) without having one; an unknown one gets the least limits."""
    multiprocessors, kib = _ARCHITECTURES.get(capability, (64, 99))
    return Chip(f"sm_{capability}", capability, multiprocessors, kib * 1024)


@functools.cache
def _chip_of_device(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    capability = properties.major * 10 + properties.minor
    shared_bytes = getattr(properties, "shared_memory_per_block_optin", chip_of_architecture(capability).shared_bytes)
    return Chip(f"sm_{capability}", capability, properties.multi_processor_count, shared_bytes)


def chip_of(tensor: Tensor) -> Chip:
    """The chip that holds a tensor; in the interpreter an imagined Hopper of 3 multiprocessors."""
    if _recorder is not None:
        return _recorder.chip
    if tensor.is_cuda:
        return _chip_of_device(tensor.device.index)
    return dataclasses.replace(chip_of_architecture(90), multiprocessors=3)


# --- checks


def why_not_device(device: torch.device) -> str | None:
    """Why no Triton kernel can take a tensor on this device; None where one can."""
    if device.type == "cuda":
        return "TRITON_INTERPRET=1 is set and the tensors are on a GPU" if INTERPRETED else None
    if (device.type == "cpu" and INTERPRETED) or (device.type == "meta" and _recorder is not None):
        return None
    return f"Triton kernels need a CUDA tensor, not one on '{device.type}' (TRITON_INTERPRET=1 takes CPU tensors)"


def why_not_tensor(tensor: Tensor) -> str | None:
    """Why no Triton kernel can take this tensor; None where one can."""
    if tensor.dtype not in DTYPES:
        return f"Triton kernels take float32, float16 and bfloat16, not {tensor.dtype}"
    return why_not_device(tensor.device)


def why_not_mlp(operator: str, z: Tensor, fc1_weight: Tensor) -> str | None:
    """Why the kernels of layer_norm_mlp or its backward take no tensors of these widths; None where they do.

    For the choice of a backend, which is made once for a width: too many rows are `check_mlp`'s to refuse.
    """
    channels, hidden = z.shape[-1], fc1_weight.shape[0]
    if not channels or not hidden or channels % 8 or hidden % 8:
        return f"{operator} in Triton takes channels in multiples of 8, not C = {channels} with K = {hidden}"
    return None


def check_mlp(operator: str, z: Tensor, fc1_weight: Tensor) -> None:
    """Raises unless the kernels of layer_norm_mlp or its backward can take these shapes.

    Raises:
        RuntimeError: names the operator, and what of the shapes it cannot take.
    """
    reason = why_not_mlp(operator, z, fc1_weight)
    if reason is not None:
        raise RuntimeError(reason)
    rows = z.numel() // z.shape[-1]
    if rows > MOST_ROWS:
        fail(operator, "z", f"at most {MOST_ROWS} rows of C elements", f"{rows} rows")


def fail(operator: str, argument: str, expected: str, got: Any) -> NoReturn:
    """Raises as the compiled kernels do."""
    raise RuntimeError(f"{operator}: argument '{argument}': expected {expected}, got {got}")


def check_tensors(operator: str, first: str, **tensors: Tensor | None) -> None:
    """Raises unless every tensor is dense, of a dtype the kernels take, and where the one named `first` is.

    Raises:
        RuntimeError: names the operator, the argument, what was expected and what came.
    """
    device = tensors[first].device
    for argument, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in DTYPES:
            fail(operator, argument, "dtype float32, float16 or bfloat16", tensor.dtype)
        if tensor.device != device:
            fail(operator, argument, f"a tensor on {device} as '{first}' is", f"one on {tensor.device}")
        if not tensor.is_contiguous():
            fail(operator, argument, "a contiguous tensor", f"strides {tuple(tensor.stride())}")
    reason = why_not_tensor(tensors[first])
    if reason is not None:
        fail(operator, first, "a CUDA tensor", f"one on '{device.type}' ({reason})")


# --- launches


@dataclasses.dataclass(frozen=True)
class Launch:
    """A launch as it was asked for."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]  # constexpr parameters by name, and num_warps, num_stages


class _Recorder:
    def __init__(self, chip: Chip) -> None:
        self.chip = chip
        self.launches: list[Launch] = []


_recorder: _Recorder | None = None


@contextlib.contextmanager
def recorded(chip: Chip) -> Iterator[list[Launch]]:
    """Inside it, operators take meta tensors and their launches for `chip` are listed instead of run."""
    global _recorder
    previous, _recorder = _recorder, _Recorder(chip)
    try:
        yield _recorder.launches
    finally:
        _recorder = previous


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launches `kernel` on the current stream: positional arguments, constexpr parameters and options by name.

    An empty grid launches nothing. The caller holds `device_guard`.
    """
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, grid, arguments, constants))
    elif 0 in grid:
        return
    elif INTERPRETED:
        kernel[grid](*arguments, **constants)
    else:
        _launch(kernel, grid, arguments, constants)


def _form(argument: Any) -> Any:
    """What of an argument that is no tensor Triton compiles for: at least that."""
    kind = type(argument)
    if kind is int:
        # 1 and multiples of 16 may have code of their own, and what takes 64 bits has.
        return (argument == 1) | (argument & 15 == 0) << 1 | (argument >> 31 != 0) << 2
    if hasattr(argument, "block_shape"):  # a TensorDescriptor
        return kind, argument.base.dtype, tuple(argument.block_shape)
    return kind


_compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """As `kernel[grid]`, which needs 7 us more of the host's time to find out which compiled form of the kernel fits.

    A compiled form is launched with all the kernel's parameters, constants too, as Triton's tutorials do it.
    """
    device = triton.runtime.driver.active.get_current_device()
    key = [id(kernel), device, *constants, *constants.values()]
    addresses = 0
    for argument in arguments:  # inline: it is a third of a launch
        if argument is None:
            key.append(None)
        elif isinstance(argument, Tensor):
            key.append(argument.dtype)
            addresses |= argument.data_ptr()
        else:
            key.append(_form(argument))
    if addresses & 15:  # what is not aligned has code of its own: Triton finds it
        kernel[grid](*arguments, **constants, **OPTIONS)
        return
    found = _compiled.get(tuple(key))
    if found is not None:
        compiled, others = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *others)
        return
    compiled = kernel[grid](*arguments, **constants, **OPTIONS)
    if compiled is not None:  # a hook of Triton's may have compiled it elsewhere
        parameters = kernel.params[len(arguments) :]
        _compiled[tuple(key)] = compiled, tuple(constants.get(each.name, each.default) for each in parameters)


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: makes the tensor's device that."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


# --- rows


@functools.cache
def column_pieces(columns: int) -> tuple[int, int]:
    """Two powers of two, at least 16, that together hold `columns`; the second is 0 where one does.

    96 is 64 + 32, 192 is 128 + 64, 384 is 256 + 128: no matrix product is padded. Others are masked: 40 is 32 + 16.
    """
    first = max(16, 1 << (columns.bit_length() - 1))
    rest = columns - first
    return first, 0 if rest <= 0 else max(16, next_power_of_2(rest))


def tiles_of(count: int, size: int) -> int:
    """How many tiles of `size` hold `count`: triton.cdiv, which takes microseconds outside a kernel."""
    return -(-count // size)


def constants_of(chosen: Mapping[str, int], bounded: bool = True) -> dict[str, int]:
    """A configuration's constants for a launch. PROGRAMS is no kernel's parameter: with `bounded` it becomes the bound
    on a thread's registers with which so many blocks share a multiprocessor's 65536, given out by eights.

    No bound where a thread can have all of its 255.
    """
    constants = {name: value for name, value in chosen.items() if name != "PROGRAMS"}
    registers = 65536 // (32 * chosen["PROGRAMS"] * chosen["num_warps"]) // 8 * 8
    if bounded and registers < 256:
        constants["maxnreg"] = registers
    return constants


def next_power_of_2(count: int) -> int:
    """The least power of two that is no less than `count`: Triton's takes microseconds outside a kernel."""
    return 1 << (count - 1).bit_length()


def row_tiles(rows: int, rows_per_sample: int, block_m: int, per_sample: bool) -> int:
    """How many tiles device.tile_rows makes of `rows` rows."""
    if per_sample:
        return rows // rows_per_sample * tiles_of(rows_per_sample, block_m)
    return tiles_of(rows, block_m)


@triton.jit(do_not_specialize=["samples"])
def _sample_order_kernel(sample_scale, order, live_count, samples, BLOCK: tl.constexpr):
    live = 0
    for first in range(0, samples, BLOCK):
        sample = first + tl.arange(0, BLOCK)
        scale = tl.load(sample_scale + sample, mask=sample < samples, other=0.0)
        live += tl.sum((scale != 0).to(tl.int32), 0)
    tl.store(live_count, live)
    live_before = 0
    for first in range(0, samples, BLOCK):
        sample = first + tl.arange(0, BLOCK)
        inside = sample < samples
        is_live = (tl.load(sample_scale + sample, mask=inside, other=0.0) != 0).to(tl.int32)
        rank = live_before + tl.cumsum(is_live, 0) - is_live  # live samples before this one
        tl.store(order + tl.where(is_live != 0, rank, live + sample - rank), sample, mask=inside)
        live_before += tl.sum(is_live, 0)


def sample_order(sample_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The samples (N,) int32 in the order live ones, then dropped ones, each ascending; and how many live (1,) int32.

    Made on the device: nothing waits for it, and a captured graph makes it anew. Call it inside `device_guard`.
    """
    order = torch.empty(sample_scale.shape, dtype=torch.int32, device=sample_scale.device)
    live_count = torch.empty((1,), dtype=torch.int32, device=sample_scale.device)
    run(_sample_order_kernel, (1,), sample_scale, order, live_count, sample_scale.numel(), BLOCK=1024, num_warps=4)
    return order, live_count
