"""The numerics rule: how wrong a result in a low precision may be.

An operator's root-mean-square error against fp64 may be twice that of PyTorch's own kernels for the same computation in
the same precision, plus a floor for rounding; where there are more than 100 numbers, the largest error likewise. The
floor is what the exact result moves by when each input number moves by a few roundings of the accumulation type: no
algorithm that accumulates in that type can promise less. In fp64 PyTorch's result is the exact one, roundings and all,
so that only the floor is left, and it is wider.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Verdict", "judge", "nudged"]

_TIMES_PYTORCH = 2.0
_ROUNDINGS = 4.0
_ROUNDINGS_FP64 = 40.0
_MAXIMUM_COUNTS_ABOVE = 100


@dataclass(frozen=True)
class Verdict:
    """An error and what was allowed: root mean square, then maximum (infinite where the maximum does not count)."""

    error: float
    pytorch_error: float
    allowed: float
    maximum: float
    maximum_allowed: float

    @property
    def share(self) -> float:
        """The error as a share of the allowed: at most 1 is right, infinity stands for NaN too."""
        return max(_share(self.error, self.allowed), _share(self.maximum, self.maximum_allowed))

    @property
    def ok(self) -> bool:
        return self.share <= 1.0


def _share(error: float, allowed: float) -> float:
    if error == 0.0:
        return 0.0
    share = error / allowed if allowed > 0.0 else math.inf
    return math.inf if math.isnan(share) else share


def nudged(tensor: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """The fp64 `tensor`, each number moved up or down by a rounding of the type in which `dtype` accumulates."""
    epsilon = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    signs = torch.randint(0, 2, tensor.shape, generator=generator, dtype=tensor.dtype).mul_(2).sub_(1)
    return tensor + tensor * signs.to(tensor.device) * (epsilon / 2)


def judge(ours: Tensor, pytorch: Tensor, exact: Tensor, exact_nudged: Tensor) -> Verdict:
    """Applies the rule to one result; `exact_nudged` is the exact result of nudged inputs. Empty results are right."""
    if ours.shape != exact.shape:
        raise ValueError(f"expected a result of shape {tuple(exact.shape)}, got {tuple(ours.shape)}")
    mine, theirs, floor = ((t.double() - exact).abs() for t in (ours, pytorch, exact_nudged))
    roundings = _ROUNDINGS_FP64 if pytorch.dtype == torch.float64 else _ROUNDINGS

    def allowed(measure: Tensor, rounding: Tensor) -> float:
        return _TIMES_PYTORCH * float(measure) + roundings * float(rounding)

    def rms(t: Tensor) -> Tensor:
        return t.square().mean().sqrt() if t.numel() else t.new_zeros(())

    if exact.numel() > _MAXIMUM_COUNTS_ABOVE:
        maximum, maximum_allowed = float(mine.max()), allowed(theirs.max(), floor.max())
    else:
        maximum, maximum_allowed = 0.0, math.inf
    return Verdict(float(rms(mine)), float(rms(theirs)), allowed(rms(theirs), rms(floor)), maximum, maximum_allowed)
