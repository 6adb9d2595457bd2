"""The drop-in block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import _flops, backends
from .operators import _arguments as arguments
from .operators.mlp import branch_dtype
from .parts import find_subclass, has_hooks, is_traced, log_unfused
from .reference import ConvNeXtBlockParameters, DropPath, GlobalResponseNorm
from .visible import VisiblePatches, run_operator

__all__ = ["FusedConvNeXtBlock"]


class FusedConvNeXtBlock(ConvNeXtBlockParameters):
    """A ConvNeXt V1 or V2 block in one autograd node.

    The signature, the parameters' names, shapes and initialisation are the official block's, so its state dict loads
    strictly. For backward it keeps the input and the convolution's output in the compute dtype and two fp32 numbers a
    pixel, nothing else.

    The parts (``dwconv``, ``pwconv1``, ...) hold the parameters and are not called. If one of them has been replaced,
    hooked, quantised or set differently (an adapter, pruning, dilation), the block calls them one after the other, in
    eager PyTorch, which is logged once.

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
        if is_traced(x) and not isinstance(visible, VisiblePatches):  # torch.fx puts a Proxy in place of None too
            return self.run_parts(x)
        reason = self._find_changed_part()
        if reason is None:
            tensors = self._tensors()
            reason = find_subclass(*tensors)
        if reason is not None:
            if visible is not None:
                raise RuntimeError(f"{type(self).__name__} cannot run on visible patches: {reason}")
            log_unfused(self, reason)
            return self.run_parts(x)
        return run_operator(
            x,
            visible,
            *tensors,
            self._sample_scale(x, visible, tensors[-1]),
            eps=self.norm.eps,
            approximate=self.act.approximate,
            recompute=self.recompute,
            backend=self.backend,
        )

    def find_change(self) -> str | None:
        """Why the operator would not compute what the parts do, as a reason to call those; None where it does."""
        return self._find_changed_part() or find_subclass(*self._tensors(), in_call=False)

    def _find_changed_part(self) -> str | None:
        for name, cls in _PARTS:
            part = self._modules.get(name)
            if type(part) is not cls and getattr(type(part), "forward", None) is not cls.forward:
                if (name, type(part)) in _LEFT_OUT:
                    continue
                return f"its '{name}' has become a {type(part).__name__}"
            if has_hooks(part):
                return f"its '{name}' has got hooks, or a forward assigned to the instance"
        conv = self.dwconv
        if (conv.stride, conv.dilation, conv.padding_mode) != ((1, 1), (1, 1), "zeros"):
            return "the stride, dilation or padding mode of its 'dwconv' has been changed"
        return None

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """The operator's, from the convolution's weight to the layer scale."""
        conv, norm, fc1, fc2, grn = self.dwconv, self.norm, self.pwconv1, self.pwconv2, self.grn
        return (
            *(conv.weight, conv.bias, norm.weight, norm.bias, fc1.weight, fc1.bias),
            *((None, None) if grn is None else (grn.gamma, grn.beta)),
            *(fc2.weight, fc2.bias, self.gamma),
        )

    def _sample_scale(self, x: Tensor, visible: VisiblePatches | None, layer_scale: Tensor | None) -> Tensor | None:
        """The drop-path vector, drawn anew; None where nothing is dropped."""
        drop_path = self.drop_path
        if isinstance(drop_path, nn.Identity) or not drop_path.training or not drop_path.drop_prob:
            return None
        arguments.check_image("convnext_block", "x", x)
        samples = visible.index if isinstance(visible, VisiblePatches) else x
        return drop_path.sample_scale(samples, branch_dtype(arguments.autocast_dtype(x) or x.dtype, layer_scale))

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script: a FusedConvNeXtBlock cannot be scripted; torch.export or torch.jit.trace the model"
        )

    def extra_repr(self) -> str:
        return f"recompute={self.recompute}" + ("" if self.backend is None else f", backend={self.backend!r}")


#: What the operator stands for.
_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("dwconv", nn.Conv2d),
    ("norm", nn.LayerNorm),
    ("pwconv1", nn.Linear),
    ("act", nn.GELU),
    ("grn", GlobalResponseNorm),
    ("pwconv2", nn.Linear),
    ("drop_path", DropPath),
)
_LEFT_OUT = (("grn", type(None)), ("drop_path", nn.Identity))
