"""fuse(model, convolutions=True): depthwise convolutions of networks that are no ConvNeXt."""

import copy
import logging
import pickle
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from convnext_kernels import fuse, fusion_report, unfuse
from model_families import assert_same, randomize, results, timm_model
from models_facebook import Block, DropPath


class InvertedBottleneck(nn.Module):
    """Expand, depthwise 7 x 7, project, each with BatchNorm; a shortcut around it."""

    def __init__(self, channels, out_channels, stride, drop_path, ratio=4):
        super().__init__()
        hidden = ratio * channels
        self.branch = nn.Sequential(
            *[nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)],
            *[nn.Conv2d(hidden, hidden, 7, stride, 3, groups=hidden, bias=False), nn.BatchNorm2d(hidden)],
            *[nn.ReLU(inplace=True), nn.Conv2d(hidden, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)],
        )
        self.drop_path = DropPath(drop_path)
        same = stride == 1 and channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.drop_path(self.branch(x)))


class ResNet20(nn.Module):
    """For CIFAR-100's images of 32 x 32 pixels: three stages of three blocks (He et al. 2016, section 4.2)."""

    def __init__(self, drop_path=0.0, classes=100):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16] * 3 + [32] * 3 + [64] * 3
        blocks = [
            InvertedBottleneck(before, width, 1 + (before != width), drop_path * i / 8)
            for i, (before, width) in enumerate(zip([16, *widths], widths))
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def cifar_images(n=4, seed=1):
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def operators_in(y):
    """How often the depthwise convolution's operator is in the autograd graph."""
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return sum("DepthwiseConv2dFunction" in node.name() for node in seen)


@pytest.mark.parametrize("training", [True, False])
def test_a_resnet_with_batch_norm(training):
    stock = randomize(ResNet20()).double().train(training)
    fused = fuse(copy.deepcopy(stock), convolutions=True)
    report = fusion_report(fused)
    assert [entry.kind for entry in report] == ["convolution"] * 9 and all(entry.fused for entry in report)
    x = cifar_images().double()
    assert operators_in(fused(x)) == 9
    assert operators_in(stock(x)) == 0
    assert_same(results(fused, x), results(stock, x), rtol=1e-9)
    for ours, theirs in zip(fused.buffers(), stock.buffers()):
        torch.testing.assert_close(ours, theirs)  # BatchNorm's running statistics
    assert_same(results(unfuse(fused), x), results(stock, x), rtol=1e-12)
    assert fused.blocks[0].branch[3].__class__ is nn.Conv2d


def test_training_agrees_step_by_step():
    losses = {}
    for kind in ("stock", "fused"):
        torch.manual_seed(0)
        model = ResNet20(drop_path=0.2).double()
        if kind == "fused":
            fuse(model, convolutions=True).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        losses[kind] = []
        for step in range(4):
            loss = F.cross_entropy(model(cifar_images(8, step).double()), torch.arange(8) * 12)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[kind].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["stock"], rel=1e-7)


@pytest.mark.parametrize(
    "make, fused",
    [
        (lambda: timm.create_model("mobilenetv3_small_050"), 11),  # 3 x 3 and 5 x 5, stride 1 and 2
        (lambda: timm.models.convmixer.ConvMixer(dim=16, depth=2, kernel_size=9, patch_size=4, act_layer=nn.GELU), 2),
        (lambda: timm.create_model("edgenext_xx_small"), 15),
    ],
    ids=["mobilenetv3", "convmixer", "edgenext"],
)
def test_other_networks(make, fused):
    stock = randomize(make()).double().eval()
    model = fuse(copy.deepcopy(stock), convolutions=True, norms=False)
    report = fusion_report(model, convolutions=True)
    assert sum(entry.fused for entry in report if entry.kind == "convolution") == fused
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_same(results(model, x), results(stock, x), rtol=1e-8)


def test_what_is_not_asked_for_stays():
    model = timm_model(act_layer="relu")  # its blocks are not covered
    with pytest.warns(UserWarning, match="left 5 of 5"):
        fuse(model)
    assert all(entry.kind != "convolution" for entry in fusion_report(model))
    listed = [entry for entry in fusion_report(model, convolutions=True) if entry.kind == "convolution"]
    assert len(listed) == 5 and all(entry.reason == "can be fused" for entry in listed)
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="left 5 of 5"):
        fuse(model, convolutions=True)
    assert str(fusion_report(model)).splitlines()[-1] == "0 of 5 blocks, 0 of 5 norms and 5 of 5 convolutions fused"
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), before(x))
    # A block's own convolution is the block's business.
    model = fuse(timm_model(), convolutions=True)
    assert all(entry.kind != "convolution" for entry in fusion_report(model, convolutions=True))


@pytest.mark.parametrize(
    "conv, reason",
    [
        (nn.Conv2d(8, 16, 7, padding=3, groups=8), "out_channels 16, not 8"),
        (nn.Conv2d(8, 8, 7, padding=3, groups=8, dilation=2), r"dilation \(2, 2\), not \(1, 1\)"),
        (nn.Conv2d(8, 8, 7, 3, 3, groups=8), r"stride \(3, 3\), not \(1, 1\) or \(2, 2\)"),
        (nn.Conv2d(8, 8, 7, padding=2, groups=8), r"padding \(2, 2\), not 3"),
        (nn.Conv2d(8, 8, (1, 7), padding=(0, 3), groups=8), r"kernel size \(1, 7\)"),
        (nn.Conv2d(8, 8, 13, padding=6, groups=8), r"kernel size \(13, 13\)"),
        (nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode="reflect"), "padding_mode 'reflect'"),
        (timm.layers.Conv2dSame(8, 8, 7, groups=8), "Conv2dSame, not a torch.nn.Conv2d"),
        (torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 7, padding=3, groups=8)), "ParametrizedConv2d"),
    ],
)
def test_convolutions_that_are_not_covered(conv, reason):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), conv)
    (entry,) = fusion_report(model, convolutions=True)
    assert not entry.fused and entry.name == "1"
    assert re.search(reason, entry.reason)
    with pytest.raises(ValueError, match="found no ConvNeXt block or depthwise convolution that is covered in Seq"):
        fuse(model, convolutions=True)


def covered():
    return nn.Sequential(nn.Conv2d(8, 8, 7, padding=3, groups=8))


def test_only_what_is_depthwise_is_listed():
    model = nn.Sequential(nn.Conv2d(3, 8, 7, padding=3), nn.Conv2d(8, 8, 7, padding=3, groups=4), nn.Conv2d(1, 1, 3))
    assert fusion_report(model, convolutions=True) == []
    with pytest.raises(ValueError, match="found no ConvNeXt block in Sequential"):
        fuse(covered())


def test_a_convolution_set_differently_after_fusing(caplog):
    model = fuse(covered(), convolutions=True)
    model[0].dilation, model[0].padding = (2, 2), (6, 6)
    x = torch.randn(2, 8, 9, 9)
    with caplog.at_level(logging.WARNING, logger="convnext_kernels"):
        torch.testing.assert_close(
            model(x), F.conv2d(x, model[0].weight, model[0].bias, padding=6, dilation=2, groups=8)
        )
    assert "runs unfused: since it was fused, it was set differently" in caplog.text
    (entry,) = fusion_report(model)
    assert entry.fused and entry.reason == "runs unfused: since it was fused, it was set differently"


def test_a_single_image_copies_and_portable_graphs():
    model = fuse(covered(), convolutions=True)
    x = torch.randn(2, 8, 9, 9)
    expected = unfuse(copy.deepcopy(model))(x)
    torch.testing.assert_close(model(x[0]), expected[0])
    torch.testing.assert_close(model[0](input=x), expected)
    torch.testing.assert_close(model[0](input=x[0]), expected[0])
    torch.testing.assert_close(torch.fx.symbolic_trace(model[0])(x), expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert fusion_report(other)[0].fused
        assert torch.equal(other(x), model(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("layer", ["convolution", "block"])
def test_a_result_can_be_changed_in_place(layer, device):
    model = covered() if layer == "convolution" else nn.Sequential(Block(8))
    fuse(model.append(nn.ReLU(inplace=True)), convolutions=True).to(device)
    x = torch.randn(2, 8, 9, 9, device=device)
    y = model(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert all(parameter.grad.shape == parameter.shape for parameter in model.parameters())
