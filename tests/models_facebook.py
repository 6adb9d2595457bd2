"""ConvNeXt and ConvNeXt V2 with the structure and the names of facebookresearch's repositories, for tests.

Their state-dict keys and shapes are those of the published checkpoints: ``downsample_layers.i.j``,
``stages.i.j.dwconv`` and so on. Sources: arXiv:2201.03545 and arXiv:2301.00808.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn


class LayerNorm(nn.Module):
    """Over the channels of (N, H, W, C) or, spelled out in arithmetic, of (N, C, H, W)."""

    def __init__(self, normalized_shape, eps=1e-6, data_format="channels_last"):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(normalized_shape))
        self.bias = nn.Parameter(torch.zeros(normalized_shape))
        self.eps = eps
        self.data_format = data_format
        self.normalized_shape = (normalized_shape,)

    def forward(self, x):
        if self.data_format == "channels_last":
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        centred = x - x.mean(1, keepdim=True)
        normalised = centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + self.eps)
        return self.weight[:, None, None] * normalised + self.bias[:, None, None]


class GRN(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x):
        norms = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (norms / (norms.mean(dim=-1, keepdim=True) + 1e-6))) + self.beta + x


class DropPath(nn.Module):
    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x):
        if self.drop_prob == 0.0 or not self.training:
            return x
        keep = 1 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * (mask.div_(keep) if self.scale_by_keep else mask)


class Block(nn.Module):
    """V1, with layer scale."""

    def __init__(self, dim, drop_path=0.0, layer_scale_init_value=1e-6):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(4 * dim, dim)
        scale = layer_scale_init_value * torch.ones(dim)
        self.gamma = nn.Parameter(scale) if layer_scale_init_value > 0 else None
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x):
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(self.act(self.pwconv1(branch)))
        if self.gamma is not None:
            branch = self.gamma * branch
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class BlockV2(nn.Module):
    """V2, with GRN in place of layer scale."""

    def __init__(self, dim, drop_path=0.0):
        super().__init__()
        self.dwconv = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = LayerNorm(dim, eps=1e-6)
        self.pwconv1 = nn.Linear(dim, 4 * dim)
        self.act = nn.GELU()
        self.grn = GRN(4 * dim)
        self.pwconv2 = nn.Linear(4 * dim, dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x):
        branch = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        branch = self.pwconv2(self.grn(self.act(self.pwconv1(branch))))
        return x + self.drop_path(branch.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    def __init__(
        self,
        in_chans=3,
        num_classes=1000,
        depths=(3, 3, 9, 3),
        dims=(96, 192, 384, 768),
        drop_path_rate=0.0,
        block=Block,
    ):
        super().__init__()
        stem = nn.Sequential(
            nn.Conv2d(in_chans, dims[0], kernel_size=4, stride=4),
            LayerNorm(dims[0], eps=1e-6, data_format="channels_first"),
        )
        self.downsample_layers = nn.ModuleList([stem])
        for before, after in itertools.pairwise(dims):
            norm = LayerNorm(before, eps=1e-6, data_format="channels_first")
            self.downsample_layers.append(nn.Sequential(norm, nn.Conv2d(before, after, kernel_size=2, stride=2)))
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths)).tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(block(dim, drop_path=next(rates)) for _ in range(depth)))
            for dim, depth in zip(dims, depths)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head = nn.Linear(dims[-1], num_classes)

    def forward(self, x):
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return self.head(self.norm(x.mean([-2, -1])))


class ConvNeXtV2(ConvNeXt):
    def __init__(self, **arguments):
        super().__init__(block=BlockV2, **arguments)
