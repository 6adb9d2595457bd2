"""How many floating-point operations the operators stand for: the formulas of PyTorch's ``FlopCounterMode``.

As there, a multiplication and an addition are two, and only convolutions and matrix products count. A backward pass
counts what its kernels do: the hidden tensor that is computed again too, as under activation checkpointing.
"""

from __future__ import annotations

import functools
import math
import sys
from typing import Any

import torch

from .operators.block import block_mask

__all__ = ["register", "register_if_used"]


def register_if_used() -> None:
    """:func:`register`, if the program has imported the counter."""
    if "torch.utils.flop_counter" in sys.modules:
        register()


@functools.cache
def register() -> None:
    """Gives the formulas to PyTorch, whose counter takes those it finds when it is made.

    Not done with this package's import: the counter's own imports Triton, which takes 90 ms.
    """
    from torch.utils.flop_counter import register_flop_formula

    for operator, formula in _FORMULAS.items():
        register_flop_formula(getattr(torch.ops.convnext_kernels, operator))(formula)


# Tensors arrive as their shapes, every other argument as it is.


def _taps(y: Any, kernel_size: int) -> int:
    """A depthwise convolution whose result has the shape y, or a gradient of one."""
    return 2 * math.prod(y) * kernel_size**2


def _convolution(x: Any, weight: Any, *_: Any, out_shape: Any) -> int:
    return _taps(out_shape, weight[-1])


def _of_first(first: Any, weight: Any, *_: Any, **__: Any) -> int:
    """Of an operator whose first argument has the shape of the convolution's result."""
    return _taps(first, weight[-1])


def _weight_grad(grad: Any, x: Any, kernel_size: int, *_: Any, **__: Any) -> int:
    return _taps(grad, kernel_size)


def _mlp(z: Any, residual: Any, norm_weight: Any, norm_bias: Any, fc1_weight: Any, *_: Any, **__: Any) -> int:
    return 2 * _product(z, fc1_weight)


def _mlp_backward(
    grad: Any, z: Any, mean: Any, rstd: Any, hidden: Any, norm_weight: Any, norm_bias: Any, fc1_weight: Any, *rest: Any,
    **_: Any,
) -> int:  # fmt: skip
    return _mlp_grad_products(hidden, rest[8]) * _product(z, fc1_weight)


def _block(
    x: Any, conv_weight: Any, conv_bias: Any, norm_weight: Any, norm_bias: Any, fc1_weight: Any, *_: Any, **__: Any
) -> int:
    return _taps(x, conv_weight[-1]) + 2 * _product(x, fc1_weight)


def _block_backward(
    grad: Any, x: Any, z: Any, mean: Any, rstd: Any, hidden: Any, conv_weight: Any, norm_weight: Any, norm_bias: Any,
    fc1_weight: Any, *rest: Any, **_: Any,
) -> int:  # fmt: skip
    needs_x, needs_conv, mlp_mask = block_mask(rest[9])
    convolutions, products = bool(needs_x) + bool(needs_conv), _mlp_grad_products(hidden, mlp_mask)
    return convolutions * _taps(x, conv_weight[-1]) + products * _product(x, fc1_weight)


def _product(x: Any, fc1_weight: Any) -> int:
    """One of the MLP's products, of the rows of C elements that x has and a (K, C) or (C, K) matrix."""
    return 2 * math.prod(x) * fc1_weight[0]


def _mlp_grad_products(hidden: Any, output_mask: int) -> int:
    """How many of them the backward pass is, where the bits of the mask ask for gradients."""
    z, norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, _, layer_scale = (
        bool(output_mask >> bit & 1) for bit in range(10)
    )
    grad_fc1, grad_fc2 = fc1_weight or norm_weight, fc2_weight or layer_scale
    grad_activated = z or grad_fc1 or norm_bias or fc1_bias or grn_weight or grn_bias
    recomputed = len(hidden) == 1 and (grad_activated or grad_fc2)
    return recomputed + grad_activated + z + grad_fc1 + grad_fc2


_FORMULAS = {
    "depthwise_conv2d": _convolution,
    "depthwise_conv2d_cast": _of_first,
    "depthwise_conv2d_input_grad": _of_first,
    "depthwise_conv2d_weight_grad": _weight_grad,
    "layer_norm_mlp": _mlp,
    "layer_norm_mlp_backward": _mlp_backward,
    "convnext_block": _block,
    "convnext_block_backward": _block_backward,
}
