"""The drop-in block."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _flops, backends, reference
from .operators import _arguments as arguments
from .operators.mlp import branch_dtype
from .reference import ConvNeXtBlockParameters, DropPath
from .visible import VisiblePatches, run_operator

__all__ = ["FusedConvNeXtBlock"]


class FusedConvNeXtBlock(ConvNeXtBlockParameters):
    """A ConvNeXt V1 or V2 block in one autograd node.

    The signature, the parameters' names, shapes and initialisation are the official block's, so its state dict loads
    strictly. For backward it keeps the input and the convolution's output in the compute dtype and two fp32 numbers a
    pixel, nothing else.

    Args:
        dim: channels C, at least 1.
        drop_path: probability of dropping a sample's branch, in [0, 1). The random numbers are timm's.
        layer_scale_init_value: initial layer scale; 0 leaves it out. None: 1e-6 for V1, and none with `use_grn`, as the
            official blocks have it.
        use_grn: ConvNeXt V2's global response normalisation.
        mlp_ratio: hidden channels over C.
        kernel_size: of the depthwise convolution: 3, 5, 7, 9 or 11.
        eps: LayerNorm's.
        bias: whether the convolution and the two linear layers have one.
        approximate: GELU's form, 'none' (exact) or 'tanh'.
        recompute: compute the hidden tensor again in backward; False keeps it (`mlp_ratio` * C more values a pixel).
        backend: what runs the block, compiled or not: 'auto', 'cpu', 'cuda', 'triton' or 'reference'
            (:mod:`convnext_kernels.backends`). None follows ``use_backend`` and CONVNEXT_KERNELS_BACKEND at each call.
        device, dtype: of the parameters.

    Shape:
        (N, C, H, W) to (N, C, H, W), N >= 0, H, W >= 1, fp32, fp64, fp16 or bf16, channels-last in memory. NCHW memory
        is taken with one copy. Under autocast the branch runs in the autocast dtype and the residual sum in x's dtype,
        as in eager PyTorch.

        ``block(x, visible)`` takes and returns the visible patches of masked images, (N * K, C, h, w), and computes
        what a sparse convolution would (:class:`convnext_kernels.VisiblePatches`).

    Raises:
        ValueError, TypeError: bad arguments, here or in ``forward``.

    Source: ConvNeXt (arXiv:2201.03545), figure 4; ConvNeXt V2 (arXiv:2301.00808), section 4.
    """

    backend: str | None = None  # for blocks that were pickled before there was one

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = None,
        *,
        use_grn: bool = False,
        mlp_ratio: float = 4,
        kernel_size: int = 7,
        eps: float = 1e-6,
        bias: bool = True,
        approximate: str = "none",
        recompute: bool = True,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            drop_path,
            layer_scale_init_value,
            use_grn=use_grn,
            mlp_ratio=mlp_ratio,
            kernel_size=kernel_size,
            eps=eps,
            bias=bias,
            approximate=approximate,
            device=device,
            dtype=dtype,
        )
        self.recompute = recompute
        if backend is not None:
            backends.checked(backend, "FusedConvNeXtBlock: argument 'backend'")
        self.backend = backend
        _flops.register()

    def forward(self, x: Tensor, visible: VisiblePatches | None = None) -> Tensor:
        return run_block(
            x,
            visible,
            self.dwconv.weight,
            self.dwconv.bias,
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            None if self.grn is None else self.grn.gamma,
            None if self.grn is None else self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
            self.gamma,
            drop_path=self.drop_path,
            eps=self.norm.eps,
            approximate=self.act.approximate,
            recompute=self.recompute,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}" + ("" if self.backend is None else f", backend={self.backend!r}")


def run_block(
    x: Tensor,
    visible: VisiblePatches | None,
    conv_weight: Tensor,
    *parameters: Tensor | None,
    drop_path: DropPath | None,
    eps: float,
    approximate: str,
    recompute: bool,
    backend: str | None,
) -> Tensor:
    """Draws the drop-path vector and runs the block's operator; what a block's ``forward`` does.

    During ONNX export, which knows only PyTorch's operators, it runs the reference instead: the same function.
    """
    sample_scale = None
    if drop_path is not None and drop_path.training and drop_path.drop_prob > 0:
        arguments.check_image("convnext_block", "x", x)
        dtype = branch_dtype(arguments.autocast_dtype(x) or x.dtype, parameters[-1])
        samples = visible.index if isinstance(visible, VisiblePatches) else x
        sample_scale = drop_path.sample_scale(samples, dtype)
    if visible is None and torch.onnx.is_in_onnx_export():
        return reference.convnext_block(x, conv_weight, *parameters, sample_scale, eps, approximate)
    return run_operator(
        x,
        visible,
        conv_weight,
        *parameters,
        sample_scale,
        eps=eps,
        approximate=approximate,
        recompute=recompute,
        backend=backend,
    )
