"""Operators as providers, and what all providers share."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import convnext_kernels as ck
from convnext_kernels.cli.measure import peak_growth

from .cases import MLP_RATIO, PRECISIONS, BlockCase, Case, OperatorCase
from .comparison import CheckedRunner, Provider, Results, Unavailable
from .timing import cache_bytes

EPS = 1e-6
SEED = 2301
MOST_SETS = 32
MOST_SET_BYTES = 1 << 30  # of all rotating inputs together


def imported(module: str) -> Any:
    try:
        return __import__(module, fromlist=["_"])
    except ImportError as error:
        raise Unavailable(f"{module} is not installed ({error})") from None


def compiled(function: Callable[..., Any], device: torch.device, mode: str | None) -> Callable[..., Any]:
    """torch.compile for the shapes at hand, in this process and without its cache of earlier ones."""
    if device.type == "cpu" and not any(shutil.which(c) for c in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise Unavailable("torch.compile needs a C++ compiler on a CPU, and there is none")
    return torch.compile(function, mode=mode, dynamic=False)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(SEED)


def number_of_sets(bytes_of_a_set: int, device: torch.device) -> int:
    """Input sets to rotate through, so that none is in the cache when its turn comes."""
    wanted = math.ceil(2 * cache_bytes(device) / bytes_of_a_set)
    return max(1, min(wanted, MOST_SETS, MOST_SET_BYTES // bytes_of_a_set))


def randomise(module: nn.Module) -> nn.Module:
    """Weights under which every parameter matters: a layer scale of 1e-6 would hide a wrong branch."""
    random = generator()
    for name, parameter in module.named_parameters():
        values = torch.randn(parameter.shape, generator=random)
        if parameter[0].numel() > 1 and "grn" not in name:
            values *= parameter[0].numel() ** -0.5
        else:
            # A norm's weight, as any vector of that name is here, and the layer scale are near 1, all others near 0.
            scale = name.endswith((".weight", "gamma", "layer_scale")) and "grn" not in name
            values = 0.2 * values + (1.0 if scale else 0.0)
        with torch.no_grad():
            parameter.copy_(values)
    return module


def forward_in(precision: str, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    autocast = PRECISIONS[precision].autocast
    if autocast is None:
        return run(x)
    with torch.autocast(x.device.type, autocast):
        return run(x)


class InBackend(CheckedRunner):
    """A runner of ours with a backend forced on it, in the backward pass too."""

    def __init__(self, runner: CheckedRunner, backend: str) -> None:
        self._runner, self._backend = runner, backend
        self.images, self.exact, self.eager = runner.images, runner.exact, runner.eager
        self.capturable = runner.capturable

    def _chosen(self) -> contextlib.AbstractContextManager[None]:
        return ck.use_backend(self._backend)

    def run(self, call: int) -> None:
        with self._chosen():
            self._runner.run(call)

    def results(self) -> Results:
        with self._chosen():
            return self._runner.results()

    def memory(self) -> dict[str, Any]:
        with self._chosen():
            return self._runner.memory()


def in_gpu_backends(
    build: Callable[[Case, torch.device], CheckedRunner], covers: Callable[[Case, str, bool], bool] = lambda *_: True
) -> list[Provider]:
    """Ours with each backend that a GPU has: `auto` takes one of them, operator by operator."""

    def forced(backend: str) -> Provider:
        return Provider(
            f"ours-{backend}",
            "ours",
            lambda case, device: InBackend(build(case, device), backend),
            lambda case, device_type, full: device_type == "cuda" and covers(case, device_type, full),
            f"backend='{backend}'",
        )

    return [forced("cuda"), forced("triton")]


# --- operators


@functools.lru_cache(maxsize=1)  # for all providers of a case
def _operator_arguments(case: OperatorCase, device: torch.device) -> tuple[list[Tensor | None], Tensor]:
    """The operator's arguments, activations first, and the gradient of its result. Channels-last; not to be changed."""
    random = generator()
    dtype = PRECISIONS[case.precision].stored
    c, k, side = case.channels, MLP_RATIO * case.channels, case.side

    def normal(*shape: int, mean: float = 0.0, scale: float = 1.0) -> Tensor:
        return (mean + scale * torch.randn(shape, generator=random)).to(device, dtype)

    def parameters() -> list[Tensor | None]:
        if case.operator == "depthwise_conv2d":
            return [normal(c, 1, 7, 7, scale=1 / 7), normal(c)]
        if case.operator == "layer_norm":
            return [normal(c, mean=1, scale=0.2), normal(c)]
        if case.operator == "bias_gelu":
            return [normal(k)]
        grn = [normal(k, scale=0.2), normal(k, scale=0.2)] if case.version == "v2" else [None, None]
        scale = None if case.version == "v2" else normal(c, mean=1, scale=0.2)
        norm = [normal(c, mean=1, scale=0.2), normal(c, scale=0.2)]
        first, second = [normal(k, c, scale=c**-0.5), normal(k)], [normal(c, k, scale=k**-0.5), normal(c)]
        return [*norm, *first, *grn, *second, scale]

    width = k if case.operator == "bias_gelu" else c
    shape = (case.batch, side, side, width)
    activations = [normal(*shape) for _ in range(2 if case.operator == "layer_norm_mlp" else 1)]
    grad = normal(*shape)
    if case.operator == "depthwise_conv2d":
        activations, grad = [t.permute(0, 3, 1, 2) for t in activations], grad.permute(0, 3, 1, 2)
    return [*activations, *parameters()], grad


class OperatorRunner(CheckedRunner):
    """Forward, or backward over graphs that are there already, one for each of the rotating inputs."""

    capturable = True

    def __init__(
        self,
        case: OperatorCase,
        device: torch.device,
        function: Callable[..., Tensor],
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> None:
        self._case, self._device, self._function, self._format = case, device, function, memory_format
        self.images = case.batch
        self._sets = [self._set() for _ in range(number_of_sets(case.work().bytes, device))]

    def _set(self) -> tuple[list[Tensor | None], Tensor]:
        """The same numbers every time, in memory of their own."""
        arguments, grad = _operator_arguments(self._case, self._device)
        backward = self._case.task == "backward"
        copies = [None if a is None else self._copy(a).requires_grad_(backward) for a in arguments]
        return copies, self._copy(grad)

    def _copy(self, tensor: Tensor) -> Tensor:
        return tensor.clone(memory_format=self._format)

    @functools.cached_property
    def _graphs(self) -> list[tuple[Tensor, list[Tensor], Tensor]]:
        return [
            (self._function(*arguments), [a for a in arguments if a is not None], grad)
            for arguments, grad in self._sets
        ]

    def run(self, call: int) -> None:
        if self._case.task == "backward":
            y, leaves, grad = self._graphs[call % len(self._sets)]
            torch.autograd.grad(y, leaves, grad, retain_graph=True)
        else:
            with torch.no_grad():
                self._function(*self._sets[call % len(self._sets)][0])

    def results(self) -> Results:
        return _operator_results(self._function, *self._set())

    def exact(self) -> Results:
        return _exact_operator(self._case, self._device)

    def eager(self) -> Results:
        return _operator_results(getattr(ck.reference, self._case.operator), *self._set())

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": peak_growth(lambda: self.run(0), self._device)}


def _operator_results(function: Callable[..., Tensor], arguments: list[Tensor | None], grad: Tensor) -> Results:
    y = function(*arguments)
    leaves = {f"grad of argument {i}": a for i, a in enumerate(arguments) if a is not None and a.requires_grad}
    if not leaves:
        return {"output": y}
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad), strict=True))


@functools.lru_cache(maxsize=1)  # for all providers of a case
def _exact_operator(case: OperatorCase, device: torch.device) -> Results:
    arguments, grad = _operator_arguments(case, device)
    backward = case.task == "backward"
    arguments = [None if a is None else a.double().requires_grad_(backward) for a in arguments]
    return _operator_results(getattr(ck.reference, case.operator), arguments, grad.double())


def _our_operator(case: OperatorCase, device: torch.device) -> OperatorRunner:
    return OperatorRunner(case, device, getattr(ck, case.operator))


def _reference_operator(case: OperatorCase, device: torch.device) -> OperatorRunner:
    return OperatorRunner(case, device, getattr(ck.reference, case.operator))


def _nchw_operator(case: OperatorCase, device: torch.device) -> OperatorRunner:
    return OperatorRunner(case, device, getattr(ck.reference, case.operator), memory_format=torch.contiguous_format)


def _compiled_operator(mode: str | None) -> Callable[..., OperatorRunner]:
    def build(case: OperatorCase, device: torch.device) -> OperatorRunner:
        # The backward pass runs over the same graph again and again: its buffers must not be given away.
        torch._functorch.config.donated_buffer = False
        return OperatorRunner(case, device, compiled(getattr(ck.reference, case.operator), device, mode))

    return build


def _liger_operator(case: OperatorCase, device: torch.device) -> OperatorRunner:
    layer_norm = imported("liger_kernel.ops.layer_norm").LigerLayerNormFunction
    return OperatorRunner(case, device, lambda x, weight, bias: layer_norm.apply(x, weight, bias, EPS))


def compiled_here(case: Case, device_type: str, full: bool) -> bool:
    """Compiling takes long on a CPU: there, where not everything is asked for, one stage stands for all."""
    if full or device_type == "cuda":
        return True
    return isinstance(case, BlockCase) and case.channels == 384 and case.precision == "autocast-bf16"


class InVersion(InBackend):
    """The CUDA depthwise convolution by one of its two versions, in the backward pass too."""

    VARIABLE = "CONVNEXT_KERNELS_DEPTHWISE_CONV"

    def __init__(self, runner: CheckedRunner, version: str) -> None:
        super().__init__(runner, "cuda")
        self._version = version

    @contextlib.contextmanager
    def _chosen(self) -> Iterator[None]:
        before = os.environ.get(self.VARIABLE)
        os.environ[self.VARIABLE] = self._version
        try:
            with super()._chosen():
                yield
        finally:
            os.environ.pop(self.VARIABLE)
            if before is not None:
                os.environ[self.VARIABLE] = before


def _has_versions(case: Case, device_type: str, full: bool) -> bool:
    return device_type == "cuda" and case.operator == "depthwise_conv2d" and case.precision == "pure-bf16"


def _in_version(version: str, note: str) -> Provider:
    return Provider(
        f"ours-{version}",
        "ours",
        lambda case, device: InVersion(_our_operator(case, device), version),
        _has_versions,
        note,
    )


OPERATOR_PROVIDERS = [
    Provider("ours", "ours", _our_operator),
    *in_gpu_backends(_our_operator),
    _in_version("fma", "version 1: fp32 arithmetic"),
    _in_version("tensor", "version 2: tensor cores"),
    Provider("eager", "eager", _reference_operator, note="channels-last"),
    Provider("eager-nchw", "eager", _nchw_operator, lambda case, *_: case.operator == "depthwise_conv2d"),
    Provider(
        "compile",
        "other",
        _compiled_operator(None),
        lambda case, *rest: compiled_here(case, *rest) and case.operator in ("layer_norm_mlp", "layer_norm"),
    ),
    Provider(
        "max-autotune",
        "other",
        _compiled_operator("max-autotune-no-cudagraphs"),
        lambda case, device_type, full: device_type == "cuda" and case.operator == "layer_norm_mlp",
    ),
    Provider(
        "liger",
        "other",
        _liger_operator,
        lambda case, device_type, full: device_type == "cuda" and case.operator == "layer_norm",
    ),
]
