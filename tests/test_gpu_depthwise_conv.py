"""The depthwise convolution and its gradients on a GPU: values, dropped samples, streams, graphs, no synchronisation,
determinism, large tensors. All of it with both versions of the tuned kernels.
"""

import pytest
import torch
import torch.nn.functional as F

import convnext_kernels  # noqa: F401  (loads the compiled operators)
import numerics

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# (n, c, h, w, kernel, stride): the stages of ConvNeXt-T and -B at 224 pixels and of others, ragged edges, channels that
# are no multiple of a vector, other kernels and strides.
SHAPES = [
    *[(4, 96, 56, 56, 7, 1), (4, 192, 28, 28, 7, 1), (5, 384, 14, 14, 7, 1), (9, 768, 7, 7, 7, 1)],
    *[(2, 128, 96, 96, 7, 1), (1, 32, 224, 224, 7, 1), (3, 40, 13, 9, 7, 1), (5, 8, 1, 1, 7, 1), (2, 80, 57, 58, 7, 1)],
    *[(2, 100, 14, 14, 7, 1), (2, 3, 30, 20, 7, 1), (2, 96, 28, 28, 3, 1), (2, 40, 17, 16, 5, 2)],
    *[(2, 96, 28, 27, 7, 2), (1, 33, 20, 21, 9, 1), (1, 16, 12, 13, 11, 2)],
]
ops = torch.ops.convnext_kernels


VERSION = "CONVNEXT_KERNELS_DEPTHWISE_CONV"


@pytest.fixture(autouse=True, params=["fma", "tensor"])
def version(request, monkeypatch):
    """The version of the 7 x 7 kernels that runs where there are two: for 16-bit types."""
    monkeypatch.setenv(VERSION, request.param)
    return request.param


def images(n, c, h, w, dtype):
    return torch.randn(n, c, h, w, device=DEVICE).to(dtype).contiguous(memory_format=torch.channels_last)


def make(shape, dtype, parameter_dtype=None):
    """x, weight, bias, the output's gradient, a residual of x's shape."""
    n, c, h, w, kernel, stride = shape
    parameter_dtype = parameter_dtype or dtype
    weight = (torch.randn(c, 1, kernel, kernel, device=DEVICE) / kernel).to(parameter_dtype)
    bias = torch.randn(c, device=DEVICE).to(parameter_dtype)
    grad = images(n, c, (h - 1) // stride + 1, (w - 1) // stride + 1, dtype)
    return images(n, c, h, w, dtype), weight, bias, grad, images(n, c, h, w, dtype)


def extra(shape):
    return [(size - 1) % shape[5] for size in shape[2:4]]


def ours(shape, x, weight, bias, grad, residual, scale=None):
    stride = shape[5]
    return (
        ops.depthwise_conv2d(x, weight, bias, stride, scale),
        ops.depthwise_conv2d_input_grad(grad, weight, residual, stride, extra(shape), scale),
        *ops.depthwise_conv2d_weight_grad(grad, x, shape[4], stride, scale),
    )


def in_pytorch(shape, x, weight, bias, grad, residual):
    """The same four in the tensors' dtype."""
    x, weight, bias = (t.detach().requires_grad_() for t in (x, weight, bias))
    y = F.conv2d(x, weight, bias, stride=shape[5], padding=shape[4] // 2, groups=shape[1])
    y.backward(grad)
    return y.detach(), x.grad + residual, weight.grad, bias.grad


NAMES = ["y", "grad_x", "grad_weight", "grad_bias"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_against_fp64(shape, dtype):
    tensors = make(shape, dtype)
    truth = in_pytorch(shape, *(t.double() for t in tensors))
    theirs = in_pytorch(shape, *tensors)
    for name, got, other, exact in zip(NAMES, ours(shape, *tensors), theirs, truth):
        if name.startswith("grad_") and name != "grad_x":
            assert got.dtype == torch.float32
            # Ours keep fp32, theirs are rounded: the rule, and fp32 accuracy too.
            numerics.assert_close(got.to(dtype), other, exact, name)
            assert numerics.rms(got.double() - exact) <= 1e-5 * numerics.rms(exact) + 1e-5
        else:
            assert got.is_contiguous(memory_format=torch.channels_last)
            numerics.assert_close(got, other, exact, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4:] == (7, 1)], ids=lambda s: "x".join(map(str, s)))
def test_versions_agree(monkeypatch, version, shape, dtype):
    tensors = make(shape, dtype)
    expected = ours(shape, *tensors)
    monkeypatch.setenv(VERSION, "auto")
    for name, got, other in zip(NAMES, ours(shape, *tensors), expected):
        # Sums of some 50 terms of size 1 in fp32 and one rounding; the weights' gradients are longer ones.
        tolerance = 2 * torch.finfo(got.dtype).eps if name in ("y", "grad_x") else 1e-5
        torch.testing.assert_close(got, other, rtol=tolerance, atol=max(tolerance, 1e-3), msg=name)


def test_unknown_version(monkeypatch):
    x, weight, bias, *_ = make((1, 8, 7, 7, 7, 1), torch.bfloat16)
    monkeypatch.setenv(VERSION, "fastest")
    with pytest.raises(RuntimeError, match=f"argument '{VERSION}': expected auto, fma or tensor, got 'fastest'"):
        ops.depthwise_conv2d(x, weight, bias, 1, None)


@pytest.mark.parametrize("shape", [(3, 40, 14, 14, 7, 1), (2, 5, 9, 8, 3, 2)])
def test_fp64(shape):
    tensors = make(shape, torch.float64)
    for got, expected in zip(ours(shape, *tensors), in_pytorch(shape, *tensors)):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("kernel", [3, 7])
def test_parameters_of_any_dtype(kernel, dtype, parameter_dtype):
    shape = (2, 24, 15, 14, kernel, 1)
    x, weight, bias, grad, residual = make(shape, dtype, parameter_dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    same = x, weight.to(wide), bias.to(wide), grad, residual
    for got, expected in zip(ours(shape, x, weight, bias, grad, residual), ours(shape, *same)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_of_any_dtype(dtype, residual_dtype):
    shape = (3, 40, 14, 14, 7, 1)
    _, weight, _, grad, residual = make(shape, dtype)
    residual = residual.to(residual_dtype)
    got = ops.depthwise_conv2d_input_grad(grad, weight, residual, 1, [0, 0], None)
    assert got.dtype == residual_dtype
    exact = F.conv_transpose2d(grad.double(), weight.double(), padding=3, groups=40) + residual.double()
    tolerance = 2 * torch.finfo(residual_dtype).eps
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=max(tolerance, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(9, 40, 7, 7, 7, 1), (5, 96, 14, 14, 7, 1), (3, 32, 56, 56, 7, 1), (4, 6, 9, 8, 3, 2)]
)
def test_dropped_samples(shape, dtype):
    x, weight, bias, grad, residual = make(shape, dtype)
    scale = torch.full((shape[0],), 1.25, device=DEVICE)
    dropped = torch.arange(shape[0], device=DEVICE) % 3 == 1
    scale[dropped] = 0
    x[dropped] = float("nan")
    grad[dropped] = float("inf")
    y, grad_x, grad_weight, grad_bias = ours(shape, x, weight, bias, grad, residual, scale)
    kept = [t[~dropped].contiguous(memory_format=torch.channels_last) for t in (x, grad, residual)]
    expected = ours((len(kept[0]), *shape[1:]), kept[0], weight, bias, kept[1], kept[2])
    assert torch.equal(y[~dropped], expected[0])
    assert torch.equal(grad_x[~dropped], expected[1])
    assert torch.equal(y[dropped], torch.zeros_like(y[dropped]))
    assert torch.equal(grad_x[dropped], residual[dropped])
    # The sums' order differs.
    torch.testing.assert_close(grad_weight, expected[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grad_bias, expected[3], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(4, 96, 56, 56, 7, 1), (9, 40, 7, 7, 7, 1), (3, 24, 15, 13, 7, 1), (2, 6, 9, 8, 7, 1), (2, 16, 9, 8, 5, 1)],
    ids=lambda shape: "x".join(map(str, shape)),
)
def test_the_cast_in_the_same_pass(shape, dtype):
    """Bit for bit a pass that casts and one that convolves; the copy of a dropped sample is a cast too."""
    x, weight, bias, *_ = make(shape, torch.float32)
    scale = torch.full((shape[0],), 1.25, device=DEVICE)
    scale[1::3] = 0
    memory = torch.empty(x.numel() + 1, device=DEVICE)
    unaligned = memory[1:].view(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(x)
    for given, sample_scale in ((x, None), (x, scale), (unaligned, scale)):
        y, x_copy = ops.depthwise_conv2d_cast(given, weight, bias, dtype, sample_scale)
        assert torch.equal(x_copy, x.to(dtype))
        assert torch.equal(y, ops.depthwise_conv2d(x_copy, weight, bias, 1, sample_scale))
        assert all(t.is_contiguous(memory_format=torch.channels_last) for t in (y, x_copy))
    # Neighbours of a NaN in a dropped sample do not see it, and the copy holds it.
    x[1] = float("nan")
    y, x_copy = ops.depthwise_conv2d_cast(x, weight, bias, dtype, scale)
    assert torch.equal(y[1], torch.zeros_like(y[1])) and x_copy[1].isnan().all() and y.isfinite().all()


@pytest.mark.parametrize("unaligned", [("x",), ("grad",), ("residual",), ("x", "grad", "residual")], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_tensors(dtype, unaligned):
    shape = (2, 32, 14, 14, 7, 1)
    tensors = make(shape, dtype)

    def moved(name, t):
        if name not in unaligned:
            return t
        memory = torch.empty(t.numel() + 1, device=DEVICE, dtype=t.dtype)
        view = memory[1:].view(t.shape[0], t.shape[2], t.shape[3], t.shape[1]).permute(0, 3, 1, 2)
        return view.copy_(t)

    x, weight, bias, grad, residual = tensors
    got = ours(shape, moved("x", x), weight, bias, moved("grad", grad), moved("residual", residual))
    for name, a, b in zip(NAMES, got, ours(shape, *tensors)):
        tolerance = 2 * torch.finfo(a.dtype).eps if name in ("y", "grad_x") else 1e-5
        torch.testing.assert_close(a, b, rtol=tolerance, atol=max(tolerance, 1e-4), msg=name)


def test_empty():
    shape = (0, 96, 14, 14, 7, 1)
    y, grad_x, grad_weight, grad_bias = ours(shape, *make(shape, torch.bfloat16))
    assert y.shape == grad_x.shape == (0, 96, 14, 14)
    assert torch.equal(grad_weight, torch.zeros(96, 1, 7, 7, device=DEVICE))
    assert torch.equal(grad_bias, torch.zeros(96, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values_stay_where_they_reach(dtype):
    shape = (2, 16, 28, 28, 7, 1)
    x, weight, bias, grad, residual = make(shape, dtype)
    x[0, 3, 14, 9] = float("nan")
    y = ours(shape, x, weight, bias, grad, residual)[0]
    expected = torch.zeros_like(y, dtype=torch.bool)
    expected[0, 3, 11:18, 6:13] = True
    assert torch.equal(y.isnan(), expected)


STAGE = (8, 96, 56, 56, 7, 1)


@pytest.mark.parametrize("shape", [STAGE, (16, 768, 7, 7, 7, 1), (4, 96, 28, 28, 5, 2)])
def test_two_runs_are_the_same_bits(shape):
    tensors = make(shape, torch.bfloat16)
    first = ours(shape, *tensors)
    for _ in range(3):
        for a, b in zip(first, ours(shape, *tensors)):
            assert torch.equal(a, b)


def test_side_stream():
    x, *rest = make(STAGE, torch.bfloat16)
    expected = ours(STAGE, x, *rest)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Long work first: launched on another stream, the operators would read x before it is written.
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = ours(STAGE, late, *rest)
    stream.synchronize()
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [STAGE, (4, 96, 28, 28, 5, 2)])
def test_cuda_graph(shape):
    tensors = make(shape, torch.bfloat16)
    x, grad = tensors[0], tensors[3]
    scale = torch.ones(shape[0], device=DEVICE)
    ours(shape, *tensors, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(shape, *tensors, scale)
    for seed in range(3):
        torch.manual_seed(seed)
        x.normal_()
        grad.normal_()
        # Which samples are dropped is read on the device: a replay follows it.
        scale.bernoulli_(0.5)
        graph.replay()
        for a, b in zip(captured, ours(shape, *tensors, scale)):
            assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [STAGE, (4, 96, 28, 28, 5, 2)])
def test_no_synchronisation(shape):
    tensors = make(shape, torch.bfloat16)
    scale = torch.ones(shape[0], device=DEVICE)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours(shape, *tensors, scale)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu_memory(24)
def test_more_than_2_to_31_elements():
    shape = (2**31 // (96 * 56 * 56) + 3, 96, 56, 56, 7, 1)
    x = torch.zeros(shape[:4], device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x[-2:] = images(2, *shape[1:4], torch.bfloat16)
    last = x[-2:].contiguous(memory_format=torch.channels_last)
    _, weight, bias, *_ = make((1, *shape[1:]), torch.bfloat16)
    y = ops.depthwise_conv2d(x, weight, bias, 1, None)
    assert torch.equal(y[-2:], ops.depthwise_conv2d(last, weight, bias, 1, None))
    assert torch.equal(y[:-2], bias[None, :, None, None].expand_as(y[:-2]))
    del y
    got = ops.depthwise_conv2d_input_grad(x, weight, None, 1, [0, 0], None)
    assert torch.equal(got[-2:], ops.depthwise_conv2d_input_grad(last, weight, None, 1, [0, 0], None))
    assert not got[:-2].any()
    del got
    for a, b in zip(
        ops.depthwise_conv2d_weight_grad(x, x, 7, 1, None), ops.depthwise_conv2d_weight_grad(last, last, 7, 1, None)
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2)


def test_errors_name_operator_and_argument():
    x, weight, bias, grad, residual = make((2, 16, 8, 8, 7, 1), torch.bfloat16)
    with pytest.raises(RuntimeError, match="depthwise_conv2d: argument 'x': expected a dense channels-last"):
        ops.depthwise_conv2d(x.contiguous(memory_format=torch.contiguous_format), weight, bias, 1, None)
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d: argument 'weight': expected kernel size .*, got 6"):
        ops.depthwise_conv2d(x, weight[:, :, :6, :6], bias, 1, None)
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d: argument 'bias': expected shape \(16\), got .*\(15\)"):
        ops.depthwise_conv2d(x, weight, bias[1:], 1, None)
    with pytest.raises(RuntimeError, match="depthwise_conv2d: argument 'stride': expected 1 or 2, got 3"):
        ops.depthwise_conv2d(x, weight, bias, 3, None)
    with pytest.raises(RuntimeError, match="depthwise_conv2d: argument 'sample_scale': expected Float, got BFloat16"):
        ops.depthwise_conv2d(x, weight, bias, 1, torch.ones(2, device=DEVICE, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="depthwise_conv2d_input_grad: argument 'residual': expected shape"):
        ops.depthwise_conv2d_input_grad(grad, weight, residual[:1], 1, [0, 0], None)
    with pytest.raises(RuntimeError, match="depthwise_conv2d_input_grad: argument 'output_padding': expected"):
        ops.depthwise_conv2d_input_grad(grad, weight, None, 1, [0, 1], None)
    with pytest.raises(RuntimeError, match=r"depthwise_conv2d_weight_grad: argument 'grad': expected .*BFloat16"):
        ops.depthwise_conv2d_weight_grad(grad.float(), x, 7, 1, None)
    with pytest.raises(RuntimeError, match="depthwise_conv2d_weight_grad: argument 'kernel_size'"):
        ops.depthwise_conv2d_weight_grad(grad, x, 4, 1, None)


def test_tensors_on_another_device_are_refused():
    x, weight, bias, grad, _ = make((2, 16, 8, 8, 7, 1), torch.bfloat16)
    with pytest.raises(RuntimeError, match="argument 'weight': expected a CUDA tensor"):
        ops.depthwise_conv2d(x, weight.cpu(), bias, 1, None)
    # The first argument decides which device's implementation says so.
    with pytest.raises(RuntimeError, match=r"argument 'x': expected a (CPU|CUDA) tensor like the other arguments"):
        ops.depthwise_conv2d_weight_grad(grad.cpu(), x, 7, 1, None)
