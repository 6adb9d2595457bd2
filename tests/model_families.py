"""A small ConvNeXt of every family that `fuse` knows, weights under which every parameter matters, and comparisons."""

import functools

import timm.models.convnext
import torch
import torchvision.models.convnext
import transformers
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from convnext_kernels import fusion_report
from models_facebook import ConvNeXt, ConvNeXtV2

DEPTHS = (1, 2, 1, 1)
DIMS = (16, 24, 32, 40)
CLASSES = 10


def official(drop_path=0.0, cls=ConvNeXt):
    return cls(num_classes=CLASSES, depths=DEPTHS, dims=DIMS, drop_path_rate=drop_path)


def official_v2(drop_path=0.0):
    return official(drop_path, ConvNeXtV2)


def timm_model(drop_path=0.0, **arguments):
    return timm.models.convnext.ConvNeXt(
        num_classes=CLASSES, depths=DEPTHS, dims=DIMS, drop_path_rate=drop_path, **arguments
    )


def timm_conv_mlp(drop_path=0.0):
    return timm_model(drop_path, conv_mlp=True)


def timm_v2(drop_path=0.0):
    return timm_model(drop_path, use_grn=True, ls_init_value=None)


def timm_v2_conv_mlp(drop_path=0.0):
    return timm_model(drop_path, use_grn=True, ls_init_value=None, conv_mlp=True)


def torchvision_model(drop_path=0.0):
    stages = [
        torchvision.models.convnext.CNBlockConfig(dim, after, depth)
        for dim, after, depth in zip(DIMS, (*DIMS[1:], None), DEPTHS)
    ]
    return torchvision.models.convnext.ConvNeXt(stages, stochastic_depth_prob=drop_path, num_classes=CLASSES)


class Logits(nn.Module):
    """A transformers model as a function from images to its logits or pooled features."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(pixel_values=x)[-1]


def _transformers(config, model, drop_path):
    sizes = {"hidden_sizes": list(DIMS), "depths": list(DEPTHS), "num_labels": CLASSES, "image_size": 64}
    return Logits(model(config(drop_path_rate=drop_path, **sizes)))


def transformers_v1(drop_path=0.0):
    return _transformers(transformers.ConvNextConfig, transformers.ConvNextForImageClassification, drop_path)


def transformers_v2(drop_path=0.0):
    return _transformers(transformers.ConvNextV2Config, transformers.ConvNextV2ForImageClassification, drop_path)


def transformers_dinov3(drop_path=0.0):
    return _transformers(transformers.DINOv3ConvNextConfig, transformers.DINOv3ConvNextModel, drop_path)


#: name -> model(drop_path)
FAMILIES = {
    "official": official,
    "official_v2": official_v2,
    "timm": timm_model,
    "timm_conv_mlp": timm_conv_mlp,
    "timm_v2": timm_v2,
    "timm_v2_conv_mlp": timm_v2_conv_mlp,
    "torchvision": torchvision_model,
    "transformers": transformers_v1,
    "transformers_v2": transformers_v2,
    "transformers_dinov3": transformers_dinov3,
}

BLOCKS = sum(DEPTHS)
NORMS = 5  # the stem's, three of downsampling, the head's


def randomize(model, seed=0):
    """Gives layer scale, GRN, norms and biases values of order 1; outputs of linear layers keep their inputs' scale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 and parameter.shape[0] > 1 else 1
            values = torch.randn(parameter.shape, generator=generator) / fan_in**0.5
            parameter.copy_(values)
    return model


def images(n=3, size=64, seed=1):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def counts(model):
    """Fused blocks and fused norms."""
    report = fusion_report(model)
    return tuple(sum(entry.fused for entry in report if entry.kind == kind) for kind in ("block", "norm"))


def reasons(model, kind="block"):
    """name -> reason, of what cannot be fused."""
    return {
        entry.name: entry.reason
        for entry in fusion_report(model)
        if entry.kind == kind and not entry.fused and entry.reason != "can be fused"
    }


def blocks_of(model):
    names = [entry.name for entry in fusion_report(model) if entry.kind == "block"]
    return [model.get_submodule(name) for name in names]


def results(model, x, seed=None):
    """Output and every parameter gradient."""
    if seed is not None:
        torch.manual_seed(seed)
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {
        "output": y.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def assert_same(ours, theirs, rtol=1e-4):
    """Equal up to fp32 rounding accumulated over a whole network."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        tolerance = rtol * max(theirs[name].abs().max().item(), 1e-6)
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")


# --- parameters that compute in their own way


class Halved(torch.Tensor):
    """Stands for half of what it holds, as a quantised weight stands for a multiple of it."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, values.stride(), dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    def __repr__(self):
        return "Halved"

    def __tensor_flatten__(self):
        return ["values"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Halved(inner["values"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.namespace != "aten":
            raise NotImplementedError(f"Halved has no {func}")
        if func is torch.ops.aten.detach.default:
            return Halved(args[0].values)
        halve = functools.partial(pytree.tree_map_only, Halved, lambda halved: halved.values / 2)
        return func(*halve(args), **halve(kwargs or {}))


class HalvedByFunction(torch.Tensor):
    """The same by the older protocol, to which an operator's computation is hidden."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        halve = functools.partial(
            pytree.tree_map_only, HalvedByFunction, lambda halved: halved.as_subclass(torch.Tensor) / 2
        )
        if func in (F.linear, F.conv2d, F.layer_norm):
            return func(*halve(args), **halve(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})


def halve(layer, cls=Halved):
    values = layer.weight.detach()
    layer.weight = nn.Parameter(cls(values) if cls is Halved else values.as_subclass(cls), requires_grad=False)
