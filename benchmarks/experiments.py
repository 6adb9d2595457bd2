"""What becomes of the cost of a step: the first one, batches that vary, the largest batch, masked pretraining."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import convnext_kernels as ck
from convnext_kernels.cli.measure import peak_growth

from .cases import PRECISIONS, ModelCase
from .comparison import CheckedRunner, Provider, Results, Unavailable
from .models import ModelRunner, compiled_here, compiled_in, fused, take_gradients
from .providers import forward_in, generator


class FirstStep(ModelRunner):
    """The first step of a fresh model: compilation, allocation and choice of algorithms are in it."""

    prepares = True
    least_rounds = 2

    def prepare(self) -> None:
        torch._dynamo.reset()
        self._start()


VARYING = (8, 5, 7, 3, 6, 8, 2, 4)  # eighths of the case's batch


class VaryingBatches(ModelRunner):
    """Steps whose batch differs from one to the next; or, for comparison, as many images in batches of one size."""

    def __init__(self, case: ModelCase, device: torch.device, fixed: bool = False, **how: Any) -> None:
        super().__init__(case, device, **how)
        eighths = len(VARYING) * [sum(VARYING) / len(VARYING)] if fixed else VARYING
        self._batches = [self._inputs(round(case.batch * part / 8)) for part in eighths]
        self.images = sum(len(x) for x, _ in self._batches)

    def run(self, call: int) -> None:
        for x, labels in self._batches:
            if self._device.type == "cuda":
                torch.compiler.cudagraph_mark_step_begin()
            self.step(x, labels)


class LargestBatch(ModelRunner):
    """Steps at the largest batch whose growth of memory in a step stays within the case's limit."""

    MOST = 4096

    def __init__(self, case: ModelCase, device: torch.device, **how: Any) -> None:
        super().__init__(case, device, **how)
        fits, too_large = 0, None
        batch = case.batch
        while too_large is None or too_large - fits > max(1, fits // 16):
            if self._fits(batch):
                fits = batch
            else:
                too_large = batch
            batch = 2 * fits if too_large is None else (fits + too_large) // 2
            if fits >= self.MOST or too_large == 1:
                break
        if not fits:
            raise Unavailable(f"not even one image fits into {case.memory_megabytes} MB")
        self._start()  # the steps of the search moved the weights
        self.images = fits
        self._inputs_of_run = self._inputs(fits)

    def _fits(self, batch: int) -> bool:
        inputs = self._inputs(batch)
        self.step(*self._inputs(1))  # the optimizer's state is there before anything is measured
        growth = peak_growth(lambda: self.step(*inputs), self._device)
        if growth is None:
            raise Unavailable("the peak of the resident set cannot be reset on this system")
        return growth <= self._case.memory_megabytes * 10**6

    def run(self, call: int) -> None:
        self.step(*self._inputs_of_run)

    def memory(self) -> dict[str, Any]:
        return {"peak_bytes": peak_growth(lambda: self.run(0), self._device), "largest_batch": self.images}


# --- masked pretraining


class MaskedPretraining(ModelRunner):
    """The encoder's part of a step of FCMAE: the features of 40 % of the patches, their mean square for a loss."""

    MASK_RATIO = 0.6

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return forward_in(self._case.precision, self._run, x).float().square().mean()

    def results(self) -> Results:
        return self._results_of(self._model, self._run)

    def exact(self) -> Results:
        model = self._fresh(self._device, torch.float64)
        return self._results_of(model, masked_densely(model, self._x), torch.float64)

    def eager(self) -> Results:
        model = self._fresh(self._device, PRECISIONS[self._case.precision].stored)
        return self._results_of(model, masked_densely(model, self._x))

    def _results_of(self, model: nn.Module, run: Any, dtype: torch.dtype | None = None) -> Results:
        x, _ = self._checked()
        features = forward_in(self._case.precision, run, x.to(dtype or x.dtype))
        features = features if features.dtype == torch.float64 else features.float()
        features.square().mean().backward()
        return {"features": features.detach()} | take_gradients(model)


@functools.lru_cache(maxsize=4)
def _visible(samples: int, grid: tuple[int, int], device: torch.device) -> ck.VisiblePatches:
    drawn = ck.VisiblePatches.random(samples, grid, MaskedPretraining.MASK_RATIO, generator=generator())
    return ck.VisiblePatches(drawn.index.to(device), grid)


def _visible_of(x: Tensor) -> ck.VisiblePatches:
    return _visible(len(x), (x.shape[2] // 32, x.shape[3] // 32), x.device)


def visible_alone(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    encoder = ck.FCMAE(model, decoder_dim=1, decoder_depth=0)

    def run(x: Tensor) -> Tensor:
        visible = _visible_of(x)
        return visible.pack(encoder.encode(x, visible))

    return run


def masked_densely(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """As the official repository's page has it for JAX: zeros where it is masked, before every convolution and GRN."""
    masks: dict[tuple[int, ...], Tensor] = {}  # found once, as a step would

    def mask(module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        (values,) = arguments
        key = tuple(values.shape)
        if key not in masks:
            channels_last = getattr(module, "channel_dim", 1) == -1  # of timm's GRN
            side = values.shape[1 if channels_last else 2]
            kept = ~_visible(len(values), (grid, grid), values.device).mask
            kept = kept.repeat_interleave(side // grid, 1).repeat_interleave(side // grid, 2)
            masks[key] = kept.unsqueeze(-1 if channels_last else 1)
        return values * masks[key]

    grid = x.shape[2] // 32
    for module in model.modules():
        if (isinstance(module, nn.Conv2d) and module.groups > 1) or type(module).__name__ == "GlobalResponseNorm":
            module.register_forward_pre_hook(mask)
    return lambda x: _visible_of(x).pack(model.forward_features(x))


# --- who does them


def _in(case: ModelCase, device: torch.device, **how: Any) -> CheckedRunner:
    kinds = {
        "first step": FirstStep,
        "varying batches": VaryingBatches,
        "largest batch": LargestBatch,
        "masked pretraining": MaskedPretraining,
    }
    return kinds[case.experiment](case, device, **how)


def _masked(case: ModelCase, device_type: str, full: bool) -> bool:
    return case.experiment == "masked pretraining"


def _whole(case: ModelCase, device_type: str, full: bool) -> bool:
    return not _masked(case, device_type, full)


def _varying(case: ModelCase, device_type: str, full: bool) -> bool:
    return case.experiment == "varying batches"


def _experiments(case: ModelCase, device_type: str, full: bool) -> bool:
    return case.experiment in ("first step", "varying batches") and compiled_here(case, device_type, full)


EXPERIMENT_PROVIDERS = [
    Provider("ours", "ours", functools.partial(_in, execute=fused), _whole, "timm's model after fuse()"),
    Provider("timm", "eager", _in, _whole, "channels-last"),
    Provider("ours", "ours", functools.partial(_in, execute=visible_alone), _masked, "FCMAE"),
    Provider("timm-masked", "eager", functools.partial(_in, execute=masked_densely), _masked, "dense, with masks"),
    Provider(
        "compile",
        "other",
        functools.partial(_in, execute=compiled_in(None), compiled=True),
        _experiments,
        "timm's, torch.compile",
    ),
    Provider("ours-fixed", "ours", functools.partial(_in, execute=fused, fixed=True), _varying, "batches of one size"),
    Provider("timm-fixed", "other", functools.partial(_in, fixed=True), _varying, "batches of one size"),
]
