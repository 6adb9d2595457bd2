"""Whole models as providers: timm's and torchvision's as they come, fused, compiled, and in other runtimes."""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import convnext_kernels as ck
from convnext_kernels.cli.measure import peak_growth, saved_bytes

from .cases import CLASSES, PRECISIONS, ModelCase
from .comparison import CheckedRunner, Provider, Results
from .providers import InBackend, compiled, forward_in, generator, imported, in_gpu_backends, randomise

Execute = Callable[[nn.Module, Tensor], Callable[[Tensor], Tensor]]

#: Images of a batch whose results are compared with fp64, which needs some ten times the memory of bf16.
CHECKED_IMAGES = 8


def as_it_is(model: nn.Module, x: Tensor) -> nn.Module:
    return model


def fused(model: nn.Module, x: Tensor) -> nn.Module:
    return ck.fuse(model)


def create(library: str, name: str) -> nn.Module:
    if library == "timm":
        return imported("timm").create_model(name, drop_path_rate=0.0)
    return imported("torchvision").models.get_model(name, weights=None, stochastic_depth_prob=0.0)


@functools.lru_cache(maxsize=2)  # timm's and torchvision's
def _template(library: str, name: str) -> nn.Module:
    return randomise(create(library, name))


class ModelRunner(CheckedRunner):
    """Images to logits, or a training step: forward, cross entropy, backward, AdamW.

    Args:
        library: whose model: timm, torchvision.
        execute: from a model and an input what runs the model.
        compiled: it runs batches of that input's size only, or would compile again. Then no gradients are checked,
            which are sums over the batch, and of the logits those of the images that the others are checked with.
    """

    def __init__(
        self,
        case: ModelCase,
        device: torch.device,
        library: str = "timm",
        execute: Execute = as_it_is,
        memory_format: torch.memory_format = torch.channels_last,
        compiled: bool = False,
    ) -> None:
        self._case, self._device, self._library, self._format = case, device, library, memory_format
        self._execute, self._compiled = execute, compiled
        self.images = case.batch
        self._x, self._labels = self._inputs(case.batch)
        self._start()

    def _start(self) -> None:
        """A fresh model and optimizer."""
        self._model = self._fresh(self._device, PRECISIONS[self._case.precision].stored)
        self._run = self._execute(self._model, self._x)
        self._optimizer = None
        if self._case.task == "training":
            # A learning rate at which the weights hardly move: all steps compute with numbers of the same kind.
            self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6, weight_decay=0.05, fused=True)

    def _fresh(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        template = _template(self._library, self._case.model)
        model = copy.deepcopy(template).to(device, PRECISIONS[self._case.precision].stored).to(dtype)
        return model.to(memory_format=self._format).train(self._case.task == "training")

    def _inputs(self, batch: int) -> tuple[Tensor, Tensor]:
        random = generator()
        x = torch.randn(batch, 3, self._case.size, self._case.size, generator=random)
        labels = torch.randint(0, CLASSES, (batch,), generator=random)
        x = x.to(self._device, PRECISIONS[self._case.precision].stored).contiguous(memory_format=self._format)
        return x, labels.to(self._device)

    def _loss(self, x: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(forward_in(self._case.precision, self._run, x).float(), labels)

    def step(self, x: Tensor, labels: Tensor) -> None:
        if self._optimizer is None:
            with torch.inference_mode():
                forward_in(self._case.precision, self._run, x)
            return
        self._loss(x, labels).backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def run(self, call: int) -> None:
        if self._device.type == "cuda":
            torch.compiler.cudagraph_mark_step_begin()
        self.step(self._x, self._labels)

    def _checked(self) -> tuple[Tensor, Tensor]:
        return self._x[:CHECKED_IMAGES], self._labels[:CHECKED_IMAGES]

    def results(self) -> Results:
        if not self._compiled:
            return _model_results(self._case, self._model, self._run, *self._checked())
        with torch.inference_mode(self._case.task == "inference"):
            logits = forward_in(self._case.precision, self._run, self._x)
            return {"logits": logits[:CHECKED_IMAGES].detach().to(torch.float32, copy=True)}

    def exact(self) -> Results:
        case = self._case
        if PRECISIONS[case.precision].stored == torch.float32:
            case = replace(case, precision="fp32")  # the same numbers come in: found in the cache
        return self._comparable(_exact_model(case, self._device, self._library))

    def eager(self) -> Results:
        model = self._fresh(self._device, PRECISIONS[self._case.precision].stored)
        return self._comparable(_model_results(self._case, model, model, *self._checked()))

    def _comparable(self, results: Results) -> Results:
        return {"logits": results["logits"]} if self._compiled else results

    def memory(self) -> dict[str, Any]:
        out: dict[str, Any] = {"peak_bytes": peak_growth(lambda: self.run(0), self._device)}
        if self._optimizer is not None:
            parameters = list(self._model.parameters())
            out["saved_bytes"] = saved_bytes(lambda: self._loss(self._x, self._labels), parameters)
        return out


def _model_results(case: ModelCase, model: nn.Module, run: Any, x: Tensor, labels: Tensor) -> Results:
    """Logits; in training all gradients of a kind of parameter as one, since there are hundreds."""
    if case.task == "inference":
        with torch.inference_mode():
            return {"logits": forward_in(case.precision, run, x)}
    model.zero_grad(set_to_none=True)
    logits = forward_in(case.precision, run, x)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    nn.functional.cross_entropy(logits, labels).backward()
    return {"logits": logits.detach()} | take_gradients(model)


def take_gradients(model: nn.Module) -> Results:
    """All gradients of a kind of parameter as one; the model has none afterwards."""
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            gradients.setdefault(f"grad {kind}", []).append(parameter.grad.flatten())
    model.zero_grad(set_to_none=True)
    return {kind: torch.cat(parts) for kind, parts in gradients.items()}


@functools.lru_cache(maxsize=2)  # timm's and torchvision's
def _exact_model(case: ModelCase, device: torch.device, library: str) -> Results:
    runner = ModelRunner(case, device, library)
    model = runner._fresh(device, torch.float64)
    x, labels = runner._checked()
    return _model_results(case, model, model, x.double(), labels)


# --- other ways to run a model


def compiled_in(mode: str | None) -> Execute:
    return lambda model, x: compiled(model, x.device, mode)


def fused_and_compiled(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    return compiled(ck.fuse(model), x.device, None)


def in_onnxruntime(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """ONNX Runtime on the CPU, with as many threads as PyTorch has."""
    runtime = imported("onnxruntime")
    imported("onnxscript")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, input_names=["x"])
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def in_openvino(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """OpenVINO on the CPU, in fp32, with as many threads as PyTorch has."""
    openvino = imported("openvino")
    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    network = openvino.compile_model(converted, "CPU", settings)
    return lambda x: torch.from_numpy(network([x.numpy()])[0])


def in_tensorrt(model: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    tensorrt = imported("torch_tensorrt")
    return tensorrt.compile(model, ir="dynamo", inputs=[x])


def _inference_on(device_type: str, *precisions: str) -> Callable[..., bool]:
    def covers(case: ModelCase, on: str, full: bool) -> bool:
        return case.task == "inference" and case.precision in precisions and on == device_type

    return covers


def _in_torchvision(case: ModelCase, device_type: str, full: bool) -> bool:
    return case.model in ("convnext_tiny", "convnext_small", "convnext_base", "convnext_large")


def compiled_here(case: ModelCase, device_type: str, full: bool) -> bool:
    """Compiling a whole model takes minutes on a CPU: there only where it was asked for."""
    return full or device_type == "cuda"


def _provider(name: str, kind: str, covers: Any, note: str, **how: Any) -> Provider:
    return Provider(name, kind, functools.partial(ModelRunner, **how), covers, note)


def _always(*_: Any) -> bool:
    return True


OURS = _provider("ours", "ours", _always, "timm's model after fuse()", execute=fused)
TIMM = _provider("timm", "eager", _always, "channels-last")
TIMM_NCHW = _provider("timm-nchw", "eager", _always, "NCHW", memory_format=torch.contiguous_format)
COMPILE = _provider(
    "compile", "other", compiled_here, "timm's, torch.compile", execute=compiled_in(None), compiled=True
)

MODEL_PROVIDERS = [
    OURS,
    *in_gpu_backends(OURS.build, lambda case, device_type, full: full),
    Provider(
        "ours-reference",
        "ours",
        lambda case, device: InBackend(OURS.build(case, device), "reference"),
        lambda case, device_type, full: full,
        "PyTorch's kernels in our backward pass",
    ),
    TIMM,
    TIMM_NCHW,
    _provider("torchvision", "eager", _in_torchvision, "channels-last", library="torchvision"),
    COMPILE,
    _provider(
        "ours-compile", "ours", compiled_here, "after fuse(), torch.compile", execute=fused_and_compiled, compiled=True
    ),
    _provider(
        "max-autotune",
        "other",
        compiled_here,
        "timm's, torch.compile(mode='max-autotune')",
        execute=compiled_in("max-autotune"),
        compiled=True,
    ),
    _provider("onnxruntime", "other", _inference_on("cpu", "fp32"), "timm's", execute=in_onnxruntime, compiled=True),
    _provider("openvino", "other", _inference_on("cpu", "fp32"), "timm's", execute=in_openvino, compiled=True),
    _provider(
        "tensorrt",
        "other",
        _inference_on("cuda", "pure-bf16"),
        "timm's, torch_tensorrt",
        execute=in_tensorrt,
        compiled=True,
    ),
]
SCALING_PROVIDERS = [OURS, TIMM]
