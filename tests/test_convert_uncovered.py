"""What fuse leaves alone, and why; other modules beside it."""

import functools
import warnings

import pytest
import timm
import torch
import torchvision
from timm.models.convnext import ConvNeXtBlock
from torch import nn
from torch.nn import functional as F

from convnext_kernels import fuse, fusion_report, unfuse
from model_families import (
    BLOCKS,
    DEPTHS,
    DIMS,
    FAMILIES,
    NORMS,
    assert_same,
    counts,
    images,
    official,
    randomize,
    reasons,
    results,
    timm_model,
)
from models_facebook import Block, BlockV2, ConvNeXt, DropPath

family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())


# --- what is not covered


def left_alone(block):
    """Fuses a block that is not covered; its reason."""
    x = torch.randn(2, 8, 6, 6)
    block.eval()
    expected, cls = block(x), type(block)
    with pytest.warns(UserWarning, match="fuse left 1 of 1 ConvNeXt blocks alone"):
        assert fuse(block) is block
    assert type(block) is cls
    assert torch.equal(block(x), expected)
    return reasons(block)[""]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"act_layer": "relu"}, "its activation is ReLU, not GELU"),
        ({"act_layer": "quick_gelu"}, "its activation is QuickGELU, not GELU"),
        ({"norm_layer": timm.layers.RmsNorm}, "its 'norm': timm.layers.norm.RmsNorm is no LayerNorm"),
        ({"norm_layer": timm.layers.SimpleNorm}, "its 'norm': timm.layers.norm.SimpleNorm is no LayerNorm"),
        ({"norm_layer": nn.BatchNorm2d, "conv_mlp": True}, "BatchNorm2d is no LayerNorm"),
        ({"stride": 2}, "its shortcut is a Downsample"),
        ({"out_chs": 16}, "its shortcut is a Downsample"),
        ({"dilation": (2, 2)}, "its convolution has dilation (2, 2), not (1, 1)"),
        ({"kernel_size": 13}, "its convolution has kernel size (13, 13)"),
    ],
)
def test_uncovered_timm_blocks(arguments, reason):
    assert reason in left_alone(randomize(ConvNeXtBlock(8, **arguments)))


@pytest.mark.parametrize(
    "arguments",
    [
        {"act_layer": "gelu_tanh"},
        {"act_layer": nn.GELU},
        {"act_layer": functools.partial(nn.GELU, approximate="tanh")},
        {"ls_init_value": None},
        {"conv_bias": False},
        {"use_grn": True},
        {"use_grn": True, "conv_mlp": True, "ls_init_value": None},
        {"kernel_size": 3, "mlp_ratio": 2.5},
        {"kernel_size": 11},
        {"norm_layer": functools.partial(timm.layers.LayerNorm, eps=1e-3)},
        {"norm_layer": functools.partial(timm.layers.LayerNorm, affine=False)},
        {"norm_layer": timm.layers.LayerNormFp32},
        {"norm_layer": timm.layers.LayerNorm2dFp32, "conv_mlp": True},
    ],
)
def test_covered_timm_blocks(arguments):
    block = randomize(ConvNeXtBlock(8, **arguments))
    x = torch.randn(2, 8, 6, 6)
    expected = results(block, x)
    assert counts(fuse(block)) == (1, 0)
    assert_same(results(block, x), expected)


@pytest.mark.parametrize("name", timm.list_models("convnext*") + timm.list_models("test_convnext*"))
def test_every_timm_architecture_fuses_or_says_why(name):
    with torch.device("meta"):
        model = timm.create_model(name, depths=(1, 1, 1, 1), dims=DIMS, drop_path_rate=0.1)
    uncovered = {
        "convnext_atto_rms": "RmsNorm2d is no LayerNorm",
        "convnext_zepto_rms": "SimpleNorm2d is no LayerNorm",
        "convnext_zepto_rms_ols": "SimpleNorm2d is no LayerNorm",
        "test_convnext3": "its activation is SiLU, not GELU",
    }.get(name)
    if uncovered:
        with pytest.warns(UserWarning, match="fuse left 4 of 4 ConvNeXt blocks alone"):
            fuse(model)
        assert len(reasons(model)) == 4
        assert all(uncovered in reason for reason in reasons(model).values())
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fuse(model)
    assert counts(model) == ((0, 0) if uncovered else (4, NORMS))
    # Every other normalisation in the model is that of a block.
    named = {name for name, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    around = {name for name in named if ".blocks." not in name and not name.endswith("head")}
    assert around == {entry.name for entry in fusion_report(model) if entry.kind == "norm"}


def test_an_output_stride_leaves_dilated_stages_alone():
    model = randomize(timm_model(output_stride=8)).eval()
    expected = model(images())
    with pytest.warns(UserWarning, match="dilation"):
        fuse(model)
    assert set(reasons(model)) == {"stages.2.blocks.0", "stages.3.blocks.0"}
    torch.testing.assert_close(model(images()), expected)


def test_features_only():
    model = timm.create_model("convnext_atto", depths=(1, 1, 1, 1), features_only=True)
    expected = randomize(model)(images())
    assert counts(fuse(model)) == (4, 4)
    for got, wanted in zip(model(images()), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_torchvision_features_alone():
    model = FAMILIES["torchvision"]().features
    assert counts(fuse(model)) == (BLOCKS, NORMS - 1)


def test_dropout_in_the_mlp():
    block = ConvNeXtBlock(8)
    block.mlp.drop1.p = 0.1
    assert left_alone(block) == "its 'mlp.drop1' is a dropout with p = 0.1"


def test_dropout_switched_on_after_fusing():
    block = fuse(randomize(ConvNeXtBlock(8)))
    block.mlp.drop1.p = 1.0
    x = torch.randn(2, 8, 6, 6)
    bias = (block.mlp.fc2.bias * block.gamma).view(-1, 1, 1)
    torch.testing.assert_close(block(x), x + bias)


class Overriding(ConvNeXtBlock):
    def forward(self, x):
        return 2 * super().forward(x)


class OnlyInit(ConvNeXtBlock):
    def __init__(self, dim):
        super().__init__(dim, kernel_size=5)


def test_subclasses():
    assert left_alone(Overriding(8)) == "its class Overriding overrides the forward of ConvNeXtBlock"
    assert counts(fuse(OnlyInit(8))) == (1, 0)


def test_a_forward_assigned_to_the_block():
    block = ConvNeXtBlock(8)
    block.forward = lambda x: x
    assert left_alone(block) == "it has a forward assigned to the instance"


class PostNorm(Block):
    """The official structure with another computation: only a trial can tell."""

    def forward(self, x):
        return super().forward(x) + self.dwconv(x) * 1e-3


class UnscaledGRN(BlockV2):
    """The same but for an epsilon."""

    class GRN(nn.Module):
        def __init__(self, dim):
            super().__init__()
            self.gamma, self.beta = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

        def forward(self, x):
            norms = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
            return self.gamma * (x * (norms / (norms.mean(-1, keepdim=True) + 1e-5))) + self.beta + x

    def __init__(self, dim):
        super().__init__(dim)
        self.grn = self.GRN(4 * dim)


class ElementwiseDropPath(DropPath):
    def forward(self, x):
        return F.dropout(x, self.drop_prob, self.training)


class DropsBeforeScale(Block):
    """Drop path where it should not be."""

    def forward(self, x):
        branch = self.norm(self.dwconv(self.drop_path(x)).permute(0, 2, 3, 1))
        return x + (self.gamma * self.pwconv2(self.act(self.pwconv1(branch)))).permute(0, 3, 1, 2)


class Failing(Block):
    def forward(self, x):
        if x.dtype == torch.float64:
            raise RuntimeError("no fp64 here")
        return super().forward(x)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (PostNorm(8), "its forward computes something else than a ConvNeXt block"),
        (UnscaledGRN(8), "its forward computes something else than a ConvNeXt block"),
        (DropsBeforeScale(8, 0.1), "its forward computes something else than a ConvNeXt block"),
        (Failing(8), "a trial of its forward failed: RuntimeError: no fp64 here"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_official_structure_with_another_forward(block, reason):
    assert reason in left_alone(randomize(block))


def test_another_drop_path():
    block = Block(8, 0.5)
    block.drop_path = ElementwiseDropPath(0.5)
    assert "computes something else" in left_alone(block)
    block.drop_path = nn.Tanh()
    assert left_alone(block) == "its 'drop_path' is a Tanh, not a known drop path"


def test_surplus_modules_and_parameters():
    block = Block(8)
    block.extra = nn.Parameter(torch.zeros(3))
    assert left_alone(block) == "it holds 'extra', which has no place in a ConvNeXt's"
    block = ConvNeXtBlock(8)
    block.attention = nn.Linear(8, 8)
    assert left_alone(block) == "it has a 'attention', which has no place in a ConvNeXt block"
    block = Block(8)
    block.register_buffer("scale", torch.ones(8))
    assert left_alone(block) == "it holds 'scale', which has no place in a ConvNeXt's"


class QuantisedLinear(nn.Module):
    """Eight-bit weights in a buffer, as quantisation libraries replace nn.Linear."""

    def __init__(self, layer):
        super().__init__()
        self.scale = layer.weight.detach().abs().max() / 127
        self.register_buffer("weight", (layer.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = layer.bias

    def forward(self, x):
        return F.linear(x, self.weight * self.scale, self.bias)


def test_quantised_layers_and_other_dtypes():
    block = ConvNeXtBlock(8)
    block.mlp.fc1 = QuantisedLinear(block.mlp.fc1)
    assert "QuantisedLinear, not a torch.nn.Linear" in left_alone(block)
    block = ConvNeXtBlock(8)
    block.conv_dw.weight = nn.Parameter(torch.zeros(8, 1, 7, 7, dtype=torch.complex64))
    with pytest.warns(UserWarning, match=r"its 'conv_dw\.weight' has dtype torch\.complex64"):
        fuse(block)


def test_parameters_on_two_devices():
    block = ConvNeXtBlock(8)
    block.norm.to("meta")
    with pytest.warns(UserWarning, match="its parameters are spread over cpu, meta"):
        fuse(block)


def test_the_trial_leaves_no_trace():
    """Neither the random generator, nor the training flags, nor the block's own hooks notice it."""
    block = Block(8, 0.5)
    called = []
    block.register_forward_hook(lambda *arguments: called.append(1))
    block.act.eval()
    state, flags = torch.get_rng_state(), [module.training for module in block.modules()]
    fusion_report(block)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in block.modules()] == flags
    assert not called
    assert block.drop_path.drop_prob == 0.5


# --- models with no ConvNeXt, or with other things beside it


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.TransformerEncoderLayer(8, 2),
        torchvision.models.efficientnet_b0(),
        timm.create_model("edgenext_xx_small"),
        timm.create_model("resnet10t"),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_model_without_blocks(model):
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"fuse: argument 'model': found no ConvNeXt block in \w+; nothing changed"):
        fuse(model)
    assert [type(module) for module in model.modules()] == types
    assert fusion_report(model) == []
    assert str(fusion_report(model)) == "no ConvNeXt block found"


@pytest.mark.parametrize("model", [None, Block, torch.zeros(3), {}])
def test_not_a_module(model):
    for function in (fuse, unfuse, fusion_report):
        message = rf"{function.__name__}: argument 'model': expected a torch\.nn\.Module, got "
        with pytest.raises(TypeError, match=message):
            function(model)


class TwoTowers(nn.Module):
    """A ConvNeXt for images and a transformer with a convolutional neck beside it."""

    def __init__(self, image):
        super().__init__()
        self.image = image
        self.positions = nn.Parameter(torch.zeros(16))
        self.text = nn.TransformerEncoderLayer(16, 2)
        self.neck = nn.Sequential(nn.Conv2d(16, 16, 1), timm.layers.LayerNorm2d(16))
        self.norm = nn.LayerNorm(16)


@family
def test_norms_of_other_parts_stay(make):
    model = fuse(TwoTowers(make()))
    assert counts(model) == (BLOCKS, NORMS)
    assert type(model.norm) is type(model.text.norm1) is nn.LayerNorm
    assert type(model.neck[1]) is timm.layers.LayerNorm2d


def test_norms_of_a_foreign_head_stay():
    model = timm_model()
    model.head = nn.Sequential(model.head.global_pool, nn.Flatten(2), nn.TransformerEncoderLayer(1, 1))
    assert counts(fuse(model)) == (BLOCKS, NORMS - 1)
    assert type(model.head[2].norm1) is nn.LayerNorm


def test_hooks_on_a_norm_itself_still_run():
    model = timm_model()
    seen = []
    model.stem[1].register_forward_hook(lambda *arguments: seen.append(1))
    assert counts(fuse(model)) == (BLOCKS, NORMS)
    model(images())
    assert seen == [1]


def test_a_norm_with_a_forward_assigned_is_left_alone():
    model = timm_model()
    model.stem[1].forward = lambda x: x
    assert counts(fuse(model)) == (BLOCKS, NORMS - 1)
    assert reasons(model, "norm") == {"stem.1": "it has a forward assigned to the instance"}


def test_a_norm_that_is_none_is_left_alone():
    model = timm_model()
    model.head.norm = timm.layers.RmsNorm2d(DIMS[-1])
    assert counts(fuse(model)) == (BLOCKS, NORMS - 1)
    assert reasons(model, "norm") == {"head.norm": "timm.layers.norm.RmsNorm2d is no LayerNorm that the kernels cover"}


class ShiftedNorm(type(official().downsample_layers[0][1])):
    def forward(self, x):
        return super().forward(x) + 1


def test_an_official_norm_with_another_forward_is_left_alone():
    model = official()
    model.downsample_layers[0][1] = ShiftedNorm(DIMS[0], data_format="channels_first")
    fuse(model)
    assert "something else than layer normalisation" in reasons(model, "norm")["downsample_layers.0.1"]


def test_the_report_is_a_table():
    model = official()
    model.stages[1][0].act = nn.ReLU()
    assert all(not entry.fused for entry in fusion_report(model))
    with pytest.warns(UserWarning, match="left 1 of 5"):
        fuse(model)
    lines = str(fusion_report(model)).splitlines()
    assert lines[0].split() == ["module", "kind", "family", "fused", "reason"]
    assert lines[1].split() == ["downsample_layers.0.1", "norm", "official", "yes"]
    assert "stages.1.0             block  official  no     its activation is ReLU, not GELU" in lines
    assert lines[-1] == "4 of 5 blocks and 5 of 5 norms fused"
    assert len(lines) == 2 + BLOCKS + NORMS


def test_the_official_model_has_the_published_names():
    names = set(ConvNeXt(depths=DEPTHS, dims=DIMS).state_dict())
    assert {
        "downsample_layers.0.0.weight",
        "downsample_layers.1.0.bias",
        "stages.0.0.gamma",
        "stages.1.1.dwconv.weight",
        "stages.3.0.norm.weight",
        "stages.3.0.pwconv1.weight",
        "stages.3.0.pwconv2.bias",
        "norm.weight",
        "head.bias",
    } <= names
