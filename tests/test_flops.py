"""What PyTorch's FlopCounterMode counts for our operators."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import convnext_kernels as ck

N, C, K, SIZE, KERNEL = 2, 8, 32, 6, 7
CONVOLUTION = 2 * N * SIZE**2 * C * KERNEL**2
PRODUCT = 2 * N * SIZE**2 * C * K


def counted(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def images(requires_grad=False):
    return torch.randn(N, C, SIZE, SIZE, requires_grad=requires_grad)


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_a_forward_pass_counts_as_eager(use_grn):
    ours, theirs = ck.FusedConvNeXtBlock(C, use_grn=use_grn), ck.ReferenceConvNeXtBlock(C, use_grn=use_grn)
    assert counted(lambda: ours(images())) == counted(lambda: theirs(images())) == CONVOLUTION + 2 * PRODUCT
    with torch.autocast("cpu", torch.bfloat16):
        assert counted(lambda: ours(images())) == CONVOLUTION + 2 * PRODUCT


PARAMETERS = [name for name, _ in ck.FusedConvNeXtBlock(C, use_grn=True, layer_scale_init_value=1.0).named_parameters()]
# (what requires grad, products, convolutions) of a backward pass beside the hidden tensor's.
BACKWARDS = {
    "all": (["x", *PARAMETERS], 4, 2),
    "x": (["x"], 2, 1),
    "the convolution's weight": (["dwconv.weight"], 2, 1),
    "fc1's weight": (["pwconv1.weight"], 2, 0),
    "the norm's bias": (["norm.bias"], 1, 0),
    "fc2's weight": (["pwconv2.weight"], 1, 0),
    "layer scale": (["gamma"], 1, 0),
    "GRN's weight": (["grn.gamma"], 1, 0),
    "fc1 and fc2": (["pwconv1.weight", "pwconv2.weight"], 3, 0),
}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("case", BACKWARDS)
def test_a_backward_pass_counts_what_is_asked_for(case, recompute):
    wanted, products, convolutions = BACKWARDS[case]
    block = ck.FusedConvNeXtBlock(C, use_grn=True, layer_scale_init_value=1.0, recompute=recompute)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(name in wanted)
    y = block(images("x" in wanted))
    expected = (products + recompute) * PRODUCT + convolutions * CONVOLUTION
    assert counted(lambda: y.sum().backward()) == expected


def test_fc2s_bias_needs_no_products():
    block = ck.FusedConvNeXtBlock(C, layer_scale_init_value=0.0).requires_grad_(False)
    block.pwconv2.bias.requires_grad_(True)
    y = block(images())
    assert counted(lambda: y.sum().backward()) == 0


def test_single_operators():
    x, weight = images(True), torch.randn(C, 1, 5, 5, requires_grad=True)
    convolution = 2 * N * (SIZE // 2) ** 2 * C * 25
    y = ck.depthwise_conv2d(x, weight, stride=2)
    assert counted(lambda: ck.depthwise_conv2d(x, weight, stride=2)) == convolution
    assert counted(lambda: y.sum().backward()) == 2 * convolution
    z = torch.randn(N, 5, C, requires_grad=True)
    fc1, fc2 = torch.randn(K, C, requires_grad=True), torch.randn(C, K, requires_grad=True)
    arguments = z, None, None, None, fc1, None, None, None, fc2, None
    y, product = ck.layer_norm_mlp(*arguments), 2 * z.numel() * K
    assert counted(lambda: ck.layer_norm_mlp(*arguments)) == 2 * product
    assert counted(lambda: y.sum().backward()) == 5 * product


def test_fused_convolutions_and_visible_patches():
    model = nn.Sequential(nn.Conv2d(C, C, KERNEL, padding=KERNEL // 2, groups=C))
    expected = counted(lambda: model(images()))
    assert expected == CONVOLUTION
    ck.fuse(model, convolutions=True)
    assert counted(lambda: model(images())) == expected
    block, visible = ck.FusedConvNeXtBlock(C), ck.VisiblePatches(torch.tensor([[0, 3], [1, 2]]), (2, 2))
    # The convolution computes whole maps, of 4 x 4 here, and the MLP half of their pixels.
    whole = 2 * 2 * 16 * C
    assert counted(lambda: block(torch.randn(4, C, 2, 2), visible)) == whole * KERNEL**2 + whole * K


PROGRAM = """
import sys, torch
{first}
import convnext_kernels as ck
assert ("torch.utils.flop_counter" in sys.modules) == bool({first!r})
{second}
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    {third}
assert counter.get_total_flops() > 0
"""
OPERATOR = "ck.depthwise_conv2d(torch.ones(1, 8, 4, 4), torch.ones(8, 1, 3, 3))"
ORDERS = {
    "the counter first": ("import torch.utils.flop_counter", "", OPERATOR),
    "a block first": ("", "block = ck.FusedConvNeXtBlock(8)", "block(torch.ones(1, 8, 4, 4))"),
}


@pytest.mark.parametrize("order", ORDERS)
def test_whatever_is_imported_first(order):
    """Formulas are registered late, for what importing PyTorch's counter costs; in time all the same."""
    first, second, third = ORDERS[order]
    program = PROGRAM.format(first=first, second=second, third=third)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
