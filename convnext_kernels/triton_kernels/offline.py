"""What would be launched, compiled without launching it: for a chip that is not here, or by several processes at once.

A launch recorded on meta tensors (:func:`.launch.recorded`) becomes what Triton's just-in-time compiler makes of the
same launch on real ones, under the same key of Triton's cache on disk: a later launch finds it there. For that it takes
the compiler's own steps up to where that would ask for the GPU at hand (``JITFunction.run`` of Triton 3.6 to 3.8).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from .launch import OPTIONS, Launch

__all__ = ["Specialised", "compile_launch", "specialised"]


class Specialised(NamedTuple):
    """What of a launch's arguments the code depends on, by the names and positions of the kernel's parameters."""

    signature: dict[str, str]  # types; constants are 'constexpr'
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]  # of which numbers and addresses are multiples of 16
    options: dict[str, Any]  # warps, stages and the like


@functools.cache
def _target(capability: int) -> tuple[GPUTarget, Any]:
    target = GPUTarget("cuda", capability, 32)
    return target, make_backend(target)


@functools.cache
def _binder(kernel: Any, capability: int) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, _target(capability)[1])


def specialised(launch: Launch, capability: int) -> Specialised:
    """What Triton's launcher derives from a launch for sm_`capability`.

    A meta tensor has the address 0: tensors are taken to start at a multiple of 16 bytes, as PyTorch allocates them.
    """
    kernel, backend = launch.kernel, _target(capability)[1]
    named = {
        **launch.constants,
        **OPTIONS,
        "debug": kernel.debug or triton.knobs.runtime.debug,
        "instrumentation_mode": triton.knobs.compilation.instrumentation_mode,
    }
    bound, specialisation, options = _binder(kernel, capability)(*launch.arguments, **named)
    options, signature, constants, attributes = kernel._pack_args(backend, named, bound, specialisation, options)
    return Specialised(signature, constants, attributes, vars(options))


def compile_launch(launch: Launch, capability: int) -> Any:
    """A recorded launch, compiled for sm_`capability`: Triton's CompiledKernel."""
    found = specialised(launch, capability)
    source = ASTSource(launch.kernel, found.signature, found.constants, found.attributes)
    return triton.compile(source, target=_target(capability)[0], options=found.options)
