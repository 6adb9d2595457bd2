"""Where each library keeps the parts of its ConvNeXt block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

__all__ = ["CONVNEXT_FILES", "LAYOUTS", "Layout", "find_layout", "known_class"]


class ClassName(NamedTuple):
    """A class named without importing its library."""

    module: str
    name: str


@dataclass(frozen=True)
class Layout:
    """Dotted paths, from the block, of the modules with a part in the computation; `layer_scale` is a parameter's.

    `classes` are the block classes known to be laid out so. A layout without any is recognised by its children's names.
    `inert` modules may be there, provided that they do nothing.
    """

    family: str
    classes: tuple[ClassName, ...]
    conv: str
    norm: str
    fc1: str
    act: str
    fc2: str
    drop_path: str
    layer_scale: str
    grn: str | None = None
    grn_weight: str = "weight"
    grn_bias: str = "bias"
    inert: tuple[str, ...] = ()

    def required(self) -> tuple[str, ...]:
        return (self.conv, self.norm, self.fc1, self.act, self.fc2, self.drop_path)


_TRANSFORMERS = "transformers.models"

LAYOUTS = (
    Layout(
        "timm",
        (ClassName("timm.models.convnext", "ConvNeXtBlock"),),
        conv="conv_dw",
        norm="norm",
        fc1="mlp.fc1",
        act="mlp.act",
        fc2="mlp.fc2",
        drop_path="drop_path",
        layer_scale="gamma",
        grn="mlp.grn",
        inert=("mlp.drop1", "mlp.norm", "mlp.drop2", "shortcut"),
    ),
    Layout(
        "torchvision",
        (ClassName("torchvision.models.convnext", "CNBlock"),),
        conv="block.0",
        norm="block.2",
        fc1="block.3",
        act="block.4",
        fc2="block.5",
        drop_path="stochastic_depth",
        layer_scale="layer_scale",
        inert=("block.1", "block.6"),
    ),
    Layout(
        "transformers",
        (
            ClassName(f"{_TRANSFORMERS}.convnext.modeling_convnext", "ConvNextLayer"),
            ClassName(f"{_TRANSFORMERS}.convnextv2.modeling_convnextv2", "ConvNextV2Layer"),
        ),
        conv="dwconv",
        norm="layernorm",
        fc1="pwconv1",
        act="act",
        fc2="pwconv2",
        drop_path="drop_path",
        layer_scale="layer_scale_parameter",
        grn="grn",
    ),
    Layout(
        "transformers",
        (ClassName(f"{_TRANSFORMERS}.dinov3_convnext.modeling_dinov3_convnext", "DINOv3ConvNextLayer"),),
        conv="depthwise_conv",
        norm="layer_norm",
        fc1="pointwise_conv1",
        act="activation_fn",
        fc2="pointwise_conv2",
        drop_path="drop_path",
        layer_scale="gamma",
    ),
    # facebookresearch/ConvNeXt and ConvNeXt-V2 are repositories to copy from, not packages with a name to look for.
    Layout(
        "official",
        (),
        conv="dwconv",
        norm="norm",
        fc1="pwconv1",
        act="act",
        fc2="pwconv2",
        drop_path="drop_path",
        layer_scale="gamma",
        grn="grn",
        grn_weight="gamma",
        grn_bias="beta",
    ),
)

#: The Python modules that define nothing but ConvNeXt.
CONVNEXT_FILES = frozenset(known.module for layout in LAYOUTS for known in layout.classes)


def known_class(module: nn.Module, layout: Layout) -> type | None:
    """The class of `layout` that `module` is an instance of."""
    for cls in type(module).__mro__:
        if (cls.__module__, cls.__name__) in layout.classes:
            return cls
    return None


def find_layout(module: nn.Module) -> Layout | None:
    """The layout of a ConvNeXt block, or None for any other module."""
    children = {name for name, child in module.named_children() if child is not None}
    for layout in LAYOUTS:
        if known_class(module, layout) is not None:
            return layout
        if not layout.classes and children - {layout.grn} == set(layout.required()):
            return layout
    return None
