"""Masked pretraining of a ConvNeXt: the fully convolutional masked autoencoder (ConvNeXt V2, section 3)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .block import FusedConvNeXtBlock
from .convert import CAN_BE_FUSED, fuse, fusion_report
from .convert.blocks import FusedBlock
from .convert.inspection import NotCoveredError
from .convert.layouts import find_layout
from .convert.norms import is_convnext, plan_norm
from .operators import _arguments as arguments
from .parts import has_hooks
from .visible import VisiblePatches

__all__ = ["FCMAE", "FCMAEOutput"]


class FCMAEOutput(NamedTuple):
    """Of a pretraining step.

    `loss`: a scalar in fp32 (fp64 for fp64). `prediction`: (N, stride^2 * image_channels, rows, columns), the pixels of
    each patch row by row, their channels innermost. `mask`: (N, rows, columns), bool, True where a patch was masked.
    """

    loss: Tensor
    prediction: Tensor
    mask: Tensor


class FCMAE(nn.Module):
    """A ConvNeXt that learns to paint in what is masked of its images.

    Square patches of the size of the encoder's stride, 32 for a ConvNeXt, are masked at random; the encoder sees the
    others; a decoder of ConvNeXt V2 blocks predicts the pixels of the masked ones, and the loss is the mean square
    error there. The encoder is your model, fused in place: only its visible patches are computed, exactly as by the
    sparse convolutions of the official code, without a library for these. To fine-tune, go on with `encoder`.

    GRN's norms run over the visible patches of one image, as in the paper's algorithm 1 and its masked form for JAX
    (facebookresearch/ConvNeXt-V2, TRAINING.md); the official PyTorch code takes them over the whole batch. Parameters
    beyond the encoder's last block (its norm, its head) take no part and get no gradient: DistributedDataParallel needs
    ``static_graph=True``, or these frozen. The encoder's parts are called one by one: what its stages do besides,
    gradient checkpointing for one, is not done.

    Args:
        encoder: a ConvNeXt of timm, torchvision, transformers or the official code, fused or not, or an
            ``nn.Sequential`` of :class:`FusedConvNeXtBlock`, LayerNorms over the channels and convolutions whose kernel
            is their stride.
        image_channels: of the images.
        mask_ratio: the part of an image's patches that is masked.
        decoder_dim, decoder_depth: channels and number of the decoder's blocks.
        normalize_target: predict each patch's pixels less their mean and over their standard deviation.

    Raises:
        TypeError: `encoder` is no ConvNeXt.
        ValueError: a part of it cannot run on visible patches (a block that is not covered, an overlapping stem).

    Source: ConvNeXt V2 (Woo et al. 2023, arXiv:2301.00808), section 3; Masked Autoencoders (He et al. 2022,
    arXiv:2111.06377), section 3, for the loss.
    """

    def __init__(
        self,
        encoder: nn.Module,
        *,
        image_channels: int = 3,
        mask_ratio: float = 0.6,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        normalize_target: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(mask_ratio, float) or not 0 < mask_ratio < 1:
            arguments.wrong_value("FCMAE", "mask_ratio", "a number between 0 and 1", repr(mask_ratio))
        sizes = {"image_channels": image_channels, "decoder_dim": decoder_dim, "decoder_depth": decoder_depth}
        for argument, value in sizes.items():
            least = 0 if argument == "decoder_depth" else 1
            if not isinstance(value, int) or value < least:
                arguments.wrong_value("FCMAE", argument, f"an integer of at least {least}", repr(value))
        self.mask_ratio = mask_ratio
        self.normalize_target = normalize_target
        self.image_channels = image_channels
        channels, self.stride = _check_encoder(encoder, image_channels)
        self.encoder = fuse(encoder)
        factory = {name: getattr(next(encoder.parameters()), name) for name in ("device", "dtype")}
        self.proj = nn.Conv2d(channels, decoder_dim, 1, **factory)
        self.mask_token = nn.Parameter(torch.empty(1, decoder_dim, 1, 1, **factory))
        decoder = (FusedConvNeXtBlock(decoder_dim, use_grn=True, **factory) for _ in range(decoder_depth))
        self.decoder = nn.Sequential(*decoder)
        self.pred = nn.Conv2d(decoder_dim, self.stride**2 * image_channels, 1, **factory)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in (self.proj, self.decoder, self.pred):
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                elif parameter.dim() > 1 and "grn" not in name:
                    nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, images: Tensor, mask: Tensor | None = None) -> FCMAEOutput:
        """A step on images (N, image_channels, H, W), H and W multiples of the encoder's stride.

        Args:
            images: as the encoder takes them, normalised.
            mask: (N, H / stride, W / stride), bool, True where a patch shall be masked, equally often in every image.
                None draws one.

        Raises:
            TypeError, ValueError: bad arguments.
        """
        arguments.check_image("FCMAE", "images", images)
        n, channels, height, width = images.shape
        if channels != self.image_channels or height % self.stride or width % self.stride:
            expected = f"shape (N, {self.image_channels}, H, W), H and W multiples of {self.stride}"
            arguments.wrong_value("FCMAE", "images", expected, f"shape {tuple(images.shape)}")
        grid = (height // self.stride, width // self.stride)
        if mask is None:
            visible = VisiblePatches.random(n, grid, self.mask_ratio, device=images.device)
            mask = visible.mask
        else:
            visible = VisiblePatches.from_mask(mask)
            if mask.shape != (n, *grid):
                arguments.wrong_value("FCMAE", "mask", f"shape {(n, *grid)}", f"shape {tuple(mask.shape)}")
            arguments.check_device("FCMAE", images, mask=mask)
            if visible.index.shape[1] == grid[0] * grid[1]:
                arguments.wrong_value("FCMAE", "mask", "some patches of every image masked", "none")
        prediction = self.decode(self.encode(images, visible), mask)
        return FCMAEOutput(self.loss(images, prediction, mask), prediction, mask)

    def encode(self, images: Tensor, visible: VisiblePatches) -> Tensor:
        """The encoder's features of the visible patches, (N, C, rows, columns); 0 where it is masked."""
        x = visible.pack(images)
        for step in _steps(self.encoder):
            if isinstance(step, _BLOCKS):
                x = step(x, visible)
            elif _is_block(step):
                raise RuntimeError(
                    f"FCMAE: a {type(step).__name__} of the encoder is not fused any more; fuse(encoder)"
                )
            else:
                x = step(x)
        return visible.unpack(x)

    def decode(self, features: Tensor, mask: Tensor) -> Tensor:
        """The predicted pixels, (N, stride^2 * image_channels, rows, columns), of the encoder's features.

        mask: (N, rows, columns), bool, True where a patch is masked.
        """
        x = self.proj(features)
        x = torch.where(mask.unsqueeze(1), self.mask_token.to(x.dtype), x)
        return self.pred(self.decoder(x))

    def loss(self, images: Tensor, prediction: Tensor, mask: Tensor) -> Tensor:
        """The mean square error, in fp32 (fp64 for fp64), over the pixels of the masked patches; 0 where none is."""
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        target = self.patchify(images).to(dtype)
        if self.normalize_target:
            variance, mean = torch.var_mean(target, dim=1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.to(dtype) - target).square().mean(dim=1)
        return (error * mask).sum() / mask.sum().clamp(min=1)

    def patchify(self, images: Tensor) -> Tensor:
        """Images (N, image_channels, H, W) laid out as predictions are."""
        rows, columns = images.shape[2] // self.stride, images.shape[3] // self.stride
        x = images.reshape(len(images), self.image_channels, rows, self.stride, columns, self.stride)
        x = x.permute(0, 3, 5, 1, 2, 4)
        return x.reshape(len(images), self.stride**2 * self.image_channels, rows, columns)

    def unpatchify(self, prediction: Tensor) -> Tensor:
        """Predictions as images (N, image_channels, H, W)."""
        n, _, rows, columns = prediction.shape
        x = prediction.reshape(n, self.stride, self.stride, self.image_channels, rows, columns)
        return x.permute(0, 3, 4, 1, 5, 2).reshape(n, self.image_channels, rows * self.stride, columns * self.stride)

    def extra_repr(self) -> str:
        return f"mask_ratio={self.mask_ratio}, normalize_target={self.normalize_target}, stride={self.stride}"


_BLOCKS = (FusedBlock, FusedConvNeXtBlock)
_NO_PADDING = ((0, 0), "valid")


def _steps(encoder: nn.Module) -> list[nn.Module]:
    """The blocks and the layers between them in their order, up to the last block."""
    steps = list(_walk(encoder))
    while steps and not _is_block(steps[-1]):
        steps.pop()
    return steps


def _walk(module: nn.Module) -> Iterator[nn.Module]:
    children = list(module.children())
    if _is_block(module) or not children:
        if not isinstance(module, (nn.Identity, nn.ModuleList, nn.Sequential)):
            yield module
        return
    if has_hooks(module) and not _only_captures(module):
        raise ValueError(f"FCMAE: argument 'encoder': its {type(module).__name__} has hooks, which would not run")
    if {"downsample_layers", "stages"} <= module._modules.keys():
        # The official model has a list of each and takes from them in turn.
        children = [part for pair in zip(module.downsample_layers, module.stages) for part in pair]
    for child in children:
        yield from _walk(child)


def _only_captures(module: nn.Module) -> bool:
    """Whether its hooks are those by which transformers' models hand on hidden states: they change nothing."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or "forward" in vars(module):
        return False
    return all(hook.__module__ == "transformers.utils.output_capturing" for hook in module._forward_hooks.values())


def _is_block(module: nn.Module) -> bool:
    return isinstance(module, _BLOCKS) or find_layout(module) is not None


def _check_encoder(encoder: nn.Module, image_channels: int) -> tuple[int, int]:
    """The channels of the encoder's features and its stride, if all of it can run on visible patches."""
    if not isinstance(encoder, nn.Module):
        arguments.wrong_type("FCMAE", "encoder", "a torch.nn.Module", type(encoder).__name__)
    known = isinstance(encoder, nn.Sequential) or any(is_convnext(module) for module in encoder.modules())
    if not known or not _steps(encoder):
        expected = "a ConvNeXt of timm, torchvision, transformers or the official code, or an nn.Sequential of blocks"
        arguments.wrong_type("FCMAE", "encoder", expected, type(encoder).__name__)
    names = {module: name for name, module in encoder.named_modules()}
    uncovered = {entry.name: entry.reason for entry in fusion_report(encoder) if not entry.fused}
    channels, stride = image_channels, 1
    for step in _steps(encoder):
        try:
            if _is_block(step):
                _check_block(step, channels, uncovered.get(names[step], CAN_BE_FUSED))
            elif isinstance(step, nn.Conv2d):
                channels, stride = _check_convolution(step, channels), stride * step.stride[0]
            elif not plan_norm(step).channels_first:
                raise NotCoveredError("it does not normalise over the channels")
        except NotCoveredError as error:
            raise ValueError(f"FCMAE: argument 'encoder': '{names[step]}' cannot run on patches: {error}") from None
    return channels, stride


def _check_block(block: nn.Module, channels: int, reason: str) -> None:
    if reason != CAN_BE_FUSED:
        raise NotCoveredError(reason)
    conv = block.dwconv if isinstance(block, FusedConvNeXtBlock) else block.get_submodule(find_layout(block).conv)
    if conv.in_channels != channels:
        raise NotCoveredError(f"it takes {conv.in_channels} channels where there are {channels}")


def _check_convolution(conv: nn.Conv2d, channels: int) -> int:
    """The channels that come out."""
    height, width = conv.kernel_size
    if conv.stride != conv.kernel_size or height != width or conv.dilation != (1, 1) or conv.padding not in _NO_PADDING:
        raise NotCoveredError("its kernel is not its stride, without padding, so that it sees the patches beside")
    if conv.in_channels != channels:
        raise NotCoveredError(f"it takes {conv.in_channels} channels where there are {channels}")
    return conv.out_channels
