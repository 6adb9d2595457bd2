"""Triton kernels: one function an operator, with the signature and the results of the raw operator it implements.

They run on CUDA tensors of fp32, fp16 and bf16 (and on CPU tensors in Triton's interpreter, where TRITON_INTERPRET=1
was set before this package was imported). layer_norm_mlp and its backward take C and K in multiples of 8. `why_not`
says beforehand what they cannot take; only more rows than `launch.MOST_ROWS` are refused by the call itself.

This module imports Triton: `convnext_kernels.backends` imports it when it is first needed.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from .launch import why_not_tensor

__all__ = ["OPERATORS", "implementation", "why_not"]

#: The module that implements an operator of csrc/operators.cpp, as a function of the operator's name. A module may
#: have a function `why_not(operator, *arguments)` of its own for what `why_not_tensor` does not see.
OPERATORS: dict[str, str] = {
    "depthwise_conv2d": "depthwise_conv",
    "depthwise_conv2d_cast": "depthwise_conv",
    "depthwise_conv2d_input_grad": "depthwise_conv",
    "depthwise_conv2d_weight_grad": "depthwise_conv",
    "layer_norm": "layer_norm",
    "layer_norm_backward": "layer_norm",
    "bias_gelu": "bias_gelu",
    "bias_gelu_backward": "bias_gelu",
    "layer_norm_mlp": "mlp_forward",
    "layer_norm_mlp_backward": "mlp_backward",
}


@functools.cache
def _module(operator: str) -> Any:
    return importlib.import_module("." + OPERATORS[operator], __name__)


@functools.cache
def implementation(operator: str) -> Callable[..., Any]:
    """The function that runs an operator of OPERATORS."""
    return getattr(_module(operator), operator)


def why_not(operator: str, *arguments: Any) -> str | None:
    """Why the Triton kernels cannot run a raw operator on these arguments; None where they can.

    As the choice is made once for a dtype of the first tensor, the others' do not count: the operator itself refuses
    what it cannot take of them, by the argument's name.
    """
    if operator not in OPERATORS:
        return f"there is no Triton kernel for {operator}"
    reason = why_not_tensor(arguments[0])
    if reason is not None:
        return reason
    own = getattr(_module(operator), "why_not", None)
    return None if own is None else own(operator, *arguments)
