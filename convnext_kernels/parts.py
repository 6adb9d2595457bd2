"""Whether a block's parts still compute what its fused operator does in their place, without calling them."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

__all__ = ["find_subclass", "has_hooks", "is_ordinary", "is_traced", "log_once", "log_unfused"]

logger = logging.getLogger("convnext_kernels")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward: hooks, or a forward assigned to the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


_ORDINARY_TYPES = frozenset((Tensor, nn.Parameter, type(None)))
_ORDINARY_FUNCTIONS = (Tensor.__torch_function__.__func__, nn.Parameter.__torch_function__)


def is_ordinary(cls: type) -> bool:
    """Whether tensors of the class are what an operator takes: values, or what stands for them while tracing."""
    if cls in _ORDINARY_TYPES or cls in (FakeTensor, FunctionalTensor):
        return True
    function = getattr(cls.__torch_function__, "__func__", cls.__torch_function__)
    return cls.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in _ORDINARY_FUNCTIONS


def find_subclass(*tensors: Tensor | None, in_call: bool = True) -> str | None:
    """A parameter that computes in its own way, a quantised one for instance, as a reason to run unfused.

    Outside of a call no DTensor is one: FSDP puts an ordinary parameter in its place for the call.
    """
    for tensor in tensors:
        cls = type(tensor)
        if cls not in _ORDINARY_TYPES and not is_ordinary(cls) and (in_call or cls.__name__ != "DTensor"):
            return f"it holds a {cls.__name__}, not an ordinary parameter"
    return None


def log_unfused(module: nn.Module, reason: str) -> None:
    """Once for each class and reason; not while a compiler is looking, which could not."""
    if not torch.compiler.is_compiling():
        log_once(type(module).__name__, reason)


@functools.cache
def log_once(name: str, reason: str) -> None:
    logger.warning("%s runs unfused: %s", name, reason)


def is_traced(x: Tensor) -> bool:
    """Whether a graph for elsewhere is being recorded: ONNX, torch.jit.trace, torch.fx.

    It shall hold PyTorch's own operators, so a block calls its parts. (torch.export records our operators; unfuse for a
    graph without them.)
    """
    return torch.onnx.is_in_onnx_export() or torch.jit.is_tracing() or isinstance(x, torch.fx.Proxy)
