"""A FusedConvNeXtBlock whose parts are replaced, hooked, quantised or set differently: it computes what they say."""

import logging

import pytest
import timm
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from torch import nn

import convnext_kernels as ck
from convnext_kernels.parts import log_once
from model_families import halve

C = 8
FUSED = "ConvNeXtBlockFunctionBackward"


class Adapter(nn.Module):
    """A low-rank adapter around a layer, which it gives its weight as, as PEFT's do."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.delta = nn.Parameter(torch.ones(layer.out_features))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.delta


def adapter(block):
    block.pwconv1 = Adapter(block.pwconv1)


def hook(block):
    block.act.register_forward_hook(lambda module, inputs, output: output + 1)


def pruned(block):
    torch.nn.utils.prune.l1_unstructured(block.pwconv1, "weight", amount=0.5)


def forward_assigned(block):
    forward = block.norm.forward
    block.norm.forward = lambda x: forward(x) + 1


def dilated(block):
    block.dwconv.dilation, block.dwconv.padding = (2, 2), (6, 6)


def circular(block):
    block.dwconv.padding_mode = "circular"
    block.dwconv._reversed_padding_repeated_twice = [3, 3, 3, 3]


def another_activation(block):
    block.act = nn.ReLU()


def quantised(block):
    halve(block.pwconv2)


def another_drop_path(block):
    block.drop_path = nn.Hardtanh(-0.1, 0.1)


CHANGES = {
    adapter: "its 'pwconv1' has become a Adapter",
    hook: "its 'act' has got hooks, or a forward assigned to the instance",
    pruned: "its 'pwconv1' has got hooks, or a forward assigned to the instance",
    forward_assigned: "its 'norm' has got hooks, or a forward assigned to the instance",
    dilated: "the stride, dilation or padding mode of its 'dwconv' has been changed",
    circular: "the stride, dilation or padding mode of its 'dwconv' has been changed",
    another_activation: "its 'act' has become a ReLU",
    quantised: "it holds a Halved, not an ordinary parameter",
    another_drop_path: "its 'drop_path' has become a Hardtanh",
}
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


def pair(**options):
    blocks = ck.ReferenceConvNeXtBlock(C, **options), ck.FusedConvNeXtBlock(C, **options)
    with torch.no_grad():
        for theirs, ours in zip(*(block.parameters() for block in blocks), strict=True):
            ours.copy_(theirs.normal_(std=0.5))
    return blocks


def results(block, x):
    x = x.clone().requires_grad_()
    y = block(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in block.parameters())]


@changes
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_a_changed_part_is_called(change, use_grn, caplog):
    log_once.cache_clear()
    theirs, ours = pair(use_grn=use_grn)
    x = torch.randn(2, C, 9, 9)
    plain = ours(x)
    change(theirs)
    change(ours)
    with caplog.at_level(logging.WARNING, "convnext_kernels"):
        got, expected = results(ours, x), results(theirs, x)
    assert not torch.allclose(plain, got[0])
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        if other is None:
            assert one is None
        else:
            torch.testing.assert_close(one, other)
    assert [record.getMessage() for record in caplog.records] == [f"FusedConvNeXtBlock runs unfused: {CHANGES[change]}"]
    (entry,) = ck.fusion_report(nn.Sequential(ours))
    assert entry.fused and entry.reason == f"runs unfused: {CHANGES[change]}"


@changes
def test_visible_patches_need_all_parts(change):
    _, block = pair()
    change(block)
    visible = ck.VisiblePatches(torch.tensor([[0, 3], [1, 2]]), (2, 2))
    with pytest.raises(RuntimeError, match=f"FusedConvNeXtBlock cannot run on visible patches: {CHANGES[change]}"):
        block(torch.randn(4, C, 4, 4), visible)


def test_an_adapter_in_a_compiled_block():
    torch._dynamo.reset()
    theirs, ours = pair()
    adapter(theirs)
    adapter(ours)
    compiled, x = torch.compile(ours, fullgraph=True, backend="aot_eager"), torch.randn(2, C, 6, 6)
    torch.testing.assert_close(compiled(x), theirs(x))


def weight_norm(block):
    torch.nn.utils.parametrizations.weight_norm(block.pwconv2)
    with torch.no_grad():
        block.pwconv2.parametrizations.weight.original0.mul_(2)


def no_drop_path(block):
    block.drop_path = nn.Identity()


def no_layer_scale(block):
    block.gamma = None


def rounder(block):
    block.norm.eps, block.act.approximate = 0.5, "tanh"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("change", [weight_norm, no_drop_path, no_layer_scale, rounder])
def test_what_the_operator_can_do_stays_fused(change, compiled):
    torch._dynamo.reset()
    theirs, ours = pair(drop_path=0.5, use_grn=True, layer_scale_init_value=1.0)
    x = torch.randn(2, C, 9, 9)
    for block in (theirs, ours):
        change(block)
        if change is not no_drop_path:
            block.eval()
    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    torch.testing.assert_close(run(x), theirs(x))
    assert compiled or ours(x).grad_fn.name() == FUSED
    assert not ck.fusion_report(nn.Sequential(ours))[0].reason


def test_a_drop_path_of_another_library_draws_as_it_does():
    theirs, ours = pair()
    for block in (theirs, ours):
        block.drop_path = timm.layers.DropPath(0.5)
    outputs = []
    for block in (theirs, ours):
        torch.manual_seed(3)
        outputs.append(block(torch.ones(8, C, 5, 5)))
    torch.testing.assert_close(*outputs)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_portable_graphs_hold_the_parts():
    _, block = pair(use_grn=True)
    x = torch.randn(2, C, 6, 6)
    graph = torch.fx.symbolic_trace(block)
    assert any(node.op == "call_module" and node.target == "pwconv1" for node in graph.graph.nodes)
    traced = torch.jit.trace(block, torch.ones(1, C, 5, 5))
    assert "convnext_kernels::" not in str(traced.inlined_graph)
    for recorded in (graph, traced):
        torch.testing.assert_close(recorded(x), block(x))
    with pytest.raises(RuntimeError, match=r"FusedConvNeXtBlock cannot be scripted; torch.export or torch.jit.trace"):
        torch.jit.script(nn.Sequential(block))
