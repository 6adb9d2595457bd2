"""layer_norm_mlp by Triton: values in every mode, dropped samples, GRN, streams, graphs, determinism, large tensors.

On a GPU, or where TRITON_INTERPRET=1 is set on CPU tensors of a few rows (tests/test_triton_mlp.py runs that).
"""

import math

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

import triton
import triton.language as tl

import convnext_kernels
from convnext_kernels.triton_kernels import device, launch, mlp_forward
from convnext_kernels.triton_kernels.mlp_forward import layer_norm_mlp
from triton_mlp_cases import DEVICE, FORMS, MODES, Case, form

pytestmark = [] if launch.INTERPRETED else pytest.mark.gpu
on_a_gpu_only = pytest.mark.skipif(launch.INTERPRETED, reason="what is tested here is the GPU's")


ODD = (3, 5, 5)  # 75 rows in 3 samples: no tile's multiple


# --- the pieces


@triton.jit
def _gelu_kernel(x, y, gradient, N: tl.constexpr, TANH: tl.constexpr, DEGREE: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    value, slope = device.gelu_and_derivative(tl.load(x + i), TANH, DEGREE)
    tl.store(y + i, value)
    tl.store(gradient + i, slope)


GELUS = [("none", degree, dtype) for degree, dtype in ((0, torch.float32), (8, torch.float16), (8, torch.bfloat16))]
GELUS += [("none", 5, torch.bfloat16)]
GELUS += [("tanh", 0, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.parametrize("approximate, degree, dtype", GELUS)
def test_gelu(approximate, degree, dtype):
    """Every 16-bit input; the bounds are csrc/mlp/gelu.cuh's, and device.gelu_degree's of degree 5."""
    if dtype == torch.float32:
        x = torch.linspace(-14, 14, 1 << 16)
    else:
        x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    x = x.to(DEVICE)
    y, slope = torch.empty_like(x), torch.empty_like(x)
    launch.run(_gelu_kernel, (64,), x, y, slope, N=1024, TANH=approximate == "tanh", DEGREE=degree)
    wide = x.double()
    if approximate == "none":
        gate = 0.5 * torch.special.erfc(-wide / math.sqrt(2))
        true_slope = torch.exp(-wide * wide / 2) / math.sqrt(2 * math.pi)
    else:
        scale = 2 * math.sqrt(2 / math.pi)
        gate = torch.sigmoid(scale * (wide + 0.044715 * wide**3))
        true_slope = gate * torch.sigmoid(-scale * (wide + 0.044715 * wide**3)) * scale * (1 + 0.134145 * wide * wide)
    density = true_slope
    truth, true_slope = wide * gate, gate + torch.where(density == 0, 0, wide * density)
    kept = x.isfinite()
    relative = {torch.float16: 2.0**-15.5, torch.bfloat16: 2.0**-9.8, torch.float32: 2.0**-21}[dtype]
    absolute = {torch.float16: 2.0**-29, torch.bfloat16: 2.0**-123, torch.float32: 2.0**-22}[dtype]
    error, slope_error = (y.double() - truth).abs(), (slope.double() - true_slope).abs()
    if degree == 5:
        kept &= x.abs() < 1e18
        curvature = torch.where(density == 0, 0, (2 - wide * wide) * density)
        assert (error <= 2.0**-10.4 * (truth.abs() + (wide * true_slope).abs()) + absolute)[kept].all()
        assert (error <= 2.0**-12.7 + 2.0**-23 * truth.abs())[kept].all()
        assert (slope_error <= 2.0**-10.4 * (true_slope.abs() + (wide * curvature).abs()) + absolute)[kept].all()
        assert (slope_error <= 2.0**-11.5)[kept].all()
    else:
        assert (error <= relative * truth.abs() + absolute)[kept].all()
        kept &= x.abs() < 1e18  # the square of larger numbers overflows; PyTorch's derivative is NaN there too
        assert (slope_error <= (2.0**-16 if dtype != torch.float32 else 2.0**-20))[kept].all()
    others = x.isnan() | (x == float("inf"))
    if not launch.INTERPRETED:
        others |= x == -float("inf")  # times 0
    theirs = F.gelu(wide[others], approximate=approximate)
    assert torch.equal(y[others].isnan(), theirs.isnan()) and torch.equal(y[others].isinf(), theirs.isinf())


@pytest.mark.parametrize("samples", [1, 2, 31, 1024, 1025, 2500])
def test_sample_order(samples):
    scale = torch.rand(samples, device=DEVICE)
    scale[scale < 0.4] = 0
    for each in (scale, torch.zeros_like(scale), torch.ones_like(scale)):
        order, count = launch.sample_order(each)
        expected = torch.argsort((each == 0).to(torch.int8), stable=True)
        assert torch.equal(order.long(), expected)
        assert count.item() == (each != 0).sum().item()


# --- values


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("mode", MODES)
def test_numerics(mode, approximate, grn, drop, name):
    case = Case(mode, (4, *ODD[1:], 40), grn, drop)
    with form(name):
        case.check(layer_norm_mlp, approximate, keep_hidden=drop)


@pytest.mark.parametrize("channels", [8, 40, 96, 128, 192, 256, 352, 384, 512, 768])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mode", MODES)
def test_channels(mode, name, channels):
    if name == "fused" and (channels > mlp_forward.FUSED_CHANNELS or (mode == "fp32" and not launch.INTERPRETED)):
        pytest.skip("the fused form takes up to 384 channels, in 16 bits")
    if launch.INTERPRETED and mode.startswith("mixed"):
        pytest.skip("left to the GPU: the others take the interpreter long enough")
    shape = (1, 3, 7) if channels > 128 and launch.INTERPRETED else ODD
    # A hidden width that is no tile's multiple in some.
    hidden = 4 * channels + 8 if channels in (40, 192, 512) else None
    if launch.INTERPRETED and channels > 256:
        hidden = channels + 8
    with form(name):
        Case(mode, (*shape, channels), grn=channels in (40, 128), hidden=hidden).check(layer_norm_mlp)


@pytest.mark.parametrize("image", [(1,), (3,), (4, 4), (5, 7), (8, 8), (7, 9)], ids=str)
@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode.startswith("mixed")])
def test_grn_images_and_tiles(mode, name, drop, image):
    """Tiles that hold several images, parts of two, and one alone."""
    samples = 20 if image == (1,) else 5  # more images than a product sums
    with form(name):
        Case(mode, (samples, *image, 16), True, drop).check(layer_norm_mlp)


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_tma(grn):
    """Tensor descriptors instead of pointers."""
    case = Case("fp16", (*ODD, 40), grn, True)
    with form("two", tma=True, tiles=True):
        case.check(layer_norm_mlp, keep_hidden=True)
        case.p[2] = torch.cat([case.p[2].flatten()[:1], case.p[2].flatten()])[1:].view(160, 40)  # not 16-byte aligned
        case.check(layer_norm_mlp)


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
def test_several_chunks(monkeypatch, drop, grn):
    case = Case("mixed-fp16", (5, 7, 9, 16), grn, drop)
    with form("two"):
        whole = layer_norm_mlp(*case.arguments(keep_hidden=True))
        # 315 rows of 160 bytes: three chunks, cut inside a sample without GRN.
        monkeypatch.setattr(mlp_forward, "WORKSPACE_BYTES", 130 * 160)
        results = list(zip(layer_norm_mlp(*case.arguments(keep_hidden=True)), whole))
        # GRN adds up squares by tiles, which are counted from the chunk's first row: y's last bits may differ.
        for ours, expected in results[1:] if grn else results:
            assert torch.equal(ours, expected)
        case.check(layer_norm_mlp)


@pytest.mark.parametrize("name", FORMS)
def test_without_optional_parameters(name):
    case = Case("fp16", (*ODD, 40), residual=False)
    for i in (0, 1, 3, 7, 8):
        case.p[i] = None
    with form(name):
        case.check(layer_norm_mlp)
        case = Case("fp16", (*ODD, 40), drop=True, residual=False)
        case.p[7] = None  # a layer scale without fc2's bias
        case.check(layer_norm_mlp, keep_hidden=True)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_all_samples_dropped_and_none(name, grn):
    case = Case("fp16", (*ODD, 40), grn, drop=True)
    with form(name):
        case.dropped[:] = False
        case.sample_scale[:] = 1.25
        case.check(layer_norm_mlp)
        case.dropped[:] = True
        case.sample_scale[:] = 0
        y, mean, rstd, hidden = layer_norm_mlp(*case.arguments(keep_hidden=True))
    assert torch.equal(y, case.residual)
    assert all(t.eq(0).all() for t in (mean, rstd, hidden))


@pytest.mark.parametrize("name", FORMS)
def test_other_ranks_and_no_samples(name):
    with form(name):
        Case("fp16", (37, 24), drop=True).check(layer_norm_mlp)
        Case("fp16", (2, 3, 4, 5, 24), True, True).check(layer_norm_mlp)
        y, mean, rstd, hidden = layer_norm_mlp(*Case("fp16", (0, 3, 24), True).arguments(keep_hidden=True))
    assert y.shape == (0, 3, 24) and mean.shape == rstd.shape == (0, 3) and hidden.shape == (0, 3, 96)


@pytest.mark.parametrize("name", FORMS)
def test_large_and_offset_inputs(name):
    """Variances that E[x^2] - E[x]^2 would lose, and fp16 near its end."""
    case = Case("mixed-fp16", (*ODD, 40))
    case.z = (case.z.float() + 1000).half()
    with form(name):
        case.check(layer_norm_mlp)
        case.z = (case.z.float() * 0 + 60000 * torch.randn_like(case.z.float()).sign()).half()
        case.check(layer_norm_mlp)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_stay_alone(name, value):
    case = Case("fp16", (*ODD, 40))
    with form(name):
        before = layer_norm_mlp(*case.arguments())[0]
        case.z[1, 2, 3, 7] = value
        y = layer_norm_mlp(*case.arguments())[0]
    bad = torch.zeros(ODD, dtype=torch.bool, device=DEVICE)
    bad[1, 2, 3] = True
    assert y[bad].isnan().all()
    assert torch.equal(y[~bad], before[~bad])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_non_finite_images_stay_alone(mode, value, name):
    """GRN makes an image of one such row, and no other image that has rows in the same tile."""
    case = Case(mode, (4, 3, 3, 40), grn=True)
    with form(name):
        before = layer_norm_mlp(*case.arguments())[0]
        case.z[1, 2, 1, 7] = value
        y = layer_norm_mlp(*case.arguments())[0]
    assert y[1].isnan().all()
    others = [0, 2, 3]
    assert torch.equal(y[others], before[others])


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_two_runs_are_the_same_bits(name, grn):
    shape = (*ODD, 40) if launch.INTERPRETED else (64, 28, 28, 96)
    case = Case("mixed-fp16", shape, grn, True)
    with form(name):
        first = layer_norm_mlp(*case.arguments(keep_hidden=True))
        for ours, again in zip(first, layer_norm_mlp(*case.arguments(keep_hidden=True))):
            assert torch.equal(ours, again)


# --- errors


def refused(match, **changes):
    names = "z residual norm_weight norm_bias fc1_weight fc1_bias grn_weight grn_bias fc2_weight fc2_bias layer_scale"
    names = [*names.split(), "sample_scale", "eps", "approximate", "out_dtype", "keep_hidden"]
    values = dict(zip(names, Case("fp16", (*ODD, 24), drop=True).arguments()))
    with pytest.raises(RuntimeError, match=match):
        layer_norm_mlp(*{**values, **changes}.values())


def test_errors_name_operator_and_argument():
    def like(*shape, dtype=torch.float16):
        return torch.zeros(shape, dtype=dtype, device=DEVICE)

    refused(r"layer_norm_mlp: argument 'fc1_bias': expected shape \(96,\), got shape \(95,\)", fc1_bias=like(95))
    refused("layer_norm_mlp: argument 'norm_weight': expected dtype", norm_weight=like(24, dtype=torch.float64))
    refused("layer_norm_mlp: argument 'z': expected a contiguous tensor", z=like(24, 5, 5, 3).transpose(0, 3))
    refused("layer_norm_mlp: argument 'approximate': expected 'none' or 'tanh', got 'fast'", approximate="fast")
    refused("layer_norm_mlp: argument 'out_dtype'", out_dtype=torch.float64)
    refused("layer_norm_mlp: argument 'residual': expected a tensor on", residual=torch.zeros(*ODD, 24, device="meta"))
    refused("both of grn_weight and grn_bias", grn_weight=like(96))
    case = Case("fp16", (*ODD, 20))
    with pytest.raises(RuntimeError, match="layer_norm_mlp in Triton takes channels in multiples of 8, not C = 20"):
        layer_norm_mlp(*case.arguments())


# --- a GPU's manners


@on_a_gpu_only
@pytest.mark.parametrize(
    "shape", [(8, 56, 56, 96), (8, 28, 28, 192), (8, 14, 14, 384), (32, 14, 14, 512), (16, 7, 7, 768)], ids=str
)
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["bf16", "mixed-bf16", "fp32"])
def test_stages(mode, grn, shape):
    """The shapes of a model, with the configurations that run there."""
    for drop in (False, True):
        Case(mode, shape, grn, drop).check(layer_norm_mlp, keep_hidden=drop)


@on_a_gpu_only
@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_side_stream_graph_and_no_synchronisation(name, grn):
    case = Case("mixed-bf16", (32, 14, 14, 96), grn, True)
    arguments = case.arguments(keep_hidden=True)
    with form(name):
        expected = layer_norm_mlp(*arguments)
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            late = torch.zeros_like(arguments[0])
            torch.cuda._sleep(50_000_000)
            late.copy_(arguments[0])
            got = layer_norm_mlp(late, *arguments[1:])
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(got, expected))

        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer_norm_mlp(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode(before)

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = layer_norm_mlp(*arguments)
        for keep in (0.3, 0.8):  # other samples are dropped at each replay
            case.sample_scale.bernoulli_(keep)
            arguments[0].normal_()
            graph.replay()
            assert all(torch.equal(a, b) for a, b in zip(captured, layer_norm_mlp(*arguments)))


@pytest.mark.gpu_memory(30)
@on_a_gpu_only
@pytest.mark.parametrize("name", FORMS)
def test_more_than_2_to_31_elements(name):
    channels = 384
    rows = 2**31 // channels + 5
    case = Case("bf16", (1, 8, channels), residual=False)
    z = torch.zeros(1, rows, channels, device="cuda", dtype=torch.bfloat16)
    z[:, -8:] = case.z
    with form(name):
        small = layer_norm_mlp(*case.arguments())[0]
        y, mean, rstd, _ = layer_norm_mlp(z, *case.arguments()[1:])
    torch.testing.assert_close(y[:, -8:], small, rtol=0.02, atol=0.02)
    assert torch.equal(y[:, :1].expand(-1, rows - 8, -1), y[:, :-8])
    assert mean[:, :-8].eq(0).all() and rstd.isfinite().all()


def test_package_is_the_one_under_test():
    assert convnext_kernels.triton_kernels.implementation("layer_norm_mlp") is layer_norm_mlp
