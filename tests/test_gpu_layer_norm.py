"""layer_norm and its backward on a GPU: values, streams, graphs, no synchronisation, determinism, large tensors."""

import pytest
import torch
import torch.nn.functional as F

import convnext_kernels  # noqa: F401  (loads the compiled operators)
import numerics

pytestmark = pytest.mark.gpu

EPS = 1e-6
# The types of x and of y: what PyTorch computes, alone and under autocast.
TYPES = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
SHAPES = [
    *[(3136, 96), (3, 7, 7, 768), (49, 1536), (200, 40), (64, 80), (130, 100), (35, 192), (5, 2816), (9, 4096)],
    *[(300, 1), (5, 3), (37, 7), (3, 4095), (2, 5000), (2, 9000), (1, 96)],
]
ops = torch.ops.convnext_kernels


def make(shape, dtype, grad_dtype=None, parameter_dtype=torch.float32):
    """x, the gradient of y, weight and bias."""
    x = (2 * torch.randn(shape, device="cuda") + 0.5).to(dtype)
    weight, bias = (torch.randn(shape[-1], device="cuda").to(parameter_dtype) for _ in range(2))
    return x, torch.randn(shape, device="cuda").to(grad_dtype or dtype), weight, bias


def in_pytorch(grad, x, weight, bias, dtype):
    """y and the three gradients, as PyTorch computes them in `dtype`; the gradient of x in the dtype of x."""
    x, weight, bias = (t.detach().to(dtype).requires_grad_() for t in (x, weight, bias))
    y = F.layer_norm(x, x.shape[-1:], weight, bias, EPS)
    y.backward(grad.to(dtype))
    return y.detach(), x.grad, weight.grad, bias.grad


def both(grad, x, weight, bias, out_dtype=None):
    """All results of the forward and the backward."""
    forward = ops.layer_norm(x, weight, bias, EPS, out_dtype or x.dtype)
    return *forward, *ops.layer_norm_backward(grad, x, forward[1], forward[2], weight, True, True, True)


@pytest.mark.parametrize("types", TYPES, ids=lambda t: f"{t[0]}-{t[1]}".replace("torch.", ""))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_fp64(shape, types):
    dtype, out_dtype = types
    x, grad, weight, bias = make(shape, dtype, out_dtype)
    y, mean, rstd, *gradients = both(grad, x, weight, bias, out_dtype)
    # Under autocast PyTorch computes in fp32 and rounds; in one 16-bit type its kernel reads and writes that.
    alone = dtype == out_dtype
    weights = [weight.to(dtype) if alone else weight, bias.to(dtype) if alone else bias]
    if alone:
        y, mean, rstd, *gradients = both(grad, x, *weights, out_dtype)
    theirs = in_pytorch(grad, x, *weights, dtype if alone else torch.float32)
    truth = in_pytorch(grad, x, *weights, torch.float64)
    numerics.assert_close(y, theirs[0].to(out_dtype), truth[0], "y")
    numerics.assert_close(gradients[0], theirs[1].to(dtype), truth[1], "grad_x")
    # Sums of `rows` terms in fp32: what their rounding may cost. A normalised value near 0 has an absolute error, the
    # mean's.
    rows = x.double().reshape(-1, shape[-1])
    normalised = F.layer_norm(rows, rows.shape[-1:], eps=EPS)
    flat = grad.double().reshape(rows.shape)
    sizes = flat.abs().sum(0)
    for name, ours, exact, terms in (
        ("grad_weight", gradients[1], truth[2], (flat * normalised).abs().sum(0) + 2.0**-3 * sizes),
        ("grad_bias", gradients[2], truth[3], sizes),
    ):
        assert ours.dtype == torch.float32
        assert ((ours.double() - exact).abs() <= 2.0**-19 * terms + 1e-12).all(), name
    torch.testing.assert_close(mean.double().flatten(), rows.mean(-1), rtol=1e-5, atol=1e-5)
    variance = rows.var(-1, unbiased=False)
    torch.testing.assert_close(rstd.double().flatten(), (variance + EPS).rsqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parameter_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_parameters_of_any_dtype(dtype, parameter_dtype):
    x, grad, weight, bias = make((33, 72), dtype, parameter_dtype=parameter_dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours = both(grad, x, weight, bias)
    for a, b in zip(ours, both(grad, x, weight.to(wide), bias.to(wide))):
        assert torch.equal(a, b)
    expected = in_pytorch(grad, x, weight, bias, torch.float64)
    tolerance = 8 * torch.finfo(dtype).eps
    for a, b in zip((ours[0], *ours[3:]), expected):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_results_and_gradients_of_any_dtype(dtype, out_dtype):
    """Pairs without a kernel of their own go through the accumulation type: bit for bit. The others add up in an order
    of their own."""
    x, grad, weight, bias = make((33, 72), dtype, out_dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours, expected = both(grad, x, weight, bias, out_dtype), both(grad.to(wide), x, weight, bias, wide)
    assert ours[0].dtype == out_dtype
    own_order = dtype == out_dtype != wide
    for a, b in zip(ours[:4], (expected[0].to(out_dtype), *expected[1:4])):
        if own_order:
            torch.testing.assert_close(a, b)
        else:
            assert torch.equal(a, b)
    for a, b in zip(ours[4:], expected[4:]):
        torch.testing.assert_close(a, b)


def test_without_parameters_and_with_fewer_gradients():
    x, grad, weight, _ = make((300, 96), torch.bfloat16)
    one, zero = torch.ones(96, device="cuda"), torch.zeros(96, device="cuda")
    y, mean, rstd = ops.layer_norm(x, None, None, EPS, x.dtype)
    assert torch.equal(y, ops.layer_norm(x, one, zero, EPS, x.dtype)[0])
    all_three = ops.layer_norm_backward(grad, x, mean, rstd, weight, True, True, True)
    for mask in range(8):
        needs = [bool(mask >> i & 1) for i in range(3)]
        for wanted, got, expected in zip(
            needs, ops.layer_norm_backward(grad, x, mean, rstd, weight, *needs), all_three
        ):
            assert torch.equal(got, expected) if wanted else got.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unaligned_tensor(dtype):
    memory, grad_memory = (torch.randn(33 * 72 + 1, device="cuda").to(dtype) for _ in range(2))
    x, grad = memory[1:].view(33, 72), grad_memory[1:].view(33, 72)
    weight, bias = torch.randn(72, device="cuda"), torch.randn(72, device="cuda")
    for a, b in zip(both(grad, x, weight, bias), both(grad.clone(), x.clone(), weight, bias)):
        torch.testing.assert_close(a, b)


def test_empty():
    x, _, weight, bias = make((0, 7, 96), torch.bfloat16)
    y, mean, rstd, grad_x, grad_weight, grad_bias = both(x, x, weight, bias)
    assert y.shape == grad_x.shape == x.shape
    assert mean.shape == rstd.shape == (0, 7)
    assert torch.equal(grad_weight, torch.zeros(96, device="cuda"))
    assert torch.equal(grad_bias, grad_weight)


@pytest.mark.parametrize("shape", [(300, 96), (49, 1536), (50, 99), (3, 9000)], ids=str)
def test_a_large_mean_costs_no_digits(shape):
    x = torch.randn(shape, device="cuda") + 1e4
    weight, bias = torch.ones(shape[-1], device="cuda"), torch.zeros(shape[-1], device="cuda")
    y = ops.layer_norm(x, weight, bias, EPS, x.dtype)[0]
    theirs = F.layer_norm(x, shape[-1:], weight, bias, EPS)
    numerics.assert_close(y, theirs, F.layer_norm(x.double(), shape[-1:], eps=EPS), "y")


def test_large_half_precision_stays_finite():
    x = (60000 + 500 * torch.randn(300, 96, device="cuda")).clamp(max=65504).half()
    y = ops.layer_norm(x, None, None, EPS, x.dtype)[0]
    expected = F.layer_norm(x.double(), (96,), eps=EPS)
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_non_finite_values(dtype):
    x, _, weight, bias = make((40, 96), dtype)
    x[3, 5], x[20, 0], x[21, 95] = float("inf"), float("nan"), -float("inf")
    y = ops.layer_norm(x, weight, bias, EPS, dtype)[0]
    expected = F.layer_norm(x.float(), (96,), weight, bias, EPS).to(dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


def test_two_runs_are_the_same_bits():
    x, grad, weight, bias = make((20000, 384), torch.bfloat16)
    first = both(grad, x, weight, bias)
    for _ in range(3):
        for a, b in zip(first, both(grad, x, weight, bias)):
            assert torch.equal(a, b)


def test_side_stream():
    x, grad, weight, bias = make((5000, 384), torch.bfloat16)
    expected = both(grad, x, weight, bias)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Long work first: launched on another stream, the operators would read x before it is written.
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = both(grad, late, weight, bias)
    stream.synchronize()
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_cuda_graph():
    x, grad, weight, bias = make((5000, 384), torch.bfloat16)
    both(grad, x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(grad, x, weight, bias)
    for seed in range(2):
        torch.manual_seed(seed)
        x.normal_()
        grad.normal_()
        graph.replay()
        for a, b in zip(captured, both(grad, x, weight, bias)):
            assert torch.equal(a, b)


def test_no_synchronisation():
    x, grad, weight, bias = make((5000, 384), torch.bfloat16)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(grad, x, weight, bias)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu_memory(24)
def test_more_than_2_to_31_elements():
    rows, channels = 2**31 // 96 + 5, 96
    x = torch.zeros(rows, channels, device="cuda", dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, channels, device="cuda").to(torch.bfloat16)
    weight, bias = torch.randn(channels, device="cuda"), torch.randn(channels, device="cuda")
    y, mean, rstd, *gradients = both(x, x, weight, bias)
    end = x[-3:].clone()
    small = both(end, end, weight, bias)
    assert torch.equal(y[-3:], small[0])
    assert torch.equal(y[:-3], bias.to(y.dtype).expand(rows - 3, -1))
    assert torch.equal(mean[-3:], small[1])
    assert torch.equal(rstd[-3:], small[2])
    assert torch.equal(gradients[0][-3:], small[3])
    torch.testing.assert_close(gradients[1], small[4])
    torch.testing.assert_close(gradients[2], small[5])


def test_errors_name_operator_and_argument():
    x, grad, weight, bias = make((5, 96), torch.bfloat16)
    _, mean, rstd = ops.layer_norm(x, weight, bias, EPS, x.dtype)
    with pytest.raises(RuntimeError, match=r"layer_norm: argument 'weight': expected shape \(96\), got shape \(95\)"):
        ops.layer_norm(x, weight[1:], bias, EPS, x.dtype)
    with pytest.raises(RuntimeError, match="layer_norm: argument 'bias': expected a CUDA tensor"):
        ops.layer_norm(x, weight, bias.cpu(), EPS, x.dtype)
    with pytest.raises(RuntimeError, match="layer_norm: argument 'x': expected a contiguous tensor"):
        ops.layer_norm(x.t(), None, None, EPS, x.dtype)
    with pytest.raises(RuntimeError, match=r"layer_norm: argument 'out_dtype': expected float32, .*, got Long"):
        ops.layer_norm(x, weight, bias, EPS, torch.int64)
    needs = (True, True, True)
    with pytest.raises(RuntimeError, match="layer_norm_backward: argument 'mean': expected Float, got BFloat16"):
        ops.layer_norm_backward(grad, x, mean.bfloat16(), rstd, weight, *needs)
    with pytest.raises(RuntimeError, match=r"layer_norm_backward: argument 'grad': expected shape \(5, 96\)"):
        ops.layer_norm_backward(grad[1:], x, mean, rstd, weight, *needs)
