"""FusedConvNeXtBlock against the official block in eager PyTorch: values, gradients, state, options, odd inputs, on the
CPU and on a GPU.
"""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import convnext_kernels as ck
from numerics import assert_close, device_type, rms

pytestmark = pytest.mark.usefixtures("device")

MODES = {
    "fp64": (torch.float64, None),
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "autocast-bf16": (torch.float32, torch.bfloat16),
    "autocast-fp16": (torch.float32, torch.float16),
}


def pair(dim, dtype=torch.float32, **options):
    """The reference and the fused block with the same parameters, all of order 1."""
    theirs = ck.ReferenceConvNeXtBlock(dim, layer_scale_init_value=None if options.get("use_grn") else 1.0, **options)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            fan_in = 1 if parameter.dim() == 1 else parameter[0].numel()
            parameter.add_(0.5 * torch.randn_like(parameter) * (1 if "grn" in name else fan_in**-0.5))
    ours = ck.FusedConvNeXtBlock(dim, layer_scale_init_value=None if options.get("use_grn") else 1.0, **options)
    assert ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype)


def image(n, c, h, w, dtype=torch.float32):
    return torch.randn(n, c, h, w, dtype=torch.float64).to(dtype).contiguous(memory_format=torch.channels_last)


def run(block, x, grad, autocast=None):
    """The output and the gradients of x and every parameter, by name."""
    x = x.clone().requires_grad_()
    block.zero_grad(set_to_none=True)
    with torch.autocast(device_type(), autocast, enabled=autocast is not None):
        y = block(x)
    y.backward(grad.to(y.dtype))
    gradients = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


class Drawn(torch.nn.Module):
    """Drop path with the factors that another dtype drew: a GPU's random numbers in fp64 are others."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, x):
        return x * self.scale.to(x.dtype).view(-1, 1, 1, 1)


def compare(theirs, ours, x, autocast=None):
    truth_block = copy.deepcopy(theirs).double()
    grad = torch.randn(x.shape, dtype=torch.float64).to(x.dtype)
    unit = None if autocast is None else torch.finfo(autocast).eps / 2
    if x.dtype == torch.float64:
        unit = 1e-13  # the truth is no better than what is compared with it

    def seeded(*arguments):
        torch.manual_seed(17)
        return run(*arguments)

    torch.manual_seed(17)
    scale = ours.drop_path.sample_scale(x, x.dtype)
    if scale is not None:
        truth_block.drop_path = Drawn(scale)
    truth = seeded(truth_block, x.double(), grad.double())
    expected, got = seeded(theirs, x, grad, autocast), seeded(ours, x, grad, autocast)
    assert expected.keys() == got.keys() == truth.keys()
    for name in truth:
        assert_close(got[name], expected[name], truth[name], name, unit)


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", MODES)
def test_numerics(mode, use_grn):
    dtype, autocast = MODES[mode]
    theirs, ours = pair(96, dtype, use_grn=use_grn)
    compare(theirs, ours, image(2, 96, 14, 14, dtype), autocast)


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["fp32", "autocast-bf16"])
@pytest.mark.parametrize("shape", [(2, 1, 5, 4), (1, 3, 1, 1), (3, 40, 7, 7), (2, 100, 9, 13), (5, 8, 1, 6)], ids=str)
def test_odd_shapes(shape, mode, use_grn):
    dtype, autocast = MODES[mode]
    theirs, ours = pair(shape[1], dtype, use_grn=use_grn)
    compare(theirs, ours, image(*shape, dtype), autocast)


OPTIONS = [
    {"kernel_size": 3},
    {"kernel_size": 5},
    {"kernel_size": 9},
    {"kernel_size": 11},
    {"mlp_ratio": 2},
    {"mlp_ratio": 3.5},
    {"eps": 1e-3},
    {"bias": False},
    {"approximate": "tanh"},
    {"approximate": "tanh", "use_grn": True},
    {"bias": False, "use_grn": True},
    {"drop_path": 0.5},
    {"drop_path": 0.5, "use_grn": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["fp32", "autocast-bf16"])
def test_options(mode, options):
    dtype, autocast = MODES[mode]
    theirs, ours = pair(24, dtype, **options)
    compare(theirs, ours, image(6, 24, 8, 9, dtype), autocast)


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["fp32", "autocast-bf16"])
def test_kept_hidden_gives_the_same_gradients(mode, use_grn):
    dtype, autocast = MODES[mode]
    _, ours = pair(24, dtype, use_grn=use_grn, drop_path=0.3)
    # Bit for bit in the compiled kernels; Triton's do not round a hidden tensor that they compute again.
    ours.backend = device_type()
    x, grad = image(4, 24, 8, 9, dtype), torch.randn(4, 24, 8, 9)
    torch.manual_seed(17)
    recomputed = run(ours, x, grad, autocast)
    ours.recompute = False
    torch.manual_seed(17)
    kept = run(ours, x, grad, autocast)
    # The output itself may differ by a rounding: without a hidden tensor to keep, GELU is part of the matrix product.
    assert rms(kept["y"] - recomputed["y"]) <= torch.finfo(autocast or dtype).eps * rms(kept["y"])
    for name in kept.keys() - {"y"}:
        assert torch.equal(kept[name], recomputed[name]), name


def test_equal_seeds_give_equal_blocks_and_the_official_defaults():
    for use_grn in (False, True):
        torch.manual_seed(3)
        theirs = ck.ReferenceConvNeXtBlock(8, use_grn=use_grn)
        torch.manual_seed(3)
        ours = ck.FusedConvNeXtBlock(8, use_grn=use_grn)
        for (name, p), (other, q) in zip(theirs.named_parameters(), ours.named_parameters(), strict=True):
            assert name == other and torch.equal(p, q)
    names = set(ck.FusedConvNeXtBlock(8).state_dict())
    assert names == {"gamma"} | {
        f"{m}.{p}" for m in ("dwconv", "norm", "pwconv1", "pwconv2") for p in ("weight", "bias")
    }
    assert torch.equal(ck.FusedConvNeXtBlock(8).gamma, torch.full((8,), 1e-6))
    v2 = ck.FusedConvNeXtBlock(8, use_grn=True)
    assert v2.gamma is None and v2.grn.gamma.shape == v2.grn.beta.shape == (1, 1, 1, 32)
    assert ck.FusedConvNeXtBlock(8, 0.1, 0).gamma is None


# --- drop path


def test_drop_path_draws_as_timm_does():
    timm_layers = pytest.importorskip("timm.layers")
    x = torch.ones(64, 3, 2, 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.manual_seed(1)
        theirs = timm_layers.DropPath(0.3).train()(x.to(dtype))[:, 0, 0, 0]
        torch.manual_seed(1)
        ours = ck.reference.DropPath(0.3).train().sample_scale(x, dtype)
        assert torch.equal(theirs != 0, ours != 0) and 0 < (ours != 0).sum() < 64
        torch.testing.assert_close(ours[ours != 0], torch.full_like(ours[ours != 0], 1 / 0.7))
        # The generators are in the same state afterwards.
        torch.manual_seed(1)
        timm_layers.DropPath(0.3).train()(x.to(dtype))
        after = torch.rand(1)
        torch.manual_seed(1)
        ck.reference.DropPath(0.3).train().sample_scale(x, dtype)
        assert torch.equal(after, torch.rand(1))


def test_dropped_samples_pass_through_and_give_no_gradient():
    _, block = pair(8, drop_path=0.5)
    block.train()
    x = image(8, 8, 5, 5)
    torch.manual_seed(0)
    dropped = block.drop_path.sample_scale(x, x.dtype) == 0
    assert 0 < dropped.sum() < 8
    x[dropped] = float("nan")  # must not leak into anything
    grad = torch.randn_like(x)
    torch.manual_seed(0)
    out = run(block, x, grad)
    assert out["y"][dropped].isnan().all() and out["y"][~dropped].isfinite().all()
    assert torch.equal(out["x"][dropped], grad[dropped])
    for name, value in out.items():
        assert name in ("y",) or value[... if value.dim() != 4 or value.shape[0] != 8 else ~dropped].isfinite().all()


def test_drop_path_is_off_in_eval():
    theirs, ours = pair(8, drop_path=0.9)
    x = image(4, 8, 5, 5)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)


# --- values that are not finite, and empty batches


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_non_finite_values_propagate_as_in_pytorch(value, use_grn):
    theirs, ours = pair(8, use_grn=use_grn)
    x = image(2, 8, 12, 12)
    x[0, 3, 2, 2] = value
    expected, got = theirs(x), ours(x)
    assert torch.equal(expected.isfinite(), got.isfinite())
    assert not got.isfinite().all() and got.isfinite().any()


def test_fp16_near_its_maximum_stays_finite():
    """(x - mean)^2 overflows fp16: the statistics must be fp32."""
    block = ck.FusedConvNeXtBlock(16, dtype=torch.float16)
    with torch.no_grad():
        block.dwconv.weight.zero_()[:, :, 3, 3] = 1
        block.dwconv.bias.zero_()
    x = (torch.rand(2, 16, 4, 4) * 2 - 1).mul(60000).half().contiguous(memory_format=torch.channels_last)
    assert block(x).isfinite().all()


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_empty_batch(use_grn, autocast):
    _, block = pair(8, use_grn=use_grn, drop_path=0.1)
    x = torch.empty(0, 8, 5, 5).contiguous(memory_format=torch.channels_last)
    out = run(block, x, x, autocast)
    assert out["y"].shape == out["x"].shape == (0, 8, 5, 5)
    for name, parameter in block.named_parameters():
        assert torch.equal(out[name], torch.zeros_like(parameter)), name


# --- constructor errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0}, "'dim': expected an integer of at least 1, got 0"),
        ({"dim": -8}, "'dim': expected"),
        ({"dim": 8, "drop_path": 1.0}, r"'drop_path': expected a number in \[0, 1\), got 1.0"),
        ({"dim": 8, "drop_path": -0.1}, "'drop_path': expected"),
        ({"dim": 8, "drop_path": float("nan")}, "'drop_path': expected"),
        ({"dim": 8, "kernel_size": 6}, "'kernel_size': expected one of"),
        ({"dim": 8, "kernel_size": 13}, "'kernel_size': expected one of"),
        ({"dim": 8, "eps": -1e-6}, "'eps': expected a number of at least 0"),
        ({"dim": 8, "mlp_ratio": 0}, "'mlp_ratio': expected"),
        ({"dim": True}, "'dim': expected"),
        ({"dim": 8, "kernel_size": 7.0}, "'kernel_size': expected one of"),
        ({"dim": 8, "drop_path": None}, r"'drop_path': expected a number in \[0, 1\), got None"),
        ({"dim": 8, "mlp_ratio": "4"}, "'mlp_ratio': expected a number of at least 1 / dim, got '4'"),
        ({"dim": 8, "mlp_ratio": float("inf")}, "'mlp_ratio': expected"),
        ({"dim": 8, "layer_scale_init_value": "small"}, "'layer_scale_init_value': expected a number or None"),
        ({"dim": 8, "eps": "1e-6"}, "'eps': expected"),
        ({"dim": 8, "approximate": "erf"}, "'approximate': expected 'none' or 'tanh', got 'erf'"),
    ],
    ids=str,
)
def test_constructor_errors(arguments, message):
    with pytest.raises(ValueError, match="FusedConvNeXtBlock: argument " + message):
        ck.FusedConvNeXtBlock(**arguments)


# --- a module among others


def set_a_channel(y):
    y[:, 0] = 0
    return 2 * y


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("change", [torch.relu_, lambda y: y.add_(1), set_a_channel])
def test_the_output_can_be_changed_in_place(change, backend):
    """As eager's can; a residual network's next layer may do so."""
    block, x = ck.FusedConvNeXtBlock(8, layer_scale_init_value=1.0), torch.randn(2, 8, 6, 6)
    reference = ck.ReferenceConvNeXtBlock(8, layer_scale_init_value=1.0)
    reference.load_state_dict(block.state_dict())
    if backend is not None:
        torch._dynamo.reset()
        block = torch.compile(block, backend=backend)
    results = []
    for module in (block, reference):
        leaf = x.clone().requires_grad_()
        y = change(module(leaf))
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_backward_needs_not_can_be_changed_before_it():
    """The convolution's bias, as in eager; the other parameters' old values are needed there, and that is an error."""
    block = ck.FusedConvNeXtBlock(8, layer_scale_init_value=1.0)
    for name, parameter in block.named_parameters():
        loss = block(torch.randn(2, 8, 6, 6)).sum()
        with torch.no_grad():
            parameter.add_(1)
        if name == "dwconv.bias":
            loss.backward()
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last])
def test_gradients_have_the_parameters_strides(format):
    """DistributedDataParallel compares them with its buckets'."""
    block = ck.FusedConvNeXtBlock(8).to(memory_format=format)
    block(torch.randn(2, 8, 6, 6)).sum().backward()
    assert all(p.grad.stride() == p.stride() for p in block.parameters())
    block.zero_grad()
    ck.depthwise_conv2d(torch.randn(2, 8, 6, 6), block.dwconv.weight).sum().backward()
    assert block.dwconv.weight.grad.stride() == block.dwconv.weight.stride()


def test_deepcopy_pickle_and_save():
    _, block = pair(8, use_grn=True)
    x = image(2, 8, 5, 5)
    expected = block(x)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    copies = copy.deepcopy(block), pickle.loads(pickle.dumps(block)), torch.load(buffer, weights_only=False)
    for other in copies:
        assert torch.equal(other(x), expected)
        assert other.dwconv.weight.data_ptr() != block.dwconv.weight.data_ptr()


def test_frozen_parameters_get_no_gradient(monkeypatch):
    theirs, ours = pair(8)
    for block in (theirs, ours):
        block.pwconv1.weight.requires_grad_(False)
        block.dwconv.requires_grad_(False)
        block.norm.bias.requires_grad_(False)
    asked = []
    call = ck.backends.call
    monkeypatch.setattr(ck.backends, "call", lambda name, *a: (asked.append((name, a)), call(name, *a))[1])
    compare(theirs, ours, image(2, 8, 5, 5))
    assert not any(name == "depthwise_conv2d_weight_grad" for name, _ in asked)  # not even computed
    (mask,) = {a[-1] for name, a in asked if name == "layer_norm_mlp_backward"}
    assert not mask & 0b1100 and mask & 0b1000000000


def test_input_without_gradient():
    _, ours = pair(8)
    ours(image(2, 8, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant):
    _, block = pair(8, drop_path=0.5)
    x, grad = image(4, 8, 5, 5), torch.randn(4, 8, 5, 5)
    torch.manual_seed(17)
    plain = run(block, x, grad)
    torch.manual_seed(17)
    x = x.clone().requires_grad_()
    block.zero_grad()
    checkpoint(block, x, use_reentrant=use_reentrant).backward(grad)
    assert torch.equal(x.grad, plain["x"])
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, plain[name])


def test_grad_scaler():
    theirs, ours = pair(8)
    x = image(2, 8, 5, 5)
    steps = []
    for block in (theirs, ours):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler(device_type(), init_scale=2.0**12)
        with torch.autocast(device_type(), torch.float16):
            loss = block(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append([p.detach().clone() for p in block.parameters()])
    for ours_parameter, theirs_parameter in zip(steps[1], steps[0], strict=True):
        torch.testing.assert_close(ours_parameter, theirs_parameter, rtol=2e-3, atol=2e-3)


def test_inference_mode_and_no_grad():
    _, block = pair(8)
    x = image(2, 8, 5, 5)
    expected = block(x).detach()
    with torch.no_grad():
        assert torch.equal(block(x), expected)
    with torch.inference_mode():
        y = block(x)
        assert torch.equal(y, expected) and y.is_inference()


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["fp32", "autocast-bf16"])
def test_same_bits_for_any_number_of_threads(mode, use_grn):
    dtype, autocast = MODES[mode]
    _, block = pair(40, dtype, use_grn=use_grn)
    x, grad = image(3, 40, 9, 9, dtype), torch.randn(3, 40, 9, 9)
    threads = torch.get_num_threads()
    first = run(block, x, grad, autocast)
    second = run(block, x, grad, autocast)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.get_num_threads() == threads
