"""Blocks as providers: ours, the official one, timm's, torchvision's, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import convnext_kernels as ck
from convnext_kernels.cli.measure import peak_growth, saved_bytes

from .cases import PRECISIONS, BlockCase
from .comparison import CheckedRunner, Provider, Results
from .providers import (
    SEED,
    InBackend,
    compiled,
    compiled_here,
    forward_in,
    generator,
    imported,
    in_gpu_backends,
    number_of_sets,
    randomise,
)

#: The names that other libraries give to the official block's parameters.
TIMM_NAMES = {
    "conv_dw": "dwconv",
    "norm": "norm",
    "mlp.fc1": "pwconv1",
    "mlp.fc2": "pwconv2",
    "mlp.grn.weight": "grn.gamma",
    "mlp.grn.bias": "grn.beta",
    "gamma": "gamma",
}
TORCHVISION_NAMES = {
    "block.0": "dwconv",
    "block.2": "norm",
    "block.3": "pwconv1",
    "block.5": "pwconv2",
    "layer_scale": "gamma",
}


def official_name(name: str, names: dict[str, str]) -> str:
    for theirs, official in names.items():
        if name == theirs:
            return official
        if name.startswith(theirs + "."):
            return official + name[len(theirs) :]
    raise KeyError(name)


class DrawnIn(nn.Module):
    """Drop path for the fp64 block: drops the samples that a block of another dtype drops from the same seed."""

    def __init__(self, drop_prob: float, dtype: torch.dtype) -> None:
        super().__init__()
        self._keep, self._dtype = 1 - drop_prob, dtype

    def forward(self, x: Tensor) -> Tensor:
        kept = x.new_empty((x.shape[0], 1, 1, 1), dtype=self._dtype).bernoulli_(self._keep)
        return x * (kept / self._keep).to(x.dtype)


def official_block(case: BlockCase, device: torch.device) -> nn.Module:
    """The reference block with the parameters that every provider of the case gets."""
    block = ck.ReferenceConvNeXtBlock(case.channels, case.drop_path, use_grn=case.version == "v2")
    return randomise(block).to(device, PRECISIONS[case.precision].stored).train(case.task == "training")


def block_inputs(case: BlockCase, device: torch.device) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the output."""
    random = generator()
    shape, dtype = (case.batch, case.channels, case.side, case.side), PRECISIONS[case.precision].stored
    x, grad = (torch.randn(shape, generator=random).to(device, dtype) for _ in range(2))
    return x, grad


class BlockRunner(CheckedRunner):
    """A block: an inference, or a training step with the gradients of the input and every parameter.

    Args:
        build: makes the block; its parameters are overwritten.
        names: how the block's parameters are called, and how officially.
        execute: what runs the block: itself, or a compiled form of it.
    """

    def __init__(
        self,
        case: BlockCase,
        device: torch.device,
        build: Callable[[], nn.Module],
        names: dict[str, str] | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        execute: Callable[[nn.Module], Callable[[Tensor], Tensor]] = lambda block: block,
    ) -> None:
        self._case, self._device = case, device
        self.images = case.batch
        training = case.task == "training"
        self._block = build().to(device, PRECISIONS[case.precision].stored).train(training)
        parameters = dict(self._block.named_parameters())
        self._names = {name: official_name(name, names) if names else name for name in parameters}
        values = dict(official_block(case, device).named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(values[self._names[name]].reshape(parameter.shape))
        self._parameters = list(parameters.values())
        self._run = execute(self._block)
        self._is_eager = self._run is self._block
        # The same numbers in every set, in memory of their own.
        inputs = [tensor.contiguous(memory_format=memory_format) for tensor in block_inputs(case, device)]
        size = case.elements * PRECISIONS[case.precision].stored.itemsize * (4 if training else 2)
        self._sets = []
        for _ in range(number_of_sets(size, device)):
            x, grad = (tensor.clone() for tensor in inputs)
            self._sets.append((x.requires_grad_(training), grad))

    def run(self, call: int) -> None:
        x, grad = self._sets[call % len(self._sets)]
        if self._case.task == "inference":
            with torch.inference_mode():
                forward_in(self._case.precision, self._run, x)
            return
        x.grad = None
        for parameter in self._parameters:
            parameter.grad = None
        forward_in(self._case.precision, self._run, x).backward(grad)

    def results(self) -> Results:
        return _block_results(self._case, self._block, self._run, *self._sets[0], self._names)

    def exact(self) -> Results:
        case = self._case
        if PRECISIONS[case.precision].stored == torch.float32 and not case.drop_path:
            case = replace(case, precision="fp32")  # the same numbers come in: found in the cache
        return _exact_block(case, self._device)

    def eager(self) -> Results:
        block = official_block(self._case, self._device)
        return _block_results(self._case, block, block, *self._sets[0])

    def memory(self) -> dict[str, Any]:
        self._clear()
        out: dict[str, Any] = {"peak_bytes": peak_growth(lambda: self.run(0), self._device)}
        self._clear()
        if self._case.task == "training":
            batch, half = self._case.batch, self._case.batch // 2
            out["saved_bytes"] = total = self._saved(batch)
            # From what half the batch does not keep: casts of the weights are kept once, whatever the batch. What is
            # compiled would be compiled again for another batch.
            if half and self._is_eager:
                growth = (total - self._saved(half)) / (batch - half)
                out["saved_bytes_an_element"] = growth * batch / self._case.elements
        return out

    def _clear(self) -> None:
        for tensor in (*(x for x, _ in self._sets), *self._parameters):
            tensor.grad = None

    def _saved(self, batch: int) -> int:
        x = self._sets[0][0].detach()[:batch].clone(memory_format=torch.preserve_format).requires_grad_()
        torch.manual_seed(SEED)
        return saved_bytes(lambda: forward_in(self._case.precision, self._run, x), self._parameters)


def _block_results(
    case: BlockCase, block: nn.Module, run: Any, x: Tensor, grad: Tensor, names: dict[str, str] | None = None
) -> Results:
    """The branch's output, as the residual would hide a wrong branch, and every gradient under its official name."""
    torch.manual_seed(SEED)
    if case.task == "inference":
        with torch.inference_mode():
            return {"branch": forward_in(case.precision, run, x) - x}
    x = x.detach().requires_grad_()
    block.zero_grad(set_to_none=True)
    y = forward_in(case.precision, run, x)
    y.backward(grad.to(y.dtype))
    out = {"branch": y.detach() - x.detach(), "grad x": x.grad - grad}
    for name, parameter in block.named_parameters():
        out[f"grad {names[name] if names else name}"] = parameter.grad.flatten()
    block.zero_grad(set_to_none=True)
    return out


@functools.lru_cache(maxsize=1)  # for all providers of a case
def _exact_block(case: BlockCase, device: torch.device) -> Results:
    block = official_block(case, device).double()
    if case.drop_path:
        stored, computed = PRECISIONS[case.precision]
        # Eager draws in the dtype of the branch, which layer scale promotes and GRN does not.
        drawn = computed if case.version == "v2" else torch.promote_types(stored, computed)
        block.drop_path = DrawnIn(case.drop_path, drawn)
    x, grad = (tensor.double() for tensor in block_inputs(case, device))
    return _block_results(replace(case, precision="fp32"), block, block, x, grad)


def _our_block(case: BlockCase, device: torch.device, recompute: bool = True) -> BlockRunner:
    return BlockRunner(
        case,
        device,
        lambda: ck.FusedConvNeXtBlock(case.channels, case.drop_path, use_grn=case.version == "v2", recompute=recompute),
    )


def _eager_block(case: BlockCase, device: torch.device, **how: Any) -> BlockRunner:
    def build() -> nn.Module:
        return ck.ReferenceConvNeXtBlock(case.channels, case.drop_path, use_grn=case.version == "v2")

    return BlockRunner(case, device, build, **how)


def _timm_block(case: BlockCase, device: torch.device, **how: Any) -> BlockRunner:
    block = functools.partial(
        imported("timm.models.convnext").ConvNeXtBlock,
        case.channels,
        drop_path=case.drop_path,
        use_grn=case.version == "v2",
        ls_init_value=None if case.version == "v2" else 1e-6,
    )
    return BlockRunner(case, device, block, TIMM_NAMES, **how)


def _torchvision_block(case: BlockCase, device: torch.device) -> BlockRunner:
    block = imported("torchvision.models.convnext").CNBlock
    return BlockRunner(case, device, lambda: block(case.channels, 1e-6, case.drop_path), TORCHVISION_NAMES)


def _compiled_block(mode: str | None) -> Callable[[BlockCase, torch.device], BlockRunner]:
    return lambda case, device: _timm_block(case, device, execute=lambda block: compiled(block, device, mode))


def _sample_stage(case: BlockCase, device_type: str, full: bool) -> bool:
    """One stage shows what a backend or a setting costs."""
    return full or (case.channels == 384 and not case.drop_path)


BLOCK_PROVIDERS = [
    Provider("ours", "ours", _our_block),
    Provider(
        "ours-keep-hidden",
        "ours",
        functools.partial(_our_block, recompute=False),
        lambda case, *rest: case.task == "training" and _sample_stage(case, *rest),
        "recompute=False",
    ),
    *in_gpu_backends(_our_block),
    Provider(
        "ours-reference",
        "ours",
        lambda case, device: InBackend(_our_block(case, device), "reference"),
        lambda case, *rest: case.version == "v1" and _sample_stage(case, *rest),
        "PyTorch's kernels in our backward pass",
    ),
    Provider("eager", "eager", _eager_block, note="the official block, channels-last"),
    Provider(
        "eager-nchw", "eager", functools.partial(_eager_block, memory_format=torch.contiguous_format), note="NCHW"
    ),
    Provider("timm", "eager", _timm_block, note="channels-last"),
    Provider("torchvision", "eager", _torchvision_block, lambda case, *_: case.version == "v1", "channels-last"),
    Provider(
        "compile",
        "other",
        _compiled_block(None),
        lambda case, *rest: compiled_here(case, *rest) and not case.drop_path,
        "timm's block, torch.compile",
    ),
    Provider(
        "max-autotune",
        "other",
        _compiled_block("max-autotune-no-cudagraphs"),
        lambda case, device_type, full: device_type == "cuda" and not case.drop_path,
        "timm's block, torch.compile(mode='max-autotune-no-cudagraphs')",
    ),
]
