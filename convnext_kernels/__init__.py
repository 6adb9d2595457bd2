"""Fused ConvNeXt blocks for PyTorch: the same function and the same weights, faster and in a fraction of the memory.

The main names::

    FusedConvNeXtBlock     the drop-in block (V1, and V2 with use_grn=True)
    fuse, unfuse           swap the blocks of a timm, torchvision, transformers or official ConvNeXt in place, and back
    fusion_report          block by block: what was fused, and why not
    FCMAE                  masked pretraining of such a model; VisiblePatches, what its blocks run on
    use_backend            force a backend inside a `with` block

and the operators the block is made of: depthwise_conv2d, layer_norm, bias_gelu, layer_norm_mlp, convnext_block.
`convnext_kernels.reference` has each of them in plain PyTorch.
"""

import sys as _sys

from . import native as _native
from ._version import __version__

try:
    _native.load()
    from .backends import use as use_backend  # which reads CONVNEXT_KERNELS_BACKEND
except (_native.NotBuiltError, ValueError) as _error:
    # The command line, `python -m convnext_kernels` in an uncompiled checkout included: one line, no traceback.
    _module = _sys.argv[:1] == ["-m"] and "convnext_kernels" in _sys.orig_argv
    if _module or (_sys.argv[:1] and _sys.argv[0].endswith("/convnext-kernels")):
        print(f"convnext-kernels: {_error}", file=_sys.stderr)
        raise SystemExit(2) from None
    raise

from . import _flops, reference
from .block import FusedConvNeXtBlock
from .convert import FusionEntry, FusionReport, fuse, fusion_report, unfuse
from .fcmae import FCMAE, FCMAEOutput
from .native import build_info
from .operators import (
    BiasGeluFunction,
    ConvNeXtBlockFunction,
    DepthwiseConv2dFunction,
    LayerNormFunction,
    LayerNormMlpFunction,
    bias_gelu,
    convnext_block,
    depthwise_conv2d,
    layer_norm,
    layer_norm_mlp,
)
from .reference import ReferenceConvNeXtBlock
from .visible import VisiblePatches

_flops.register_if_used()

__all__ = [
    "FCMAE",
    "BiasGeluFunction",
    "ConvNeXtBlockFunction",
    "DepthwiseConv2dFunction",
    "FCMAEOutput",
    "FusedConvNeXtBlock",
    "FusionEntry",
    "FusionReport",
    "LayerNormFunction",
    "LayerNormMlpFunction",
    "ReferenceConvNeXtBlock",
    "VisiblePatches",
    "__version__",
    "bias_gelu",
    "build_info",
    "convnext_block",
    "depthwise_conv2d",
    "fuse",
    "fusion_report",
    "layer_norm",
    "layer_norm_mlp",
    "reference",
    "unfuse",
    "use_backend",
]
