"""Finding out whether a module computes what its structure suggests.

Structure tells what a block is made of, not what its forward does with it. A trial tells that, whatever the library's
version: the module's own forward, on a small fp64 input with random parameters, against the reference. In fp64 the
differences that matter (eps, the form of GELU, a missing scale) stand far above rounding.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..operators._arguments import SUPPORTED_DTYPES
from ..parts import has_hooks, is_ordinary

__all__ = [
    "NotCoveredError",
    "agrees",
    "check_calls",
    "check_tensors",
    "gelu_form",
    "random_input",
    "random_twin",
    "try_forward",
]


class NotCoveredError(Exception):
    """A block or norm that stays as it is; the message is the reason."""


def check_calls(module: nn.Module, path: str) -> None:
    """Calling the submodule at `path` does no more than its class's forward."""
    if has_hooks(module):
        raise NotCoveredError(f"its '{path}' has hooks, or a forward assigned to the instance")


def check_tensors(module: nn.Module, expected: set[str]) -> None:
    """The parameters are among the expected ones, of ordinary type and supported dtype, on one device; no buffers."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    surplus = sorted((parameters.keys() | buffers.keys()) - expected)
    if surplus:
        raise NotCoveredError(f"it holds '{surplus[0]}', which has no place in a ConvNeXt's")
    for name, parameter in parameters.items():
        if not is_ordinary(type(parameter)):
            raise NotCoveredError(f"its '{name}' is a {type(parameter).__name__}, not an ordinary parameter")
        if parameter.dtype not in SUPPORTED_DTYPES:
            raise NotCoveredError(f"its '{name}' has dtype {parameter.dtype}")
    devices = sorted({str(parameter.device) for parameter in parameters.values()})
    if len(devices) > 1:
        raise NotCoveredError(f"its parameters are spread over {', '.join(devices)}")


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(2), dtype=torch.float64, device="cpu")


def random_twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU with random fp64 parameters of order 1; the original's are neither read nor copied."""
    generator = torch.Generator("cpu").manual_seed(3)
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 and parameter.shape[0] > 1 else 1
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64, device="cpu")
        memo[id(parameter)] = nn.Parameter(values / fan_in**0.5, requires_grad=False)
    for name, value in vars(module).items():
        if "_hooks" in name:
            # A hook may hold anything, the whole training loop included.
            memo[id(value)] = OrderedDict()
    return copy.deepcopy(module, memo).eval()


def try_forward(forward: Callable[[], Tensor]) -> Tensor:
    """Runs the trial without autograd or autocast; leaves the CPU's random generator as it was."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which reseeds every GPU too.
        torch.default_generator.manual_seed(4)
        try:
            return forward()
        except Exception as error:
            # Whatever a foreign forward raises is the reason to leave it alone.
            raise NotCoveredError(f"a trial of its forward failed: {type(error).__name__}: {error}") from error


def agrees(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    return bool((got - expected).abs().max() <= tolerance * expected.abs().max())


def gelu_form(act: nn.Module) -> str | None:
    """'none' or 'tanh' as in ``torch.nn.functional.gelu``; None where `act` computes something else."""
    x = torch.linspace(-20, 20, 801, dtype=torch.float64, device="cpu")
    y = try_forward(lambda: act(x.clone()))
    for form in ("none", "tanh"):
        if agrees(y, F.gelu(x, approximate=form)):
            return form
    return None
