"""The operators: one file each, from schema to public function."""

from .block import ConvNeXtBlockFunction, convnext_block
from .depthwise_conv import DepthwiseConv2dFunction, depthwise_conv2d
from .layer_norm import LayerNormFunction, layer_norm
from .mlp import BiasGeluFunction, LayerNormMlpFunction, bias_gelu, layer_norm_mlp

__all__ = [
    "BiasGeluFunction",
    "ConvNeXtBlockFunction",
    "DepthwiseConv2dFunction",
    "LayerNormFunction",
    "LayerNormMlpFunction",
    "bias_gelu",
    "convnext_block",
    "depthwise_conv2d",
    "layer_norm",
    "layer_norm_mlp",
]
