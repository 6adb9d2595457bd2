"""A fused block whose parts are changed, replaced, quantised or hooked afterwards: it computes what they say."""

import copy
import logging

import pytest
import torch
import torch.nn.utils.parametrizations
import torch.nn.utils.prune
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils.flop_counter import FlopCounterMode

from convnext_kernels import VisiblePatches, fuse, fusion_report, unfuse
from convnext_kernels.parts import log_once
from model_families import (
    BLOCKS,
    DIMS,
    FAMILIES,
    NORMS,
    Halved,
    HalvedByFunction,
    assert_same,
    counts,
    halve,
    images,
    randomize,
    reasons,
    results,
    timm_model,
)
from models_facebook import Block

# --- parts that change after fusing


class Adapter(nn.Linear):
    """A low-rank adapter that takes a layer's place, as LoRA does."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features)
        self.weight, self.bias = layer.weight, layer.bias
        self.delta = nn.Parameter(torch.ones(layer.out_features))

    def forward(self, x):
        return super().forward(x) + self.delta


def put_adapter(block):
    block.mlp.fc1 = Adapter(block.mlp.fc1)


def hook(block):
    block.mlp.act.register_forward_hook(lambda module, inputs, output: output + 1)


def parametrize(block):
    torch.nn.utils.parametrizations.weight_norm(block.mlp.fc2)
    with torch.no_grad():
        block.mlp.fc2.parametrizations.weight.original0.mul_(2)


def prune(block):
    torch.nn.utils.prune.l1_unstructured(block.mlp.fc1, "weight", amount=0.5)


def patch(block):
    forward = block.norm.forward
    block.norm.forward = lambda x: forward(x) + 1


def dilate(block):
    block.conv_dw.dilation, block.conv_dw.padding = (2, 2), (6, 6)


def drop_out(block):
    # In evaluation too: what matters is that the original forward runs.
    block.mlp.drop1 = nn.Hardtanh(-0.1, 0.1)


CHANGES = {
    put_adapter: "'mlp.fc1' is a test_convert_changed.Adapter, not a torch.nn.Linear",
    hook: "'mlp.act' has hooks",
    parametrize: "'mlp.fc2' is a torch.nn.utils.parametrize.ParametrizedLinear, not a torch.nn.Linear",
    prune: "'mlp.fc1' has hooks",
    patch: "'norm' has hooks, or a forward assigned",
    dilate: "dilation (2, 2)",
    drop_out: "'mlp.drop1' is a Hardtanh",
}
changes = pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)


@changes
def test_a_changed_block_is_left_alone_with_the_reason(change):
    model = randomize(timm_model()).eval()
    plain = model(images())
    change(model.stages[1].blocks[0])
    expected = model(images())
    assert not torch.allclose(plain, expected)
    with pytest.warns(UserWarning, match=r"left 1 of 5 ConvNeXt blocks alone\. stages\.1\.blocks\.0: "):
        fuse(model)
    assert counts(model) == (BLOCKS - 1, NORMS)
    assert CHANGES[change] in reasons(model)["stages.1.blocks.0"]
    torch.testing.assert_close(model(images()), expected)


@changes
def test_a_block_changed_after_fusing_runs_its_original_forward(change, caplog):
    model = randomize(timm_model()).eval()
    twin = copy.deepcopy(model)
    fuse(model)
    change(model.stages[1].blocks[0])
    change(twin.stages[1].blocks[0])
    with caplog.at_level(logging.WARNING, "convnext_kernels"):
        torch.testing.assert_close(model(images()), twin(images()))
    (entry,) = [entry for entry in fusion_report(model) if entry.reason]
    assert entry.name == "stages.1.blocks.0"
    assert entry.fused
    assert entry.reason.startswith("runs unfused: since it was fused, ")
    assert_same(results(model, images()), results(twin, images()))
    unfuse(model)
    torch.testing.assert_close(model(images()), twin(images()))


def test_grn_set_differently_after_fusing(caplog):
    model = randomize(timm_model(use_grn=True, ls_init_value=None)).eval()
    twin = copy.deepcopy(model)
    fuse(model)
    for changed in (model, twin):
        changed.stages[1].blocks[0].mlp.grn.eps = 0.5
    with caplog.at_level(logging.WARNING, "convnext_kernels"):
        torch.testing.assert_close(model(images()), twin(images()))
    (entry,) = [entry for entry in fusion_report(model) if entry.reason]
    assert entry.reason == "runs unfused: since it was fused, the eps of its 'mlp.grn' has become 0.5"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes_run_as_eager_has_them(dtype, caplog):
    """A bf16 model that keeps its norms in fp32 runs on a CPU; so does a layer scale in fp32."""
    log_once.cache_clear()
    model = randomize(timm_model()).bfloat16().eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and dtype == torch.float32:
            module.float()
        if isinstance(module, ConvNeXtBlock) and dtype == torch.bfloat16:
            module.gamma.data = module.gamma.data.float()
    block, x = model.stages[0].blocks[0], torch.randn(2, DIMS[0], 8, 8).bfloat16()
    expected = block(x)
    fuse(block)
    with caplog.at_level(logging.WARNING, "convnext_kernels"):
        got = block(x)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected)
    assert "runs unfused: it holds a parameter in torch.float32 where x is in torch.bfloat16" in caplog.text
    with torch.autocast("cpu", torch.bfloat16):  # where mixtures are what is usual
        assert block(x).grad_fn.name() == "ConvNeXtBlockFunctionBackward"


def test_unfusing_what_has_been_extended_since():
    model = fuse(timm_model())
    norm = model.stages[1].downsample[0]
    torch.nn.utils.parametrize.register_parametrization(norm, "weight", nn.Identity())
    expected = model(images())
    with pytest.raises(
        ValueError, match=r"'stages.1.downsample.0' has become a ParametrizedFused\w+ since it was fused"
    ):
        unfuse(model)
    torch.testing.assert_close(model(images()), expected)
    assert counts(model)[0] == BLOCKS
    torch.nn.utils.parametrize.remove_parametrizations(norm, "weight")
    torch.testing.assert_close(unfuse(model)(images()), expected, rtol=1e-4, atol=1e-4)
    assert counts(model) == (0, 0)


def test_unfusing_after_forward_was_wrapped_and_put_back():
    model = fuse(timm_model())
    block = model.stages[0].blocks[0]
    original = block.forward
    block.forward = lambda x: original(x)
    block.forward = original
    expected = model(images())
    unfuse(model)
    assert "forward" not in vars(block)
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)


def test_the_change_is_logged_once(caplog):
    model = fuse(timm_model())
    model.stages[0].blocks[0].mlp.fc2.register_forward_pre_hook(lambda *arguments: None)
    with caplog.at_level(logging.WARNING, "convnext_kernels"):
        model(images())
        model(images())
    (message,) = [record.message for record in caplog.records if "unfused" in record.message]
    assert message.startswith("FusedConvNeXtBlock runs unfused: since it was fused, its 'mlp.fc2' has got hooks")


# --- parameters of another class


@pytest.mark.parametrize("cls", [Halved, HalvedByFunction])
def test_parameters_that_compute_in_their_own_way(cls, caplog):
    log_once.cache_clear()
    model = randomize(timm_model()).eval()
    model.features = nn.Conv2d(3, 3, 3, padding=1, groups=3)
    paths = ["stages.1.blocks.0.mlp.fc1", "stages.2.downsample.0", "features"]
    twin = copy.deepcopy(model)
    fuse(model, convolutions=True)
    for changed in (model, twin):
        for path in paths:
            halve(changed.get_submodule(path), cls)
    x = images()
    with caplog.at_level(logging.WARNING, "convnext_kernels"):
        torch.testing.assert_close(model(model.features(x)), twin(twin.features(x)), rtol=1e-4, atol=1e-4)
    unfused = {entry.name: entry.reason for entry in fusion_report(model) if entry.reason}
    reason = f"runs unfused: it holds a {cls.__name__}, not an ordinary parameter"
    assert unfused == dict.fromkeys(["stages.1.blocks.0", *paths[1:]], reason)
    for name in ("FusedConvNeXtBlock", "FusedLayerNorm2d", "FusedConv2d"):
        assert f"{name} {reason}" in caplog.text
    if cls is Halved:  # dynamo has no as_subclass
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), twin(x), rtol=1e-4, atol=1e-4)
    # Before fusing, it is the reason to leave them alone.
    assert set(reasons(twin)) == {"stages.1.blocks.0"}
    assert reasons(twin, "norm") == {
        "stages.2.downsample.0": f"its 'weight' is a {cls.__name__}, not an ordinary parameter"
    }


class Named(nn.Parameter):
    """Has a class of its own and computes as any other."""


def test_parameters_of_a_class_that_does_nothing():
    model = randomize(timm_model())
    expected = results(model, images())
    fuse(model)
    block = model.stages[1].blocks[0]
    block.mlp.fc1.weight = Named(block.mlp.fc1.weight.detach())
    assert_same(results(model, images()), expected)
    assert not any(entry.reason for entry in fusion_report(model))
    assert counts(fuse(unfuse(model))) == (BLOCKS, NORMS)


@pytest.fixture
def mesh():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_and_distributed_parameters(mesh):
    """FSDP gathers the shards for a call: it runs fused. A module distributed otherwise runs as it would unfused."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_module, distribute_tensor

    x = torch.randn(2, 8, 6, 6)
    model = randomize(nn.Sequential(Block(8), Block(8)))
    expected = model(x)
    sharded = fully_shard(fuse(copy.deepcopy(model)), mesh=mesh)
    y = sharded(x)
    assert y.grad_fn.name() == "ConvNeXtBlockFunctionBackward"
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert type(sharded[0].gamma).__name__ == "DTensor"
    assert not any(entry.reason for entry in fusion_report(sharded))
    distributed = distribute_module(fuse(model), mesh)
    torch.testing.assert_close(distributed(distribute_tensor(x, mesh)).full_tensor(), expected)


# --- hooks on all modules

GLOBAL_HOOKS = {
    "forward_pre": lambda seen: module_hooks.register_module_forward_pre_hook(lambda m, x: seen.append(m)),
    "forward": lambda seen: module_hooks.register_module_forward_hook(lambda m, x, y: seen.append(m)),
    "backward_pre": lambda seen: module_hooks.register_module_full_backward_pre_hook(lambda m, y: seen.append(m)),
    "backward": lambda seen: module_hooks.register_module_full_backward_hook(lambda m, x, y: seen.append(m)),
}


@pytest.mark.parametrize("register", GLOBAL_HOOKS.values(), ids=GLOBAL_HOOKS.keys())
def test_a_hook_on_all_modules_sees_what_it_saw(register, caplog):
    log_once.cache_clear()
    model = randomize(timm_model())
    x, seen, expected = images().requires_grad_(), [], []
    with register(expected):
        unfused = results(model, x)
    fuse(model)
    with register(seen), caplog.at_level(logging.WARNING, "convnext_kernels"):
        hooked = results(model, x)
        reasons = {entry.reason for entry in fusion_report(model) if entry.kind == "block"}
    assert seen == expected
    assert reasons == {"runs unfused: a hook on all modules is registered"}
    assert caplog.text.count("FusedConvNeXtBlock runs unfused: a hook on all modules is registered") == 1
    assert_same(hooked, unfused)
    assert not any(entry.reason for entry in fusion_report(model))
    assert model.stages[0].blocks[0](torch.randn(2, DIMS[0], 8, 8)).grad_fn.name() == "ConvNeXtBlockFunctionBackward"


@pytest.mark.parametrize("make", [timm_model, FAMILIES["torchvision"]])
def test_floating_point_operations_are_counted(make):
    counted = []
    model = make()
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(images()).sum().backward()
        counted.append(counter.get_flop_counts())
        fuse(model)
    unfused, fused = [{key.replace("Fused", ""): flops for key, flops in counts.items()} for counts in counted]
    assert fused == unfused
    assert len(fused) > BLOCKS * 5


def test_visible_patches_under_a_hook_on_all_modules():
    block = fuse(randomize(Block(8)))
    visible = VisiblePatches(torch.tensor([[0, 3], [1, 2]]), (2, 2))
    x = torch.randn(4, 8, 4, 4)
    expected = block(x, visible)
    with GLOBAL_HOOKS["forward"]([]):
        assert torch.equal(block(x, visible), expected)


def test_a_compiled_block_under_a_hook_on_all_modules():
    torch._dynamo.reset()
    block, seen = fuse(randomize(Block(8))), []
    compiled = torch.compile(block.forward, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6)
    expected = compiled(x)
    with module_hooks.register_module_forward_hook(lambda m, x, y: seen.append(type(m))):
        torch.testing.assert_close(compiled(x), expected)
    assert seen == [nn.Conv2d, type(block.norm), nn.Linear, nn.GELU, nn.Linear, type(block.drop_path)]
    del seen[:]
    assert torch.equal(compiled(x), expected) and not seen
