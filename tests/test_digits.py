"""A small ConvNeXt learns scikit-learn's handwritten digits: fused and reference from the same seed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import convnext_kernels as ck

sklearn_datasets = pytest.importorskip("sklearn.datasets")


class SmallConvNeXt(nn.Module):
    """Two stages for images of 8 x 8 pixels."""

    def __init__(self, block, use_grn):
        super().__init__()
        options = {"use_grn": use_grn, "layer_scale_init_value": None if use_grn else 1e-2}
        self.stem = nn.Conv2d(1, 24, 2, stride=2)
        self.stage1 = nn.Sequential(*[block(24, 0.05 * i, **options) for i in range(2)])
        self.downsample = nn.Conv2d(24, 48, 2, stride=2)
        self.stage2 = nn.Sequential(*[block(48, 0.1, **options) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(48), nn.Linear(48, 10)

    def forward(self, x):
        x = self.stage2(self.downsample(self.stage1(self.stem(x))))
        return self.head(self.norm(x.mean((2, 3))))


def train(block, use_grn, epochs=3):
    """The loss of every step and the accuracy on held-out digits."""
    digits = sklearn_datasets.load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    labels = torch.from_numpy(digits.target)
    torch.manual_seed(5)
    order = torch.randperm(len(labels))
    held_out, training = order[:300], order[300:]
    model = SmallConvNeXt(block, use_grn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    losses = []
    for _ in range(epochs):
        for batch in training[torch.randperm(len(training))].split(16):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    model.eval()
    with torch.no_grad():
        accuracy = (model(images[held_out]).argmax(1) == labels[held_out]).float().mean().item()
    return torch.tensor(losses), accuracy


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_loss_curves_agree(use_grn):
    theirs, their_accuracy = train(ck.ReferenceConvNeXtBlock, use_grn)
    ours, our_accuracy = train(ck.FusedConvNeXtBlock, use_grn)
    assert their_accuracy > 0.95 and our_accuracy > 0.95
    # Rounding differences grow along the way: the first steps agree closely, the curve as a whole in its shape.
    torch.testing.assert_close(ours[:10], theirs[:10], rtol=1e-3, atol=1e-4)
    smooth = torch.ones(1, 1, 16) / 16
    ours, theirs = (F.conv1d(curve[None, None], smooth).flatten() for curve in (ours, theirs))
    assert (ours - theirs).abs().max() < 0.15
