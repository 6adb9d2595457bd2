"""Each operator in plain PyTorch: what it means.

These functions are the definition that tests and benchmarks compare with. They are differentiable by autograd, run in
any floating dtype (fp64 for the ground truth) on any device, and follow PyTorch's own autocast rules because they call
PyTorch's own functions. Names and argument orders are those of :mod:`convnext_kernels.operators`.

Sources: A ConvNet for the 2020s (Liu et al. 2022, arXiv:2201.03545), sections 2.4 to 2.6 and appendix A; ConvNeXt V2
(Woo et al. 2023, arXiv:2301.00808), section 4; Deep Networks with Stochastic Depth (Huang et al. 2016,
arXiv:1603.09382), section 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "GRN_EPS",
    "KERNEL_SIZES",
    "ConvNeXtBlockParameters",
    "DropPath",
    "GlobalResponseNorm",
    "ReferenceConvNeXtBlock",
    "bias_gelu",
    "convnext_block",
    "depthwise_conv2d",
    "grn",
    "layer_norm",
    "layer_norm_mlp",
]

#: The epsilon in GRN's divisive normalisation (ConvNeXt V2, section 4, algorithm 1).
GRN_EPS = 1e-6

#: The kernel sizes of the depthwise convolution (ConvNeXt, section 2.5, studies 3 to 11).
KERNEL_SIZES = (3, 5, 7, 9, 11)


def depthwise_conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1, sample_scale: Tensor | None = None
) -> Tensor:
    """Depthwise convolution with padding k // 2; samples whose ``sample_scale`` is 0 give 0."""
    y = F.conv2d(x, weight, bias, stride=stride, padding=weight.shape[-1] // 2, groups=weight.shape[0])
    if sample_scale is not None:
        y = torch.where(sample_scale.view(-1, 1, 1, 1) != 0, y, torch.zeros((), dtype=y.dtype, device=y.device))
    return y


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6, channels_first: bool = False
) -> Tensor:
    """Layer normalisation over the channels: the last dimension, or dimension 1 where ``channels_first``."""
    if channels_first:
        return layer_norm(x.movedim(1, -1), weight, bias, eps).movedim(-1, 1)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def bias_gelu(x: Tensor, bias: Tensor | None = None, approximate: str = "none") -> Tensor:
    """GELU(x + bias)."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = GRN_EPS) -> Tensor:
    """Global response normalisation of x (N, ..., K): the norms run over everything between N and K."""
    if x.dim() == 2:
        return grn(x.unsqueeze(1), weight, bias, eps).squeeze(1)  # vector_norm takes no dimensions for all of them
    return _grn(x, weight, bias, eps, tuple(range(1, x.dim() - 1)))


def _grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float, places: tuple[int, ...]) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=places, keepdim=True)
    return x + weight * (x * (norm / (norm.mean(dim=-1, keepdim=True) + eps))) + bias


def layer_norm_mlp(
    z: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    eps: float = 1e-6,
    approximate: str = "none",
) -> Tensor:
    """residual + sample_scale * layer_scale * MLP(LayerNorm(z)) for z (N, ..., C)."""
    hidden = F.gelu(F.linear(layer_norm(z, norm_weight, norm_bias, eps), fc1_weight, fc1_bias), approximate=approximate)
    if grn_weight is not None and grn_bias is not None:
        hidden = grn(hidden, grn_weight, grn_bias)
    branch = F.linear(hidden, fc2_weight, fc2_bias)
    if layer_scale is not None:
        branch = branch * layer_scale
    if sample_scale is not None:
        scale = sample_scale.view(-1, *[1] * (z.dim() - 1))
        branch = torch.where(scale != 0, branch * scale.to(branch.dtype), torch.zeros_like(branch))
    return branch if residual is None else residual + branch


def convnext_block(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    grn_weight: Tensor | None,
    grn_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    layer_scale: Tensor | None = None,
    sample_scale: Tensor | None = None,
    eps: float = 1e-6,
    approximate: str = "none",
) -> Tensor:
    """The whole block, x (N, C, H, W)."""
    z = depthwise_conv2d(x, conv_weight, conv_bias).permute(0, 2, 3, 1)
    y = layer_norm_mlp(
        z,
        None,
        norm_weight,
        norm_bias,
        fc1_weight.flatten(1),
        fc1_bias,
        None if grn_weight is None else grn_weight.flatten(),
        None if grn_bias is None else grn_bias.flatten(),
        fc2_weight.flatten(1),
        fc2_bias,
        None if layer_scale is None else layer_scale.flatten(),
        sample_scale,
        eps,
        approximate,
    )
    return x + y.permute(0, 3, 1, 2)


class DropPath(nn.Module):
    """Stochastic depth: drops the branch of whole samples, with timm's draw from the generator.

    Args:
        drop_prob: probability of dropping a sample, in [0, 1).
        scale_by_keep: divide what is kept by 1 - drop_prob, so that the expectation stays.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        if not 0.0 <= drop_prob < 1.0:
            raise ValueError(f"DropPath: argument 'drop_prob': expected a number in [0, 1), got {drop_prob!r}")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def sample_scale(self, x: Tensor, branch_dtype: torch.dtype) -> Tensor | None:
        """The factor of each sample, shape (N,), in the accumulation dtype; None where nothing can be dropped.

        The random numbers are drawn as timm draws them for a 4-d branch of ``branch_dtype``, so that equal seeds drop
        equal samples.
        """
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0], 1, 1, 1), dtype=branch_dtype).bernoulli_(keep)
        kept = kept.flatten().to(torch.float64 if branch_dtype == torch.float64 else torch.float32)
        return kept / keep if self.scale_by_keep else kept

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1.0 - self.drop_prob
        kept = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (kept.div_(keep) if self.scale_by_keep else kept)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"


class GlobalResponseNorm(nn.Module):
    """ConvNeXt V2's GRN with the official parameters: gamma and beta of shape (1, 1, 1, dim), zero at the start."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return _grn(x, self.gamma, self.beta, GRN_EPS, (1, 2))  # torch.fx cannot ask for x's rank


class ConvNeXtBlockParameters(nn.Module):
    """The parameters of a block, under the official names, created and initialised in the official order.

    So a state dict moves between the official block, :class:`ReferenceConvNeXtBlock` and
    :class:`convnext_kernels.FusedConvNeXtBlock` unchanged, and equal seeds give equal blocks.
    """

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if layer_scale_init_value is None:
            layer_scale_init_value = 0.0 if use_grn else 1e-6

        def check(argument: str, value: Any, expected: str, holds: bool) -> None:
            if not holds:
                raise ValueError(f"{name}: argument '{argument}': expected {expected}, got {value!r}")

        def is_number(value: Any) -> bool:
            return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

        def is_integer(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        check("dim", dim, "an integer of at least 1", is_integer(dim) and dim >= 1)
        sizes = f"one of {KERNEL_SIZES}"
        check("kernel_size", kernel_size, sizes, is_integer(kernel_size) and kernel_size in KERNEL_SIZES)
        check("eps", eps, "a number of at least 0", is_number(eps) and eps >= 0)
        check("drop_path", drop_path, "a number in [0, 1)", is_number(drop_path) and 0 <= drop_path < 1)
        check("layer_scale_init_value", layer_scale_init_value, "a number or None", is_number(layer_scale_init_value))
        check("approximate", approximate, "'none' or 'tanh'", approximate in ("none", "tanh"))
        hidden = int(mlp_ratio * dim) if is_number(mlp_ratio) else 0
        check("mlp_ratio", mlp_ratio, "a number of at least 1 / dim", hidden >= 1)
        factory = {"device": device, "dtype": dtype}
        self.dwconv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias, **factory)
        self.norm = nn.LayerNorm(dim, eps=eps, **factory)
        self.pwconv1 = nn.Linear(dim, hidden, bias=bias, **factory)
        self.act = nn.GELU(approximate=approximate)
        self.grn = GlobalResponseNorm(hidden, **factory) if use_grn else None
        self.pwconv2 = nn.Linear(hidden, dim, bias=bias, **factory)
        self.gamma = (
            nn.Parameter(layer_scale_init_value * torch.ones(dim, **factory)) if layer_scale_init_value > 0 else None
        )
        self.drop_path = DropPath(drop_path)

    def run_parts(self, x: Tensor) -> Tensor:
        """The block as the official repositories write it: part by part, in eager PyTorch."""
        branch = self.dwconv(x).permute(0, 2, 3, 1)
        branch = self.act(self.pwconv1(self.norm(branch)))
        if self.grn is not None:
            branch = self.grn(branch)
        branch = self.pwconv2(branch)
        if self.gamma is not None:
            branch = self.gamma * branch
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class ReferenceConvNeXtBlock(ConvNeXtBlockParameters):
    """The block as the official repositories write it: module by module, in eager PyTorch.

    Arguments are those of :class:`convnext_kernels.FusedConvNeXtBlock`, without `recompute`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.run_parts(x)
