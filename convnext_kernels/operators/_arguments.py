"""Checks shared by the public functions. Every message names the operator, the argument, what was expected and got."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..reference_backend import accumulation_dtype

__all__ = [
    "SUPPORTED_DTYPES",
    "autocast_dtype",
    "check_approximate",
    "check_bias_dtype",
    "check_device",
    "check_dtypes",
    "check_eps",
    "check_image",
    "check_shape",
    "check_tensor",
    "wrong_type",
    "wrong_value",
]

SUPPORTED_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def _message(operator: str, argument: str, expected: str, got: Any) -> str:
    return f"{operator}: argument '{argument}': expected {expected}, got {got}"


def wrong_value(operator: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(_message(operator, argument, expected, got))


def wrong_type(operator: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise TypeError(_message(operator, argument, expected, got))


def check_tensor(operator: str, argument: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        wrong_type(operator, argument, "a torch.Tensor", type(value).__name__)
    if value.dtype not in SUPPORTED_DTYPES:
        wrong_type(operator, argument, "dtype float32, float64, float16 or bfloat16", value.dtype)
    if value.layout is not torch.strided:
        wrong_type(operator, argument, "a dense tensor (layout torch.strided)", value.layout)


def check_image(operator: str, argument: str, value: Any) -> None:
    """A batch of feature maps (N, C, H, W) with C, H, W >= 1."""
    check_tensor(operator, argument, value)
    if value.dim() != 4:
        wrong_value(operator, argument, "a tensor of rank 4 (N, C, H, W)", f"shape {tuple(value.shape)}")
    if value.shape[1] == 0 or value.shape[2] == 0 or value.shape[3] == 0:
        wrong_value(operator, argument, "C, H and W of at least 1", f"shape {tuple(value.shape)}")


def check_shape(operator: str, argument: str, value: Tensor | None, shape: tuple[int, ...]) -> None:
    if value is None:
        return
    check_tensor(operator, argument, value)
    if value.shape != shape:
        wrong_value(operator, argument, f"shape {tuple(shape)}", f"shape {tuple(value.shape)}")


def check_bias_dtype(operator: str, argument: str, value: Tensor | None, x: Tensor) -> None:
    """x's dtype, or that of its sums."""
    wanted = dict.fromkeys((x.dtype, accumulation_dtype(x.dtype)))
    if value is not None and value.dtype not in wanted:
        wrong_type(operator, argument, f"dtype {' or '.join(map(str, wanted))}", value.dtype)


def check_device(operator: str, like: Tensor, **others: Tensor | None) -> None:
    for argument, value in others.items():
        if value is not None and value.device != like.device:
            wrong_value(operator, argument, f"a tensor on {like.device} as the input is", f"one on {value.device}")


def check_dtypes(operator: str, dtype: torch.dtype, autocast: bool, **others: Tensor | None) -> None:
    """Parameters have the input's dtype; under autocast any but fp64, as the input there is cast."""
    for argument, value in others.items():
        if value is None or value.dtype == dtype:
            continue
        if not autocast or torch.float64 in (value.dtype, dtype):
            wrong_type(operator, argument, f"dtype {dtype} as the input has (no autocast is active)", value.dtype)


def check_eps(operator: str, eps: float) -> None:
    if not isinstance(eps, (int, float)):
        wrong_type(operator, "eps", "a number", type(eps).__name__)
    if not eps >= 0:
        wrong_value(operator, "eps", "a number of at least 0", eps)


def check_approximate(operator: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        wrong_value(operator, "approximate", "'none' or 'tanh'", repr(approximate))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in for `x`, or None where it is not active or leaves `x` alone (fp64)."""
    device_type = x.device.type
    if x.dtype == torch.float64 or device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)
