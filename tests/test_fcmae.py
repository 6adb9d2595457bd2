"""Masked pretraining: blocks on visible patches, and FCMAE, against stock models that hooks put the masks into."""

import copy
import functools

import pytest
import timm
import torch
import torchvision
import transformers
from sklearn.datasets import load_sample_images
from torch import nn
from torch.nn import functional as F

import convnext_kernels as ck
from convnext_kernels import FCMAE, FusedConvNeXtBlock, VisiblePatches, fuse, fusion_report, unfuse
from convnext_kernels.fcmae import FCMAEOutput
from model_families import FAMILIES, images, official_v2, randomize, timm_model, timm_v2
from numerics import assert_close

GRID = (2, 3)
family = pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())


def pictures(n=3, seed=1, dtype=torch.float64):
    return images(n, 96, seed)[:, :, : 32 * GRID[0]].to(dtype)


def visible_patches(n=3, seed=0, mask_ratio=0.6):
    return VisiblePatches.random(n, GRID, mask_ratio, generator=torch.Generator().manual_seed(seed))


def all_patches(n):
    return VisiblePatches(torch.arange(GRID[0] * GRID[1]).repeat(n, 1), GRID)


def kept(visible, like, channels_last=False):
    """1 where a feature map shaped as `like` is visible, else 0."""
    height, width = like.shape[1:3] if channels_last else like.shape[2:]
    rows, columns = visible.grid
    mask = (~visible.mask).repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)
    return mask.unsqueeze(-1 if channels_last else 1).to(like.dtype)


def mask_by_hooks(model, visible):
    """What the paper's sparse convolutions compute, with dense ones: the input of every depthwise convolution and of
    every GRN is 0 where it is masked."""

    def hook(module, arguments, channels_last):
        return (arguments[0] * kept(visible, arguments[0], channels_last),)

    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            module.register_forward_pre_hook(functools.partial(hook, channels_last=False))
        elif "grn" in type(module).__name__.lower() or "ResponseNorm" in type(module).__name__:
            channels_last = "conv_mlp" not in model.name
            module.register_forward_pre_hook(functools.partial(hook, channels_last=channels_last))
    return model


def features(model, x):
    """What comes out of the last block of a stock model."""
    found = []
    last = model.get_submodule([entry.name for entry in fusion_report(model) if entry.kind == "block"][-1])
    handle = last.register_forward_hook(lambda module, inputs, output: found.append(output))
    model(x)
    handle.remove()
    return found[0]


def gradients(model, y, seed=3):
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    (y * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- the encoder


@pytest.mark.parametrize("mask_ratio", [0.6, None])
@family
def test_the_encoder_computes_what_masked_dense_convolutions_do(make, mask_ratio):
    stock = randomize(make()).double().eval()
    stock.name = make.__name__
    mae = FCMAE(copy.deepcopy(stock), decoder_dim=8)
    x = pictures()
    visible = all_patches(3) if mask_ratio is None else visible_patches(mask_ratio=mask_ratio)
    expected = features(mask_by_hooks(stock, visible), x)
    expected = expected * kept(visible, expected)
    got = mae.encode(x, visible)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = gradients(mae.encoder, got), gradients(stock, expected)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-8, atol=1e-8 * gradient.abs().max().item(), msg=name)


def test_masked_pixels_have_no_influence():
    mae = FCMAE(randomize(timm_v2()), decoder_dim=8)
    visible = visible_patches()
    x = pictures(dtype=torch.float32)
    other = torch.where(kept(visible, x) > 0, x, torch.nan)
    expected = mae.encode(x, visible)
    assert expected.abs().max() > 0
    assert torch.equal(mae.encode(other, visible), expected)


def test_the_encoder_is_the_model_itself():
    """It goes on after pretraining as any fused model: dense, under its own names."""
    stock = randomize(official_v2())
    expected = copy.deepcopy(stock)(images())
    mae = FCMAE(stock, decoder_dim=8)
    assert mae.encoder is stock
    assert all(entry.fused for entry in fusion_report(stock))
    torch.testing.assert_close(stock(images()), expected, rtol=1e-4, atol=1e-4)


def test_a_sequence_of_blocks():
    encoder = nn.Sequential(
        nn.Conv2d(1, 8, 2, 2), FusedConvNeXtBlock(8), nn.Conv2d(8, 16, 2, 2), nn.Sequential(FusedConvNeXtBlock(16))
    )
    mae = FCMAE(encoder, image_channels=1, decoder_dim=8, decoder_depth=2)
    assert mae.stride == 4
    assert mae(torch.randn(2, 1, 12, 8)).prediction.shape == (2, 16, 3, 2)


# --- a block on visible patches


def random_block(channels=16, **options):
    block = FusedConvNeXtBlock(channels, **{"use_grn": True, **options})
    return randomize(block)


def test_gradcheck():
    block, visible = random_block(6).double(), visible_patches(2)
    x = torch.randn(4, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: block(x, visible), (x,))
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(block(x, visible).sum(), x, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize("channels", [1, 3, 40])
@pytest.mark.parametrize("size", [(1, 1), (4, 1), (2, 3)])
def test_shapes(channels, size):
    block, visible = random_block(channels).double(), visible_patches(5)
    whole = torch.randn(5, channels, GRID[0] * size[0], GRID[1] * size[1], dtype=torch.float64)
    x = visible.pack(whole)
    assert x.shape == (5 * 2, channels, *size)
    y = block(x, visible)
    assert y.shape == x.shape and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(block(x.contiguous(), visible), y, rtol=0, atol=0)
    everything = all_patches(5)
    torch.testing.assert_close(
        everything.unpack(block(everything.pack(whole), everything)), block(whole), rtol=1e-10, atol=1e-10
    )


def test_an_empty_batch():
    block, visible = random_block(), visible_patches(0)
    assert block(torch.empty(0, 16, 2, 2), visible).shape == (0, 16, 2, 2)


@pytest.mark.parametrize("make", [lambda: random_block(40, drop_path=0.5), lambda: timm_v2(0.5).stages[3].blocks[0]])
def test_drop_path_drops_images(make):
    block, visible = fuse(randomize(make())).train(), visible_patches(16)
    x = torch.randn(32, 40, 2, 2)
    y = block(x, visible)
    undropped = block.eval()(x, visible)
    same = (y == x).flatten(1).all(1).view(16, 2)
    assert torch.equal(same[:, 0], same[:, 1])
    assert 0 < same[:, 0].sum() < 16
    there = ~same.flatten()
    torch.testing.assert_close((y - x)[there], 2 * (undropped - x)[there], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["autocast", "pure"])
def test_16_bit_modes(mode):
    block, visible = random_block(), visible_patches()
    x = torch.randn(6, 16, 8, 8)
    truth = copy.deepcopy(block).double()(x.double(), visible)
    dense = visible.unpack(x)
    reference = ck.ReferenceConvNeXtBlock(16, use_grn=True)
    reference.load_state_dict(block.state_dict())
    reference.name = ""
    mask_by_hooks(reference, visible)
    if mode == "pure":
        got = block.bfloat16()(x.bfloat16(), visible)
        theirs = visible.pack(reference.bfloat16()(dense.bfloat16()))
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got, theirs = block(x, visible), visible.pack(reference(dense))
    assert got.dtype == theirs.dtype
    assert_close(got, theirs, truth, mode, unit=2**-9)


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    model = FCMAE(randomize(timm_v2()), decoder_dim=8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = pictures(dtype=torch.float32)
    torch.manual_seed(2)
    expected = model(x)
    torch.manual_seed(2)
    got = compiled(x)
    torch.testing.assert_close(got.loss, expected.loss)
    got.loss.backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected.loss.backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad)


def test_compiles_for_batches_of_any_size():
    torch._dynamo.reset()
    compiled = torch.compile(FCMAE(randomize(timm_v2()), decoder_dim=8), fullgraph=True, backend="aot_eager")
    for n in (4, 3, 2):
        assert compiled(pictures(n, dtype=torch.float32)).mask.shape == (n, *GRID)


def test_no_images_have_no_loss():
    mae = FCMAE(randomize(timm_v2()), decoder_dim=8)
    loss = mae(torch.zeros(0, 3, 64, 96)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in mae.parameters())


def test_hidden_states_that_a_model_hands_on_are_no_hindrance():
    """transformers' backbones collect them by hooks on the stages."""
    config = transformers.ConvNextV2Config(hidden_sizes=[8] * 4, depths=[1] * 4)
    encoder = transformers.ConvNextV2Backbone(config)
    assert any(module._forward_hooks for module in encoder.modules())
    FCMAE(encoder, decoder_dim=8)(pictures(dtype=torch.float32)).loss.backward()
    encoder.encoder.stages[1].register_forward_hook(lambda *arguments: None)
    with pytest.raises(ValueError, match="its ConvNextV2Stage has hooks"):
        FCMAE(encoder)


def test_masked_rows_are_not_kept():
    """Neither by the MLP nor by the convolution, though that sees whole maps."""
    block, visible = random_block(), visible_patches(4, mask_ratio=0.8)
    x = torch.randn(4, 16, 8, 8, requires_grad=True)

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block(x, visible)
    assert max(kept) == 4 * 64 * 16


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu(backend, dtype):
    mae = FCMAE(randomize(timm_v2()), decoder_dim=16)
    x, mask = pictures(dtype=torch.float32), visible_patches().mask

    def step(model, x):
        model.zero_grad()
        loss = model(x, mask.to(x.device)).loss
        loss.backward()
        grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach().cpu(), **grads}

    truth = step(copy.deepcopy(mae).double(), x.double())
    theirs = step(mae.to(dtype), x.to(dtype))
    with ck.use_backend(backend):
        ours = step(mae.cuda(), x.cuda().to(dtype))
    assert ours.keys() == theirs.keys() == truth.keys()
    for name, value in truth.items():
        assert_close(ours[name], theirs[name], value, name, unit=2**-9 if dtype == torch.bfloat16 else 2**-24)


# --- which patches


def test_a_random_mask():
    visible = VisiblePatches.random(100, (7, 7), 0.6, generator=torch.Generator().manual_seed(0))
    assert visible.index.shape == (100, 19)  # int(49 * 0.4)
    assert visible.mask.shape == (100, 7, 7) and visible.mask.dtype == torch.bool
    assert (visible.mask.flatten(1).sum(1) == 30).all()
    assert (visible.index.diff(dim=1) > 0).all()
    how_often = (~visible.mask).sum(0)
    assert how_often.min() > 20 and how_often.max() < 60
    again = VisiblePatches.random(100, (7, 7), 0.6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.index, visible.index)


def test_from_mask_and_back():
    visible = visible_patches(5)
    again = VisiblePatches.from_mask(visible.mask)
    assert torch.equal(again.index, visible.index) and again.grid == visible.grid
    assert VisiblePatches.from_mask(torch.empty(0, 2, 2, dtype=torch.bool)).mask.shape == (0, 2, 2)


def test_pack_and_unpack():
    visible = visible_patches()
    whole = torch.randn(3, 5, 8, 9)
    patches = visible.pack(whole)
    assert patches.shape == (6, 5, 4, 3)
    for n in range(3):
        for k, patch in enumerate(visible.index[n].tolist()):
            row, column = divmod(patch, 3)
            expected = whole[n, :, 4 * row : 4 * row + 4, 3 * column : 3 * column + 3]
            assert torch.equal(patches[2 * n + k], expected)
    assert torch.equal(visible.unpack(patches), whole * kept(visible, whole))
    assert torch.equal(visible.pack(visible.unpack(patches)), patches)


def test_patches_that_inference_mode_has_seen_can_be_trained_on():
    visible, block = visible_patches(), FusedConvNeXtBlock(5)
    x = visible.pack(torch.randn(3, 5, 8, 9)).requires_grad_()
    with torch.inference_mode():
        expected = block(x, visible)
    y = block(x, visible)
    y.sum().backward()
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: VisiblePatches.random(2, (2, 2), 0.9), ValueError, "'mask_ratio': expected a ratio that masks some"),
        (lambda: VisiblePatches.random(2, (2, 2), 0), ValueError, "'mask_ratio'"),
        (lambda: VisiblePatches.random(2, 4, 0.5), ValueError, "'grid': expected two sizes, rows and columns, got 4"),
        (lambda: VisiblePatches.from_mask(torch.ones(1, 2, 2)), TypeError, "'mask': expected a torch.Tensor of dtype"),
        (lambda: VisiblePatches.from_mask([True]), TypeError, "'mask'.*got list"),
        (lambda: VisiblePatches.from_mask(torch.ones(2, 2, dtype=torch.bool)), ValueError, "rank 3"),
        (lambda: VisiblePatches.from_mask(torch.ones(1, 2, 2, dtype=torch.bool)), ValueError, "got 0 to 0"),
        (lambda: VisiblePatches.from_mask(torch.eye(2).bool()[None].repeat(2, 1, 1).index_fill(0, torch.tensor(1), 0)),
         ValueError, "equally many.*got 2 to 4"),
        (lambda: visible_patches().pack(torch.ones(3, 4, 5, 6)), ValueError, r"'images': expected shape \(3, C, 2 h"),
        (lambda: visible_patches().unpack(torch.ones(5, 4, 2, 2)), ValueError, r"'patches': expected shape \(3 \* 2"),
        (lambda: random_block()(torch.ones(5, 16, 2, 2), visible_patches()), ValueError, "'x': expected shape"),
        (lambda: random_block()(torch.ones(6, 16, 2), visible_patches()), ValueError, "'x': expected a tensor of rank"),
        (lambda: random_block(backend="cpu")(torch.ones(6, 16, 2, 2), visible_patches()), ValueError, "'backend'"),
        (lambda: random_block()(torch.ones(6, 8, 2, 2), visible_patches()), ValueError, "'conv_weight'"),
    ],
)  # fmt: skip
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_a_block_changed_after_fusing():
    block = fuse(randomize(timm_v2())).stages[0].blocks[0]
    block.mlp.act = nn.ReLU()
    with pytest.raises(RuntimeError, match="cannot run on visible patches: since it was fused, its"):
        block(torch.randn(6, 16, 2, 2), visible_patches())


@pytest.mark.parametrize("change", ["unfuse", "replace"])
def test_an_encoder_that_is_not_fused_any_more(change):
    mae, visible = FCMAE(timm_v2(), decoder_dim=8), visible_patches()
    if change == "unfuse":
        unfuse(mae.encoder)
    else:
        mae.encoder.stages[1].blocks[0] = timm_v2().stages[1].blocks[0]
    with pytest.raises(RuntimeError, match="a ConvNeXtBlock of the encoder is not fused"):
        mae.encode(pictures(dtype=torch.float32), visible)


# --- the whole


def test_the_loss_is_the_mean_square_error_of_masked_pixels():
    for normalize_target in (False, True):
        mae = FCMAE(timm_v2(), decoder_dim=8, normalize_target=normalize_target)
        x = pictures(dtype=torch.float32)
        output = mae(x)
        assert isinstance(output, FCMAEOutput)
        errors = []
        for n, row, column in output.mask.nonzero().tolist():
            patch = x[n, :, 32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            if normalize_target:
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            predicted = output.prediction[n, :, row, column].view(32, 32, 3).permute(2, 0, 1)
            errors.append((predicted - patch).square().mean())
        assert len(errors) == 3 * 4
        torch.testing.assert_close(output.loss, torch.stack(errors).mean())
        assert torch.equal(mae.unpatchify(mae.patchify(x)), x)


def test_what_is_masked_is_predicted_from_the_token():
    """An encoder of zeros: every prediction of a visible patch is the same, and so of a masked one."""
    mae = FCMAE(timm_v2(), decoder_dim=8, decoder_depth=0)
    mask = visible_patches().mask
    with torch.no_grad():
        for parameter in mae.encoder.parameters():
            parameter.zero_()
        mae.mask_token.fill_(1.0)
    prediction = mae(pictures(dtype=torch.float32), mask).prediction.movedim(1, -1)
    hidden, seen = prediction[mask], prediction[~mask]
    assert (hidden == hidden[0]).all() and (seen == seen[0]).all() and not torch.equal(hidden[0], seen[0])


def test_the_decoder_starts_as_the_official_one():
    """Names, shapes, and small weights."""
    mae = FCMAE(timm_v2(), decoder_dim=16)
    names = {name: tuple(p.shape) for name, p in mae.named_parameters() if not name.startswith("encoder.")}
    assert names["mask_token"] == (1, 16, 1, 1)
    assert names["proj.weight"] == (16, 40, 1, 1)
    assert names["pred.weight"] == (32 * 32 * 3, 16, 1, 1)
    assert names["decoder.0.dwconv.weight"] == (16, 1, 7, 7)
    assert names["decoder.0.grn.gamma"] == (1, 1, 1, 64)
    assert 0.01 < mae.pred.weight.std() < 0.03
    assert mae.decoder[0].norm.weight.min() == 1


def hooked():
    model = timm_v2()
    model.stages[1].register_forward_hook(lambda *arguments: None)
    return model


def dilated():
    return timm.models.convnext.ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), output_stride=16)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: torchvision.models.resnet18(), TypeError, "'encoder': expected a ConvNeXt of timm"),
        (lambda: "convnext_tiny", TypeError, "'encoder': expected a torch.nn.Module, got str"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1)), TypeError, "got Sequential"),
        (lambda: timm_model(stem_type="overlap"), ValueError, r"'stem.0' cannot run on patches: its kernel is"),
        (lambda: timm_model(act_layer="relu"), ValueError, r"'stages.0.blocks.0' cannot run on patches: its act"),
        (dilated, ValueError, "cannot run on patches"),
        (hooked, ValueError, "its ConvNeXtStage has hooks"),
        (lambda: nn.Sequential(FusedConvNeXtBlock(8)), ValueError, "it takes 8 channels where there are 3"),
        (lambda: nn.Sequential(nn.Conv2d(4, 8, 1), FusedConvNeXtBlock(8)), ValueError, "it takes 4 channels"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.LayerNorm(8), FusedConvNeXtBlock(8)), ValueError, "normalise"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), FusedConvNeXtBlock(8)), ValueError, "no LayerN"),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), FusedConvNeXtBlock(8)), ValueError, "beside"),
    ],
)  # fmt: skip
def test_encoders_that_cannot_run_on_patches(make, error, message):
    encoder = make()
    with pytest.raises(error, match=message):
        FCMAE(encoder)
    if isinstance(encoder, nn.Module):
        assert not any(entry.fused for entry in fusion_report(encoder) if entry.family != "convnext_kernels")


@pytest.mark.parametrize(
    "images, mask, error, message",
    [
        (torch.ones(2, 3, 64, 80), None, ValueError, r"'images': expected shape \(N, 3, H, W\), H and W mult"),
        (torch.ones(2, 1, 64, 64), None, ValueError, "'images'"),
        (torch.ones(3, 64, 64), None, ValueError, "'images': expected a tensor of rank 4"),
        (torch.ones(2, 3, 32, 32), None, ValueError, "'mask_ratio'"),
        (torch.ones(1, 3, 64, 64), torch.eye(3).bool()[None], ValueError, r"'mask': expected shape \(1, 2, 2\)"),
        (torch.ones(1, 3, 64, 64), torch.zeros(1, 2, 2).bool(), ValueError, "'mask': expected some patches of every"),
        (torch.ones(1, 3, 64, 64), torch.zeros(1, 2, 2), TypeError, "'mask'"),
    ],
)  # fmt: skip
def test_bad_images_and_masks(images, mask, error, message):
    with pytest.raises(error, match=message):
        FCMAE(timm_v2(), decoder_dim=8)(images, mask)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mask_ratio": 1.0}, "'mask_ratio': expected a number between 0 and 1, got 1.0"),
        ({"mask_ratio": "0.6"}, "'mask_ratio': expected"),
        ({"decoder_dim": 8.0}, "'decoder_dim': expected an integer of at least 1, got 8.0"),
        ({"decoder_depth": -1}, "'decoder_depth': expected an integer of at least 0, got -1"),
        ({"image_channels": "3"}, "'image_channels': expected an integer"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=f"FCMAE: argument {message}"):
        FCMAE(timm_v2(), **options)


def test_an_empty_batch_of_images():
    assert FCMAE(timm_v2(), decoder_dim=8)(torch.ones(0, 3, 64, 96)).prediction.shape == (0, 3072, 2, 3)


def test_pretraining_on_photographs():
    """A small ConvNeXt V2 learns to fill in two photographs far better than their mean colour."""
    crops = []
    for photograph in load_sample_images().images:
        x = torch.from_numpy(photograph.copy()).permute(2, 0, 1).float()[None] / 255
        x = F.interpolate(x, (192, 256), mode="area")
        crops += [x[:, :, i : i + 128, j : j + 128] for i in (0, 64) for j in (0, 64, 128)]
    x = torch.cat(crops)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    torch.manual_seed(0)
    mae = FCMAE(timm_v2(), decoder_dim=64).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(mae.parameters(), lr=2e-3, betas=(0.9, 0.95))
    losses = []
    for _ in range(60):
        loss = mae(x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 0.9
    assert sum(losses[-5:]) / 5 < 0.5 * losses[0]
