"""Several tensors cast at once: on a GPU `to` is a launch for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends

__all__ = ["cast"]


def cast(tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]) -> list[Any]:
    """Each tensor in its dtype, as `to` gives it; in one launch where all that change have one dtype, and one after.

    None stays None.
    """
    results: list[Any] = list(tensors)
    others = [i for i, tensor in enumerate(tensors) if tensor is not None and tensor.dtype != dtypes[i]]
    before = [results[i] for i in others]
    # Of several pairs of dtypes PyTorch casts one by one too. What is differentiated needs a derivative, and
    # _foreach_copy_ has none.
    one_pair = len({(results[i].dtype, dtypes[i]) for i in others}) == 1
    if one_pair and backends.are_plain(tuple(before)) and not _differentiated(before):
        after = [torch.empty_like(tensor, dtype=dtypes[i]) for i, tensor in zip(others, before)]
        torch._foreach_copy_(after, before)
    else:
        after = [tensor.to(dtypes[i]) for i, tensor in zip(others, before)]
    for i, tensor in zip(others, after):
        results[i] = tensor
    return results


def _differentiated(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
