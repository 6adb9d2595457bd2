"""Two real photographs through stock models of real size, before and after `fuse`: the numerics rule on everything."""

import copy

import pytest
import timm
import torch
import torchvision
import transformers
from sklearn.datasets import load_sample_images
from torch.nn import functional as F

from convnext_kernels import fuse, fusion_report
from model_families import Logits, randomize
from numerics import assert_close

SIZE = 96
MODELS = {
    "timm convnext_tiny": (lambda: timm.create_model("convnext_tiny"), 18),
    "timm convnext_atto": (lambda: timm.create_model("convnext_atto"), 12),
    "timm convnextv2_tiny": (lambda: timm.create_model("convnextv2_tiny"), 18),
    "torchvision convnext_tiny": (torchvision.models.convnext_tiny, 18),
    "transformers ConvNextV2": (
        lambda: Logits(transformers.ConvNextV2ForImageClassification(transformers.ConvNextV2Config(num_labels=1000))),
        18,
    ),
}


@pytest.fixture(scope="module")
def photographs():
    """A temple in China and a flower, (2, 3, SIZE, SIZE), normalised as ImageNet's are."""
    images = torch.stack([torch.from_numpy(image.copy()) for image in load_sample_images().images])
    x = images.permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x[..., (x.shape[-1] - x.shape[-2]) // 2 :][..., : x.shape[-2]], (SIZE, SIZE), mode="area")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def logits_and_gradients(model, x, autocast=False):
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(x)
    weights = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).sin().view_as(logits)
    (logits * weights.to(logits.dtype)).sum().backward()
    return {"logits": logits.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.fixture(scope="module", params=MODELS)
def pair(request, photographs):
    """A stock model with weights that matter, its fused copy, and the truth in fp64."""
    make, blocks = MODELS[request.param]
    stock = randomize(make()).eval()
    fused = fuse(copy.deepcopy(stock))
    report = fusion_report(fused)
    assert all(entry.fused for entry in report)
    assert sum(entry.kind == "block" for entry in report) == blocks
    return stock, fused, logits_and_gradients(copy.deepcopy(stock).double(), photographs.double())


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16 autocast"])
def test_logits_and_every_gradient(pair, photographs, autocast):
    stock, fused, truth = pair
    theirs = logits_and_gradients(stock, photographs, autocast)
    ours = logits_and_gradients(fused, photographs, autocast)
    assert ours.keys() == theirs.keys() == truth.keys()
    assert len(ours) == 1 + sum(1 for _ in stock.parameters())
    for name in truth:
        assert truth[name].abs().max() > 0, name
        assert_close(ours[name], theirs[name], truth[name], name, unit=2**-9 if autocast else 2**-24)
