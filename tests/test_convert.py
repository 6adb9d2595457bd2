"""fuse, unfuse and fusion_report: what is swapped and what stays, for every family."""

import copy
import functools
import inspect
import io
import pickle
import warnings

import pytest
import timm
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
import torchvision
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.nn import functional as F

from convnext_kernels import FusedConvNeXtBlock, ReferenceConvNeXtBlock, fuse, fusion_report, unfuse
from model_families import (
    BLOCKS,
    CLASSES,
    FAMILIES,
    NORMS,
    assert_same,
    blocks_of,
    counts,
    images,
    randomize,
    results,
    timm_model,
)
from models_facebook import Block, BlockV2
from numerics import assert_close

family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())


def fused_nodes(y):
    """How often the block's operator is in the autograd graph."""
    seen, stack, found = set(), [y.grad_fn], 0
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += "ConvNeXtBlockFunction" in node.name()
        stack += [parent for parent, _ in node.next_functions]
    return found


# --- what fuse promises, for every family


@family
def test_every_block_and_norm_is_fused_and_computes_the_same(make):
    model = randomize(make())
    x = images()
    expected = results(model, x)
    assert fuse(model) is model
    assert counts(model) == (BLOCKS, NORMS)
    assert fused_nodes(model(x)) == BLOCKS
    assert_same(results(model, x), expected)


@family
def test_parameters_names_and_state_dict_stay(make):
    model = make()
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    keys = {name: value.shape for name, value in model.state_dict().items()}
    fuse(model)
    assert all(model.get_parameter(name) is parameter for name, parameter in parameters.items())
    assert [name for name, _ in model.named_parameters()] == list(parameters)
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert {name: value.shape for name, value in model.state_dict().items()} == keys
    for name, gradient in results(model, images()).items():
        assert name == "output" or gradient.shape == parameters[name].shape
    other = randomize(make())
    model.load_state_dict(other.state_dict())
    assert_same(results(model, images()), results(other, images()))


@family
def test_unfuse_gives_the_original_blocks_back(make):
    model = randomize(make(0.2))
    before = {name: (module, type(module), set(vars(module))) for name, module in model.named_modules()}
    fuse(model)
    model.eval()
    assert unfuse(model) is model
    for name, module in model.named_modules():
        assert (module, type(module), set(vars(module))) == before[name]
        assert not module.training
    assert counts(model) == (0, 0)
    assert unfuse(model) is model


@family
def test_equal_seeds_drop_equal_samples(make):
    model = randomize(make(0.5)).train()
    x = images(6)
    expected = results(model, x, seed=7)
    fuse(model)
    assert_same(results(model, x, seed=7), expected)
    other = results(model, x, seed=8)["output"]
    assert (other - expected["output"]).abs().max() > 0.01


@family
def test_bf16_autocast_and_pure_bf16(make):
    model = randomize(make())
    x = images()
    truth = results(copy.deepcopy(model).double(), x.double())["output"]
    fused = fuse(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(fused(x), model(x), truth, "autocast", unit=2**-9)
    fused, model = fused.bfloat16(), model.bfloat16()
    assert_close(fused(x.bfloat16()), model(x.bfloat16()), truth, "pure")


@family
def test_copies_and_files(make):
    model = fuse(randomize(make(0.2))).eval()
    x = images()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert counts(copied) == (BLOCKS, NORMS)
        assert torch.equal(copied(x), model(x))
        with torch.no_grad():
            for parameter in copied.parameters():
                parameter.zero_()
        assert copied(x).abs().max() == 0
        assert [type(block) for block in blocks_of(unfuse(copied))] == [
            type(block)._original_class for block in blocks_of(model)
        ]
    assert model(x).abs().max() > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@family
def test_autocast_keeps_the_dtypes(make, device):
    """What each fused module returns is of the dtype that it returned before; on CUDA the residual stream is fp32."""
    model = randomize(make(0.5)).to(device).train()
    names = [entry.name for entry in fusion_report(model)]

    def run():
        dtypes = {}
        hooks = [
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: dtypes.update({name: output.dtype})
            )
            for name in names
        ]
        torch.manual_seed(5)
        with torch.autocast(device, torch.bfloat16):
            y = model(images(6).to(device))
        for handle in hooks:
            handle.remove()
        return dtypes, y

    dtypes, expected = run()
    fuse(model)
    assert counts(model) == (BLOCKS, NORMS)
    got_dtypes, got = run()
    assert got_dtypes == dtypes
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@family
def test_compiles_without_graph_break(make):
    torch._dynamo.reset()
    model = fuse(randomize(make(0.5))).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    expected = model(images())
    torch.manual_seed(5)
    torch.testing.assert_close(compiled(images()), expected)


# --- living with a fused model


def test_an_optimizer_built_before_keeps_working():
    plain, fused = randomize(timm_model()), randomize(timm_model())
    losses = {}
    for name, model in (("plain", plain), ("fused", fused)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if name == "fused":
            fuse(model)
        losses[name] = []
        for _ in range(3):
            loss = F.cross_entropy(model(images()), torch.tensor([0, 1, 2]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    assert losses["fused"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["fused"][2] < losses["fused"][0]


def test_fusing_twice_changes_nothing_but_recompute():
    model = fuse(timm_model())
    types = [type(module) for module in model.modules()]
    assert fuse(model, recompute=False) is model
    assert [type(module) for module in model.modules()] == types
    assert not blocks_of(model)[0]._fused_plan.recompute


def test_recompute_false_keeps_the_hidden_tensor():
    def saved(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(images())
        return sum(sizes)

    assert saved(fuse(timm_model(), recompute=False)) > 1.2 * saved(fuse(timm_model()))


def test_norms_can_be_left():
    model = fuse(timm_model(), norms=False)
    assert counts(model) == (BLOCKS, 0)
    assert counts(fuse(model)) == (BLOCKS, NORMS)


@pytest.mark.parametrize(
    "block", [Block(8), BlockV2(8), ReferenceConvNeXtBlock(8, 0.1), ReferenceConvNeXtBlock(8, use_grn=True)]
)
def test_a_block_alone(block):
    randomize(block).eval()
    x = torch.randn(2, 8, 5, 6)
    expected = block(x)
    assert fuse(block) is block
    assert counts(block) == (1, 0)
    assert fused_nodes(block(x)) == 1
    torch.testing.assert_close(block(x), expected)


def test_our_own_block_counts_as_fused():
    model = nn.Sequential(FusedConvNeXtBlock(8), nn.Conv2d(8, 8, 1))
    fuse(model, recompute=False)
    assert counts(model) == (1, 0)
    assert type(model[0]) is FusedConvNeXtBlock
    assert not model[0].recompute


def test_isinstance_holds():
    model = fuse(timm_model())
    assert all(isinstance(block, ConvNeXtBlock) for block in blocks_of(model))
    assert all(type(block).__name__ == "FusedConvNeXtBlock" for block in blocks_of(model))


def test_moving_freezing_and_assigning():
    model = fuse(randomize(timm_model()))
    expected = results(model, images())
    double = results(model.double(), images().double())
    assert double["output"].dtype == torch.float64
    assert_same({name: value.float() for name, value in double.items()}, expected)
    model.float().load_state_dict(randomize(timm_model(), seed=5).state_dict(), assign=True)
    assert_same(results(model, images()), results(randomize(timm_model(), seed=5), images()))
    model.requires_grad_(False)
    model.stages[1].blocks[0].mlp.fc1.weight.requires_grad_()
    got = results(model, images())
    assert got.keys() == {"output", "stages.1.blocks.0.mlp.fc1.weight"}
    plain = unfuse(copy.deepcopy(model))
    assert_same(got, results(plain, images()))


def test_meta_device_and_materialising():
    with torch.device("meta"):
        model = fuse(timm_model())
    assert counts(model) == (BLOCKS, NORMS)
    assert model(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, CLASSES)
    model.to_empty(device="cpu").load_state_dict(randomize(timm_model()).state_dict())
    assert_same(results(model, images()), results(randomize(timm_model()), images()))


def test_under_a_fake_tensor_mode():
    model, mode = randomize(timm_model()), FakeTensorMode()
    with FakeCopyMode(mode):
        fake = copy.deepcopy(model)
    expected = results(model, images())
    with mode:
        assert counts(fuse(model)) == counts(fuse(fake)) == (BLOCKS, NORMS)
        y = fake(torch.empty(2, 3, 64, 64))
    assert y.shape == (2, CLASSES)
    assert fused_nodes(y) == BLOCKS
    assert_same(results(model, images()), expected)


def test_functional_call():
    model = randomize(timm_model())
    other = {name: value.detach() for name, value in randomize(timm_model(), seed=5).named_parameters()}
    expected = torch.func.functional_call(model, other, (images(),))
    torch.testing.assert_close(torch.func.functional_call(fuse(model), other, (images(),)), expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant, monkeypatch):
    model = randomize(timm_model(0.5)).train()
    expected = results(model, images(6), seed=7)
    fuse(model).set_grad_checkpointing()
    checkpoint = functools.partial(timm.models._manipulate.checkpoint, use_reentrant=use_reentrant)
    monkeypatch.setattr(timm.models._manipulate, "checkpoint", checkpoint)
    assert_same(results(model, images(6).requires_grad_(), seed=7), expected)


def test_training_and_evaluation_modes():
    model = fuse(randomize(timm_model(0.5)))
    torch.manual_seed(0)
    assert not torch.equal(model.train()(images()), model(images()))
    assert torch.equal(model.eval()(images()), model(images()))
    # The probability is read at each call.
    model.train()
    for block in blocks_of(model):
        if isinstance(block.drop_path, timm.layers.DropPath):
            block.drop_path.drop_prob = 0.0
    assert torch.equal(model(images()), model(images()))


def test_stochastic_depth_of_whole_batches():
    model = randomize(FAMILIES["torchvision"](0.5)).train()
    for module in model.modules():
        if isinstance(module, torchvision.ops.StochasticDepth):
            module.mode = "batch"
    expected = results(model, images(), seed=3)
    assert counts(fuse(model)) == (BLOCKS, NORMS)
    assert_same(results(model, images(), seed=3), expected)


@family
def test_the_input_can_be_given_by_its_name(make):
    """As the original calls it: `input`, `features`, `hidden_states`."""
    model = make()
    layers = {}
    hooks = [
        model.get_submodule(entry.name).register_forward_pre_hook(
            lambda layer, inputs: layers.update({layer: inputs[0]})
        )
        for entry in fusion_report(model)
    ]
    names = {layer: next(iter(inspect.signature(layer.forward).parameters)) for layer in model.modules()}
    fuse(model)(images())
    for hook in hooks:
        hook.remove()
    assert len(layers) == BLOCKS + NORMS
    for layer, x in list(layers.items()):
        expected = layer(x)
        assert torch.equal(layer.forward(**{names[layer]: x}), expected)
        assert torch.equal(layer.forward(x=x), expected)
        with pytest.raises(TypeError, match=rf"\.forward\(\) is missing its argument '{names[layer]}'"):
            layer.forward()
        with pytest.raises(TypeError, match=r"\.forward\(\) got an unexpected argument 'other'"):
            layer.forward(x, other=x)
    torch._dynamo.reset()
    block = blocks_of(model)[0]
    compiled, x = torch.compile(block, fullgraph=True, backend="eager"), layers[block]
    torch.testing.assert_close(compiled(**{names[block]: x}), block(x))


def test_hooks_on_a_block_itself_still_run():
    model = timm_model()
    seen = []
    model.stages[0].blocks[0].register_forward_hook(lambda *arguments: seen.append("before"))
    fuse(model)
    model.stages[0].blocks[0].register_forward_hook(lambda *arguments: seen.append("after"))
    model(images())
    assert seen == ["before", "after"]
    assert counts(model) == (BLOCKS, NORMS)


def test_a_nchw_input_and_an_empty_batch():
    model = fuse(randomize(timm_model()))
    x = images()
    torch.testing.assert_close(model(x), model(x.contiguous(memory_format=torch.channels_last)), rtol=1e-4, atol=1e-4)
    assert model(x[:0]).shape == (0, CLASSES)


def test_portable_graphs_hold_the_original_forward():
    model = randomize(timm_model()).eval()
    x = images()
    expected = model(x)
    fuse(model)
    graph = torch.fx.symbolic_trace(model)
    assert any(node.op == "call_module" and node.target == "stages.0.blocks.0.mlp.fc1" for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(model, x)
    assert "convnext_kernels::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_scripting_says_what_to_do():
    model = fuse(randomize(FAMILIES["torchvision"]())).eval()
    with pytest.raises(RuntimeError, match=r"a FusedLayerNorm2d cannot be scripted; unfuse\(model\) first, or script"):
        torch.jit.script(model)
    assert counts(model) == (BLOCKS, NORMS)
    scripted = torch.jit.script(unfuse(copy.deepcopy(model)))
    torch.testing.assert_close(scripted(images()), model(images()))


def test_export_records_the_operators():
    model = fuse(randomize(timm_model())).eval()
    program = torch.export.export(model, (images(),))
    targets = [str(node.target) for node in program.graph.nodes]
    assert targets.count("convnext_kernels.convnext_block.default") == BLOCKS
    torch.testing.assert_close(program.module()(images()), model(images()))
