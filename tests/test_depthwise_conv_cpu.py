"""The depthwise convolution and its gradients on the CPU: the compiled kernels against fp64, by the numerics rule."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import convnext_kernels  # noqa: F401  (loads the operators)
from numerics import assert_close

ops = torch.ops.convnext_kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
KERNELS = [3, 5, 7, 9, 11]
# (channels, height, width): single pixels, rows, the tuned widths 7 and 14, ragged ones, images wider than a tile.
SHAPES = [
    (1, 1, 1),
    (3, 1, 17),
    (8, 7, 7),
    (40, 13, 9),
    (96, 14, 14),
    (100, 6, 5),
    (3, 56, 56),
    (20, 3, 230),
    (17, 40, 2),
]


# Threads only wait on small tensors. One test compares the bits for several numbers of them.
pytestmark = pytest.mark.usefixtures("one_thread_a_test")


def channels_last(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def bits(tensor):
    return tensor.permute(0, 2, 3, 1).contiguous().view(torch.uint8)


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def output_padding(x, y, stride):
    return [x.shape[i] - 1 - (y.shape[i] - 1) * stride for i in (2, 3)]


def eager(x, weight, bias, grad, stride, residual=None):
    """PyTorch's result and gradients (of x, weight, bias) in the dtypes given; the residual is added in the end."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    y = F.conv2d(*leaves, stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1])
    grads = list(torch.autograd.grad(y, leaves, grad))
    if residual is not None:
        grads[0] = grads[0].to(residual.dtype) + residual
    return y.detach(), *grads


def compiled(x, weight, bias, grad, stride, residual=None, sample_scale=None):
    y = ops.depthwise_conv2d(x, weight, bias, stride, sample_scale)
    dx = ops.depthwise_conv2d_input_grad(grad, weight, residual, stride, output_padding(x, grad, stride), sample_scale)
    dweight, dbias = ops.depthwise_conv2d_weight_grad(grad, x, weight.shape[-1], stride, sample_scale)
    return y, dx, dweight, *([] if bias is None else [dbias])


def compare(ours, theirs, truth, name):
    if ours.dtype == torch.float64:
        assert ours.shape == truth.shape, name
        assert (ours - truth).abs().max() <= 1e-13 * (1 + truth.abs().max()) * 100, name
    else:
        assert_close(ours, theirs, truth, name)


def check(x, weight, bias, grad, stride, residual=None):
    results = compiled(x, weight, bias, grad, stride, residual)
    assert results[0].dtype == x.dtype
    assert results[1].dtype == (grad if residual is None else residual).dtype
    assert {r.dtype for r in results[2:]} == {accumulation(x.dtype)}
    assert all(r.is_contiguous(memory_format=torch.channels_last) for r in results[:2])
    wide = [None if t is None else t.double() for t in (x, weight, bias, grad)]
    truth = eager(*wide, stride, None if residual is None else residual.double())
    theirs = eager(x, weight, bias, grad, stride, residual)
    for name, ours, other, true in zip(("y", "dx", "dweight", "dbias"), results, theirs, truth, strict=False):
        compare(ours.to(other.dtype), other, true, name)
        if name in ("dweight", "dbias") and x.dtype != torch.float64:
            # Before the cast to PyTorch's dtype: fp32 sums of exact products, however short the input's dtype.
            positions = grad.numel() // grad.shape[1]
            scale = (x.double().square().mean() * grad.double().square().sum() / grad.shape[1]).sqrt() + 1
            assert (ours.double() - true).abs().max() <= 2**-24 * 8 * positions**0.5 * scale, name


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kernel_and_stride(dtype, kernel, stride, shape):
    channels, height, width = shape
    x = channels_last(2, *shape, dtype=dtype)
    grad = channels_last(2, channels, (height - 1) // stride + 1, (width - 1) // stride + 1, dtype=dtype)
    weight, bias = torch.randn(channels, 1, kernel, kernel).to(dtype), torch.randn(channels).to(dtype)
    check(x, weight, bias, grad, stride)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bias(dtype, stride):
    x, grad = channels_last(3, 24, 9, 9, dtype=dtype), channels_last(3, 24, *[8 // stride + 1] * 2, dtype=dtype)
    check(x, torch.randn(24, 1, 7, 7).to(dtype), None, grad, stride)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    samples=st.integers(0, 3),
    channels=st.integers(1, 40),
    height=st.integers(1, 24),
    width=st.integers(1, 90),
    kernel=st.sampled_from(KERNELS),
    stride=st.sampled_from([1, 2]),
)
def test_any_shape(samples, channels, height, width, kernel, stride):
    torch.manual_seed(height * 100 + width)
    x = channels_last(samples, channels, height, width, dtype=torch.float64)
    grad = channels_last(samples, channels, (height - 1) // stride + 1, (width - 1) // stride + 1, dtype=torch.float64)
    weight, bias = torch.randn(channels, 1, kernel, kernel).double(), torch.randn(channels).double()
    results = compiled(x, weight, bias, grad, stride)
    if samples == 0:
        assert [r.shape for r in results] == [grad.shape, x.shape, weight.shape, bias.shape]
        assert not results[2].any() and not results[3].any()
        return
    for ours, true in zip(results, eager(x, weight, bias, grad, stride), strict=True):
        assert torch.allclose(ours, true, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stride", [1, 2])
def test_very_wide_image(stride):
    x, grad = (channels_last(1, 3, 2, width, dtype=torch.bfloat16) for width in (20011, 20010 // stride + 1))
    weight, bias = torch.randn(3, 1, 5, 5).bfloat16(), torch.randn(3).bfloat16()
    check(x, weight, bias, grad[:, :, : 1 // stride + 1].contiguous(memory_format=torch.channels_last), stride)


def test_large_batch_sums():
    # Many small images: several make one partial sum.
    x, grad = channels_last(150, 5, 7, 7), channels_last(150, 5, 7, 7)
    check(x, torch.randn(5, 1, 7, 7), torch.randn(5), grad, 1)


@pytest.mark.parametrize("parameter_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parameters_of_another_dtype(dtype, parameter_dtype):
    x, grad = channels_last(2, 12, 8, 9, dtype=dtype), channels_last(2, 12, 8, 9, dtype=dtype)
    weight, bias = torch.randn(12, 1, 5, 5).to(parameter_dtype), torch.randn(12).to(parameter_dtype)
    ours = compiled(x, weight, bias, grad, 1)
    same = compiled(x, weight.to(accumulation(dtype)), bias.to(accumulation(dtype)), grad, 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))


def test_weight_of_any_strides():
    x, weight, bias = channels_last(2, 12, 8, 9), torch.randn(12, 1, 5, 5), torch.randn(24)
    flipped = weight.transpose(2, 3)
    expected = ops.depthwise_conv2d(x, flipped.contiguous(), bias[::2].contiguous(), 1, None)
    assert torch.equal(ops.depthwise_conv2d(x, flipped, bias[::2], 1, None), expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_residual(dtype, residual_dtype, stride):
    x, residual = channels_last(2, 40, 12, 10, dtype=dtype), channels_last(2, 40, 12, 10, dtype=residual_dtype)
    grad = channels_last(2, 40, 12 // stride, 10 // stride, dtype=dtype)
    weight = torch.randn(40, 1, 7, 7).to(dtype)
    dx = ops.depthwise_conv2d_input_grad(grad, weight, residual, stride, output_padding(x, grad, stride), None)
    # The sum in fp32, rounded once.
    _, exact, _ = eager(x.float(), weight.float(), None, grad.float(), stride, residual.float())
    _, truth, _ = eager(x.double(), weight.double(), None, grad.double(), stride, residual.double())
    assert dx.dtype == residual_dtype
    assert_close(dx, exact.to(residual_dtype), truth, "dx")


def test_residual_in_fp64():
    x, weight = channels_last(2, 9, 6, 6, dtype=torch.float64), torch.randn(9, 1, 3, 3).double()
    plain = ops.depthwise_conv2d_input_grad(x, weight, None, 1, [0, 0], None)
    assert torch.equal(ops.depthwise_conv2d_input_grad(x, weight, x, 1, [0, 0], None), plain + x)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropped_samples(dtype, stride):
    shape, kept = (5, 24, 14, 14), torch.tensor([0, 3])
    x, residual = channels_last(*shape, dtype=dtype), channels_last(*shape, dtype=dtype)
    grad = channels_last(*shape[:2], *[14 // stride] * 2, dtype=dtype)
    weight, bias = torch.randn(24, 1, 7, 7).to(dtype), torch.randn(24).to(dtype)
    scale = torch.zeros(5, dtype=accumulation(dtype))
    scale[kept] = 1.25  # any other number: only zero has a meaning here
    dropped = scale == 0
    x[dropped], grad[dropped] = float("nan"), float("inf")
    residual[1, 3, 2, 1] = float("nan")

    y, dx, dweight, dbias = compiled(x, weight, bias, grad, stride, residual, scale)
    alone = compiled(x[kept], weight, bias, grad[kept], stride, residual[kept])
    assert torch.equal(y[kept], alone[0]) and torch.equal(dx[kept], alone[1])
    assert not y[dropped].any()
    assert torch.equal(bits(dx[dropped]), bits(residual[dropped]))
    assert dweight.isfinite().all() and torch.allclose(dweight, alone[2], rtol=1e-5, atol=1e-4)
    assert dbias.isfinite().all() and torch.allclose(dbias, alone[3], rtol=1e-5, atol=1e-4)
    assert not compiled(x, weight, bias, grad, stride, None, scale)[1][dropped].any()

    nothing = compiled(x, weight, bias, grad, stride, None, torch.zeros_like(scale))
    assert not any(result.any() for result in nothing)


@pytest.mark.parametrize("width", [7, 10, 14, 28, 100])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite(dtype, value, width):
    """What a non-finite input or gradient meets inside the image, as in PyTorch; nothing else."""
    shape = (2, 20, 9, width)
    weight, bias = torch.randn(20, 1, 7, 7).to(dtype), torch.randn(20).to(dtype)
    x, grad = channels_last(*shape, dtype=dtype), channels_last(*shape, dtype=dtype)
    x[0, 3, 4, width - 1] = x[1, 19, 0, 0] = value
    y, _, dweight, dbias = compiled(x, weight, bias, grad, 1)
    their_y, _, their_dweight, _ = eager(x.float(), weight.float(), bias.float(), grad.float(), 1)
    assert torch.equal(y.isfinite(), their_y.isfinite()) and torch.equal(y.isnan(), their_y.isnan())
    assert not dweight[[3, 19]].isfinite().all() and dweight[:3].isfinite().all() and dweight[4:19].isfinite().all()
    assert dweight.isfinite().logical_or(~their_dweight.isfinite()).all()
    assert dbias.isfinite().all()

    x, grad = grad, x
    _, dx, dweight, dbias = compiled(x, weight, bias, grad, 1)
    _, their_dx, their_dweight, _ = eager(x.float(), weight.float(), bias.float(), grad.float(), 1)
    assert torch.equal(dx.isfinite(), their_dx.isfinite()) and torch.equal(dx.isnan(), their_dx.isnan())
    # The padding may take part (0 * Inf), as in PyTorch's own fp64: never fewer than PyTorch has in fp32.
    assert (dweight.isfinite() <= their_dweight.isfinite()).all()
    assert dbias.isfinite().sum() == 18
    assert dweight[:3].isfinite().all() and dweight[4:19].isfinite().all()


def test_same_bits_for_any_number_of_threads():
    for shape, stride in [((6, 96, 28, 28), 1), ((40, 40, 7, 7), 1), ((2, 20, 37, 150), 2)]:
        x = channels_last(*shape, dtype=torch.bfloat16)
        grad = channels_last(*shape[:2], *[(s - 1) // stride + 1 for s in shape[2:]], dtype=torch.bfloat16)
        weight, bias = torch.randn(shape[1], 1, 7, 7), torch.randn(shape[1])
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(compiled(x, weight, bias, grad, stride))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_arguments_are_not_written():
    x, grad = channels_last(2, 24, 9, 9), channels_last(2, 24, 9, 9)
    weight, bias, residual = torch.randn(24, 1, 7, 7), torch.randn(24), channels_last(2, 24, 9, 9)
    scale = torch.tensor([0.0, 2.0])
    arguments = [x, weight, bias, grad, residual, scale]
    copies = [t.clone() for t in arguments]
    compiled(x, weight, bias, grad, 1, residual, scale)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_capability(capability):
    """The numerics again in a process that runs the kernels compiled for another instruction set."""
    environment = {**os.environ, "CONVNEXT_KERNELS_CPU_CAPABILITY": capability}
    tests = "(every_kernel_and_stride and not 3x56x56 and not 20x3x230) or residual or dropped or non_finite"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "this processor does not support" in done.stdout + done.stderr:
        pytest.skip(f"this processor does not support {capability}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


X, W, B = channels_last(2, 8, 6, 6), torch.randn(8, 1, 3, 3), torch.randn(8)
ONES = torch.ones(2)
FORWARD = "depthwise_conv2d"
INPUT = "depthwise_conv2d_input_grad"
WEIGHT = "depthwise_conv2d_weight_grad"


@pytest.mark.parametrize(
    "operator, arguments, message",
    [
        (FORWARD, (X[0], W, B, 1, None), r"depthwise_conv2d: argument 'x': expected .*rank 4, got rank 3"),
        (FORWARD, (X.contiguous(), W, B, 1, None), r"argument 'x': expected .*channels-last.*got strides"),
        (FORWARD, (X.int(), W, B, 1, None), r"argument 'x': .*float32.*got Int"),
        (FORWARD, (channels_last(2, 8, 0, 6), W, B, 1, None), r"'x': expected at least one.*\(2, 8, 0, 6\)"),
        (FORWARD, (channels_last(2, 8, 6, 0), W, B, 1, None), r"'x': expected at least one.*\(2, 8, 6, 0\)"),
        (FORWARD, (channels_last(2, 0, 6, 6), W[:0], None, 1, None), r"'x': expected at least one"),
        (FORWARD, (X, W[:, 0], B, 1, None), r"argument 'weight': expected .*rank 4, got rank 3"),
        (FORWARD, (X, W[:7], B, 1, None), r"'weight': expected shape \(8, 1, 3, 3\), got shape \(7, 1, 3, 3\)"),
        (FORWARD, (X, torch.randn(8, 2, 3, 3), B, 1, None), r"'weight': expected shape \(8, 1, 3, 3\)"),
        (FORWARD, (X, torch.randn(8, 1, 3, 5), B, 1, None), r"'weight': expected shape \(8, 1, 3, 3\)"),
        (FORWARD, (X, torch.randn(8, 1, 4, 4), B, 1, None), r"'weight': expected kernel size 3, 5.*got 4"),
        (FORWARD, (X, torch.randn(8, 1, 1, 1), B, 1, None), r"'weight': expected kernel size 3, 5.*got 1"),
        (FORWARD, (X, torch.randn(8, 1, 13, 13), B, 1, None), r"'weight': expected kernel size 3, 5.*got 13"),
        (FORWARD, (X, W.int(), B, 1, None), r"argument 'weight': .*got Int"),
        (FORWARD, (X, W, B[:7], 1, None), r"argument 'bias': expected shape \(8\), got shape \(7\)"),
        (FORWARD, (X, W, B.int(), 1, None), r"argument 'bias': .*got Int"),
        (FORWARD, (X, W, B, 3, None), r"argument 'stride': expected 1 or 2, got 3"),
        (FORWARD, (X, W, B, 0, None), r"argument 'stride': expected 1 or 2, got 0"),
        (FORWARD, (X, W, B, 1, ONES[:1]), r"argument 'sample_scale': expected shape \(2\), got shape \(1\)"),
        (FORWARD, (X, W, B, 1, ONES.double()), r"argument 'sample_scale': expected Float, got Double"),
        (INPUT, (X[0], W, None, 1, [0, 0], None), r"depthwise_conv2d_input_grad: argument 'grad': .*rank 4"),
        (INPUT, (X.contiguous(), W, None, 1, [0, 0], None), r"argument 'grad': .*channels-last"),
        (INPUT, (X, W[:7], None, 1, [0, 0], None), r"argument 'weight': expected shape"),
        (INPUT, (X, W, None, 4, [0, 0], None), r"argument 'stride': expected 1 or 2, got 4"),
        (INPUT, (X, W, None, 1, [0, 1], None), r"argument 'output_padding': .*stride - 1, got \(0, 1\)"),
        (INPUT, (X, W, None, 2, [-1, 0], None), r"argument 'output_padding': .*got \(-1, 0\)"),
        (INPUT, (X, W, None, 2, [0], None), r"argument 'output_padding': expected two numbers.*got \(0\)"),
        (INPUT, (X, W, X, 2, [0, 0], None), r"'residual': expected shape \(2, 8, 11, 11\), got shape \(2, 8, 6, 6\)"),
        (INPUT, (X, W, X.contiguous(), 1, [0, 0], None), r"argument 'residual': .*channels-last"),
        (INPUT, (X, W, X.double(), 1, [0, 0], None), r"argument 'residual': expected float64 where.*got Double"),
        (INPUT, (X, W, None, 1, [0, 0], ONES.half()), r"argument 'sample_scale': expected Float, got Half"),
        (WEIGHT, (X, X[0], 3, 1, None), r"depthwise_conv2d_weight_grad: argument 'x': .*rank 4, got rank 3"),
        (WEIGHT, (X.contiguous(), X, 3, 1, None), r"argument 'grad': .*channels-last"),
        (WEIGHT, (X, X, 4, 1, None), r"argument 'kernel_size': .*got 4"),
        (WEIGHT, (X, X, 3, 3, None), r"argument 'stride': expected 1 or 2, got 3"),
        (WEIGHT, (X, X, 3, 2, None), r"argument 'grad': expected shape \(2, 8, 3, 3\), got shape \(2, 8, 6, 6\)"),
        (WEIGHT, (X.half(), X, 3, 1, None), r"argument 'grad': expected .*Float.*got Half"),
        (WEIGHT, (X, X, 3, 1, torch.ones(4)[::2]), r"argument 'sample_scale': expected a contiguous"),
    ],
)
def test_errors(operator, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, operator)(*arguments)


@pytest.mark.parametrize("position, name", [(0, "x"), (1, "weight"), (2, "bias"), (4, "sample_scale")])
def test_another_device(position, name):
    arguments = [X, W, B, 1, ONES]
    arguments[position] = arguments[position].to("meta")
    # Past the dispatcher, which would choose the other device's kernel.
    cpu = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    with pytest.raises(RuntimeError, match=f"depthwise_conv2d: argument '{name}': expected a CPU tensor"):
        ops.depthwise_conv2d.default.redispatch(cpu, *arguments)
