"""layer_norm and its backward on the CPU: the compiled kernels against fp64, by the numerics rule."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import convnext_kernels  # noqa: F401  (loads the operators)
from numerics import assert_close

ops = torch.ops.convnext_kernels

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
CHANNELS = [1, 3, 8, 40, 96, 100, 384]


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(ours, theirs, truth, name, unit=None):
    if ours.dtype == torch.float64:
        assert (ours - truth).abs().max() <= 1e-10 * truth.abs().max() + 1e-10, name
    else:
        assert_close(ours, theirs, truth, name, unit)


def eager(x, weight, bias, grad, out_dtype):
    """PyTorch's LayerNorm and its gradients, in the dtypes given."""
    leaves = [t.clone().requires_grad_() for t in (x, weight, bias) if t is not None]
    rest = iter(leaves[1:])
    parameters = [None if t is None else next(rest) for t in (weight, bias)]
    y = F.layer_norm(leaves[0], x.shape[-1:], *parameters, 1e-6).to(out_dtype)
    return y.detach(), torch.autograd.grad(y, leaves, grad)


def check(x, weight, bias, grad, out_dtype, unit=None):
    y, mean, rstd = ops.layer_norm(x, weight, bias, 1e-6, out_dtype)
    grads = ops.layer_norm_backward(grad, x, mean, rstd, weight, True, weight is not None, bias is not None)
    assert y.dtype == out_dtype and mean.dtype == rstd.dtype == accumulation(x.dtype)
    assert mean.shape == rstd.shape == x.shape[:-1]
    given_tensors = [t for t in (x, weight, bias) if t is not None]
    grads = [g for g, t in zip(grads, (x, weight, bias), strict=True) if t is not None]

    wide = [None if t is None else t.double() for t in (x, weight, bias, grad)]
    truth, truth_grads = eager(*wide, torch.float64)
    theirs, their_grads = eager(x, weight, bias, grad, out_dtype)
    compare(y, theirs, truth, "y", unit)
    for i, (ours, other, true, like) in enumerate(zip(grads, their_grads, truth_grads, given_tensors, strict=True)):
        compare(ours.to(like.dtype), other, true, f"gradient {i}", unit)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    scale = x.double().abs().amax(-1) + 1e-30
    eps = torch.finfo(mean.dtype).eps
    assert ((mean - x.double().mean(-1)).abs() <= 8 * eps * scale).all()
    assert torch.allclose(rstd.double(), (centred.square().mean(-1) + 1e-6).rsqrt(), rtol=64 * eps)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_channel_count(dtype, channels):
    x, grad = (torch.randn(3, 7, 5, channels).to(dtype) for _ in range(2))
    weight, bias = torch.randn(channels).to(dtype), torch.randn(channels).to(dtype)
    check(x + 1, weight, bias, grad, dtype)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_result_dtype(dtype, out_dtype):
    x, grad = torch.randn(300, 40).to(dtype), torch.randn(300, 40).to(out_dtype)
    weight, bias = torch.randn(40), torch.randn(40)
    unit = max(torch.finfo(dtype).eps, torch.finfo(out_dtype).eps) / 2
    check(x, weight, bias, grad, out_dtype, unit)


def test_fp64_result_of_fp32_is_the_fp32_result():
    x = torch.randn(20, 24)
    wide, narrow = (ops.layer_norm(x, None, None, 1e-6, dtype)[0] for dtype in (torch.float64, torch.float32))
    assert wide.dtype == torch.float64
    assert torch.equal(wide, narrow.double())
    assert torch.equal(
        ops.layer_norm(x.double(), None, None, 1e-6, torch.float32)[0],
        ops.layer_norm(x.double(), None, None, 1e-6, torch.float64)[0].float(),
    )


@pytest.mark.parametrize("has_weight, has_bias", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_parameters(dtype, has_weight, has_bias):
    x, grad = torch.randn(50, 24).to(dtype), torch.randn(50, 24).to(dtype)
    parameter = torch.randn(24).to(dtype)
    check(x, parameter if has_weight else None, parameter if has_bias else None, grad, dtype)


def test_parameter_dtypes_do_not_matter():
    x, weight, bias = torch.randn(9, 16), torch.randn(16).bfloat16(), torch.randn(16).half()
    expected = ops.layer_norm(x, weight.float(), bias.float(), 1e-6, torch.float32)
    for ours, other in zip(ops.layer_norm(x, weight, bias.double(), 1e-6, torch.float32), expected, strict=True):
        assert torch.equal(ours, other)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(0, 70), channels=st.integers(1, 70), offset=st.sampled_from([0.0, 100.0]))
def test_any_shape(rows, channels, offset):
    torch.manual_seed(rows * 100 + channels)
    x, grad = (torch.randn(rows, channels, dtype=torch.float64) for _ in range(2))
    weight, bias = (torch.randn(channels, dtype=torch.float64) for _ in range(2))
    x = x + offset
    truth, truth_grads = eager(x, weight, bias, grad, torch.float64)
    y, mean, rstd = ops.layer_norm(x, weight, bias, 1e-6, torch.float64)
    grads = ops.layer_norm_backward(grad, x, mean, rstd, weight, True, True, True)
    for ours, true in zip((y, *grads), (truth, *truth_grads), strict=True):
        assert torch.allclose(ours, true, rtol=1e-9, atol=1e-9 * (1 + (true.abs().max() if true.numel() else 0)))


def test_no_rows():
    x = torch.randn(0, 4, 8)
    y, mean, rstd = ops.layer_norm(x, None, None, 1e-6, torch.bfloat16)
    assert (y.shape, y.dtype, mean.shape, rstd.shape) == (x.shape, torch.bfloat16, (0, 4), (0, 4))
    dx, dweight, dbias = ops.layer_norm_backward(x, x, mean, rstd, None, True, True, True)
    assert dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros(8)) and torch.equal(dbias, torch.zeros(8))


@pytest.mark.parametrize("needs", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)])
def test_only_what_is_asked_for(needs):
    x, grad, weight = torch.randn(40, 12), torch.randn(40, 12), torch.randn(12)
    _, mean, rstd = ops.layer_norm(x, weight, None, 1e-6, x.dtype)
    everything = ops.layer_norm_backward(grad, x, mean, rstd, weight, True, True, True)
    some = ops.layer_norm_backward(grad, x, mean, rstd, weight, *map(bool, needs))
    for wanted, ours, full in zip(needs, some, everything, strict=True):
        assert torch.equal(ours, full) if wanted else ours.shape == (0,)


def test_large_mean_and_large_fp16():
    # E[x^2] - E[x]^2 would have no digits left.
    x = torch.randn(64, 96) + 4096
    truth = F.layer_norm(x.double(), (96,), eps=1e-6)
    assert_close(
        ops.layer_norm(x, None, None, 1e-6, x.dtype)[0], F.layer_norm(x, (96,), eps=1e-6), truth, "y", unit=1e-6
    )
    huge = (torch.randn(64, 96).sign() * 60000 + torch.randn(64, 96) * 100).half()
    y = ops.layer_norm(huge, None, None, 1e-6, torch.float16)[0]
    assert y.isfinite().all()
    assert_close(y, F.layer_norm(huge.float(), (96,), eps=1e-6).half(), F.layer_norm(huge.double(), (96,), eps=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite(dtype, value):
    x, grad = torch.randn(20, 37).to(dtype), torch.randn(20, 37).to(dtype)
    x[3, 36] = x[7, 0] = value
    y, mean, rstd = ops.layer_norm(x, None, None, 1e-6, dtype)
    dx, _, _ = ops.layer_norm_backward(grad, x, mean, rstd, None, True, False, False)
    theirs, (their_dx,) = eager(x, None, None, grad, dtype)
    assert torch.equal(y.isnan(), theirs.isnan()) and y.isnan().any(-1).sum() == 2
    assert torch.equal(dx.isnan(), their_dx.isnan())
    assert dx.isfinite().all(-1).sum() == 18


def test_same_bits_for_any_number_of_threads():
    x, grad, weight = torch.randn(5000, 96), torch.randn(5000, 96), torch.randn(96)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, mean, rstd = ops.layer_norm(x, weight, weight, 1e-6, torch.float32)
            results.append((y, mean, rstd, *ops.layer_norm_backward(grad, x, mean, rstd, weight, True, True, True)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


X, ROWS = torch.randn(4, 8), torch.randn(4)


@pytest.mark.parametrize(
    "operator, arguments, message",
    [
        (
            "layer_norm",
            (torch.tensor(1.0), None, None, 1e-6, torch.float32),
            "layer_norm: argument 'x': expected .*(rank|C >= 1)",
        ),
        (
            "layer_norm",
            (torch.randn(3, 0), None, None, 1e-6, torch.float32),
            "argument 'x': expected .*(at least one|C >= 1)",
        ),
        ("layer_norm", (X.int(), None, None, 1e-6, torch.float32), "argument 'x'.*got Int"),
        ("layer_norm", (X.t(), None, None, 1e-6, torch.float32), r"argument 'x': expected a contiguous.*\(1, 8\)"),
        (
            "layer_norm",
            (X, torch.randn(7), None, 1e-6, torch.float32),
            r"'weight': expected shape \(8\), got shape \(7\)",
        ),
        ("layer_norm", (X, None, torch.ones(8).int(), 1e-6, torch.float32), "argument 'bias'.*got Int"),
        ("layer_norm", (X, None, None, 1e-6, torch.int32), "argument 'out_dtype'.*got Int"),
        ("layer_norm_backward", (X[:3], X, ROWS, ROWS, None, True, True, True), "layer_norm_backward: argument 'grad'"),
        ("layer_norm_backward", (X, X, ROWS[:3], ROWS, None, True, True, True), "argument 'mean'.*shape"),
        ("layer_norm_backward", (X, X, ROWS, ROWS.double(), None, True, True, True), "argument 'rstd'.*got Double"),
        ("layer_norm_backward", (X, X, ROWS, ROWS, torch.ones(9), True, True, True), "argument 'weight'"),
    ],
)
def test_errors(operator, arguments, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, operator)(*arguments)


@pytest.mark.parametrize("channels", [96, 192, 384, 1000, 5000])
@pytest.mark.parametrize("mean, spread", [(3.3, 0.0), (-1e7, 1.0), (1e4, 1e-2)])
def test_rows_of_all_but_equal_values(channels, mean, spread):
    """What rounding leaves in the mean would be all that is seen of them: rstd is up to 1000."""
    x = mean + spread * torch.randn(6, channels)
    y = ops.layer_norm(x, None, None, 1e-6, torch.float32)[0]
    assert_close(y, F.layer_norm(x, (channels,), eps=1e-6), F.layer_norm(x.double(), (channels,), eps=1e-6))
