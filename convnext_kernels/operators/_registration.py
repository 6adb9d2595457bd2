"""How a raw operator of csrc/operators.cpp gets its fake implementation, its derivative and its backend."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import backends

__all__ = ["composed", "dense_channels_last", "differentiate", "differentiate_once", "fake"]

_library = torch.library.Library("convnext_kernels", "IMPL")


def composed(operator: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `function`, which calls other operators, run an operator on every device.

    Returns what `differentiate` takes: it runs `function` at once, or the operator itself where something is tracing.
    """
    _library.impl(operator, function, "CompositeExplicitAutograd")
    overload = getattr(torch.ops.convnext_kernels, operator).default

    def run(*arguments: Any) -> Any:
        if backends.are_plain(arguments):
            return function(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    return run


def fake(operator: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers the shape, stride and dtype rule of an operator, and the choice of the backend that runs it."""
    if operator in backends.OPERATORS:
        _library.impl(operator, backends.route(operator), "BackendSelect")
    return torch.library.register_fake(f"convnext_kernels::{operator}", lib=_library)


def dense_channels_last(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty (N, C, H, W) tensor whose memory runs N, H, W, C: what every operator returns.

    No permuted one: a view that an autograd.Function returns could not be changed in place.
    """
    n, c, h, w = shape
    return like.new_empty_strided((n, c, h, w), (h * w * c, 1, w * c, c), dtype=dtype)


def _requires_grad(arguments: tuple[Any, ...]) -> bool:
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return True
    return False


def _check_transforms(operator: str) -> None:
    # Functions that are applied below the dispatcher, as ours are, take no part in functorch's levels.
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"convnext_kernels::{operator}: derivatives by torch.func (grad, vjp, ...) are not supported; "
            "unfuse(model) first, or use convnext_kernels.reference"
        )


_ANY_ARGUMENTS = inspect.Signature([inspect.Parameter("arguments", inspect.Parameter.VAR_POSITIONAL)])


def _bind_nothing(function: type[torch.autograd.Function]) -> None:
    """`apply` binds the arguments to forward's signature at every call, for its defaults: 20 us where it has names.

    No forward of ours has defaults.
    """
    function.forward.__signature__ = _ANY_ARGUMENTS  # type: ignore[attr-defined]


def differentiate(operator: str, function: type[torch.autograd.Function], run: Callable[..., Any]) -> None:
    """A raw call on tensors that require grad goes through `function`; any other goes to `run`, below autograd."""
    _bind_nothing(function)

    def kernel(*arguments: Any) -> Any:
        _check_transforms(operator)
        return function.apply(*arguments) if _requires_grad(arguments) else run(*arguments)

    _library.impl(operator, kernel, "Autograd")


class _Once(torch.autograd.Function):
    """Runs a backward operator. Its own derivative raises, whatever the form of the double backward.

    `once_differentiable` would return None silently where the incoming gradient does not require grad (a loss that is
    linear in the output); here the edges to the saved tensors lead to the error.
    """

    @staticmethod
    def forward(operator: str, run: Callable[..., Any], *arguments: Any) -> Any:
        return run(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.operator = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f"convnext_kernels::{ctx.operator}: double backward is not supported (create_graph=True was followed by "
            "a derivative of the gradient); unfuse(model) first, or use convnext_kernels.reference"
        )


_bind_nothing(_Once)


def differentiate_once(operator: str, run: Callable[..., Any]) -> None:
    """For a backward operator: runs, and raises when it is differentiated itself."""

    def kernel(*arguments: Any) -> Any:
        _check_transforms(operator)
        return _Once.apply(operator, run, *arguments) if _requires_grad(arguments) else run(*arguments)

    _library.impl(operator, kernel, "Autograd")
