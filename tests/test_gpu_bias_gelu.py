"""bias_gelu and its backward on a GPU: values, streams, graphs, no synchronisation, determinism, large tensors."""

import pytest
import torch
import torch.nn.functional as F

import convnext_kernels  # noqa: F401  (loads the compiled operators)
import numerics

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(49, 384), (3, 7, 7, 768), (1, 3072), (1000, 96), (37, 40), (13, 100), (5, 3), (300, 1), (7, 2056)]
ops = torch.ops.convnext_kernels


def make(shape, dtype, bias_dtype=torch.float32):
    x = (2 * torch.randn(shape, device=DEVICE)).to(dtype)
    bias = torch.randn(shape[-1], device=DEVICE).to(bias_dtype)
    return x, torch.randn(shape, device=DEVICE).to(dtype), bias


def in_pytorch(grad, x, bias, approximate):
    """y, grad_x and grad_bias as PyTorch computes them in the tensors' dtype."""
    x, bias = x.detach().requires_grad_(), bias.to(x.dtype).detach().requires_grad_()
    y = F.gelu(x + bias, approximate=approximate)
    y.backward(grad)
    return y.detach(), x.grad, bias.grad


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape, dtype, approximate):
    x, grad, bias = make(shape, dtype, dtype)
    y = ops.bias_gelu(x, bias, approximate)
    grad_x, grad_bias = ops.bias_gelu_backward(grad, x, bias, approximate)
    theirs = in_pytorch(grad, x, bias, approximate)
    truth = in_pytorch(grad.double(), x.double(), bias.double(), approximate)
    numerics.assert_close(y, theirs[0], truth[0], "y")
    numerics.assert_close(grad_x, theirs[1], truth[1], "grad_x")
    assert grad_bias.dtype == torch.float32
    # A sum of `rows` terms: what the derivative's own error bound (2^-16 a term) and fp32 may cost.
    rows = x.numel() // x.shape[-1]
    terms = (grad.double().abs() * 1.2).reshape(rows, -1).sum(0)
    unit = 2.0**-15 if dtype != torch.float32 else 2.0**-20
    assert ((grad_bias.double() - truth[2]).abs() <= unit * terms + 1e-12).all()


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_bias_of_any_dtype(dtype, bias_dtype):
    x, _, bias = make((33, 72), dtype, bias_dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = F.gelu(x.double() + bias.to(wide).double()).to(dtype)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(ops.bias_gelu(x, bias, "none"), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bias(dtype):
    x, grad, _ = make((33, 72), dtype)
    zero = torch.zeros(72, device=DEVICE)
    assert torch.equal(ops.bias_gelu(x, None, "none"), ops.bias_gelu(x, zero, "none"))
    grad_x, grad_bias = ops.bias_gelu_backward(grad, x, None, "none")
    assert torch.equal(grad_x, ops.bias_gelu_backward(grad, x, zero, "none")[0])
    assert grad_bias.shape == (0,)


@pytest.mark.parametrize("unaligned", [("x",), ("grad",), ("x", "grad")], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_tensors(dtype, unaligned):
    x, grad, bias = make((33, 72), dtype)

    def moved(name, t):
        memory = torch.empty(t.numel() + 1, device=DEVICE, dtype=t.dtype)
        return memory[1:].view(t.shape).copy_(t) if name in unaligned else t

    ours = both(moved("grad", grad), moved("x", x), bias)
    aligned = both(grad, x, bias)
    assert torch.equal(ours[0], aligned[0]) and torch.equal(ours[1], aligned[1])
    torch.testing.assert_close(ours[2], aligned[2])


def test_empty():
    x = torch.empty(0, 7, 96, device=DEVICE, dtype=torch.bfloat16)
    bias = torch.randn(96, device=DEVICE)
    assert ops.bias_gelu(x, bias, "none").shape == x.shape
    grad_x, grad_bias = ops.bias_gelu_backward(x, x, bias, "none")
    assert grad_x.shape == x.shape
    assert torch.equal(grad_bias, torch.zeros(96, device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
def test_non_finite_values(dtype):
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 3e4, -3e4]], device=DEVICE, dtype=dtype)
    for approximate in ["none", "tanh"]:
        y, expected = ops.bias_gelu(x, None, approximate), F.gelu(x, approximate=approximate)
        torch.testing.assert_close(y, expected, equal_nan=True)
        grad_x, _ = ops.bias_gelu_backward(torch.ones_like(x), x, None, approximate)
        zero = torch.zeros(5, device=DEVICE, dtype=dtype)
        expected = in_pytorch(torch.ones_like(x), x, zero, approximate)[1]
        torch.testing.assert_close(grad_x, expected, equal_nan=True)


def both(grad, x, bias):
    return (ops.bias_gelu(x, bias, "none"), *ops.bias_gelu_backward(grad, x, bias, "none"))


def test_two_runs_are_the_same_bits():
    x, grad, bias = make((20000, 384), torch.bfloat16)
    first = both(grad, x, bias)
    for _ in range(3):
        for a, b in zip(first, both(grad, x, bias)):
            assert torch.equal(a, b)


def test_side_stream():
    x, grad, bias = make((5000, 384), torch.bfloat16)
    expected = both(grad, x, bias)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Long work first: launched on another stream, the operators would read x before it is written.
        late = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        got = both(grad, late, bias)
    stream.synchronize()
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def test_cuda_graph():
    x, grad, bias = make((5000, 384), torch.bfloat16)
    both(grad, x, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both(grad, x, bias)
    for seed in range(2):
        torch.manual_seed(seed)
        x.normal_()
        grad.normal_()
        graph.replay()
        for a, b in zip(captured, both(grad, x, bias)):
            assert torch.equal(a, b)


def test_no_synchronisation():
    x, grad, bias = make((5000, 384), torch.bfloat16)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both(grad, x, bias)
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.gpu_memory(20)
def test_more_than_2_to_31_elements():
    rows, columns = 2**31 // 3072 + 5, 3072
    x = torch.zeros(rows, columns, device=DEVICE, dtype=torch.bfloat16)
    x[-3:] = torch.randn(3, columns, device=DEVICE).to(torch.bfloat16)
    bias = torch.randn(columns, device=DEVICE)
    y = ops.bias_gelu(x, bias, "none")
    assert torch.equal(y[-3:], ops.bias_gelu(x[-3:].clone(), bias, "none"))
    assert torch.equal(y[:1].expand(rows - 3, -1), y[:-3])
    grad_x, grad_bias = ops.bias_gelu_backward(x, x, bias, "none")
    small_x, small_bias = ops.bias_gelu_backward(x[-3:].clone(), x[-3:].clone(), bias, "none")
    assert torch.equal(grad_x[-3:], small_x)
    torch.testing.assert_close(grad_bias, small_bias)


def test_errors_name_operator_and_argument():
    x, grad, bias = make((5, 96), torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"bias_gelu: argument 'approximate': expected 'none' or 'tanh', got 'fast'"):
        ops.bias_gelu(x, bias, "fast")
    with pytest.raises(RuntimeError, match=r"bias_gelu: argument 'bias': expected shape \(96\), got shape \(95\)"):
        ops.bias_gelu(x, bias[1:], "none")
    with pytest.raises(
        RuntimeError, match="bias_gelu_backward: argument 'grad': expected x's dtype BFloat16, got Float"
    ):
        ops.bias_gelu_backward(grad.float(), x, bias, "none")
    with pytest.raises(RuntimeError, match="bias_gelu: argument 'x': expected a contiguous tensor"):
        ops.bias_gelu(x.t(), torch.zeros(5, device=DEVICE), "none")
