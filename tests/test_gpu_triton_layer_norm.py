"""Triton's LayerNorm and bias+GELU, forward and backward, against fp64: on a GPU, and interpreted on the CPU.

test_triton_layer_norm.py starts the interpreter.
"""

import itertools

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import reference_backend
from convnext_kernels.triton_kernels import launch
from numerics import assert_close, rms

pytestmark = [] if launch.INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ops = torch.ops.convnext_kernels

SHAPES = [(2, 3, 3), (5, 1), (7, 40), (1, 96), (33, 96), (3, 7, 100), (2, 5, 8), (1, 768), (2, 4096), (3, 4100), (4,)]
if not launch.INTERPRETED:
    SHAPES += [(128 * 56 * 56, 96), (25088, 384), (6272, 768), (1000, 1536), (100, 20000)]


@pytest.fixture(autouse=True)
def triton_backend():
    with ck.use_backend("triton"):
        yield


def values(*shape, dtype=torch.float32, scale=1.0, mean=0.0):
    return (mean + scale * torch.randn(*shape, dtype=torch.float64)).to(DEVICE, dtype)


def double(arguments):
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]


def check(ours, theirs, truth, names, unit):
    for name, value, other, exact in zip(names, ours, theirs, truth, strict=True):
        assert_close(value, other, exact, name, unit)


# --- LayerNorm


def check_layer_norm(x, weight, bias, grad, out_dtype, eps=1e-6, needs=(True, True, True)):
    unit = torch.finfo(torch.float32).eps / 2
    arguments = x, weight, bias, eps
    ours, theirs = ops.layer_norm(*arguments, out_dtype), reference_backend.layer_norm(*arguments, out_dtype)
    truth = reference_backend.layer_norm(*double(arguments), torch.float64)
    check(ours, theirs, truth, ("y", "mean", "rstd"), unit)
    mean, rstd = ours[1:]
    arguments = grad, x, mean, rstd, weight, *needs
    ours, theirs = ops.layer_norm_backward(*arguments), reference_backend.layer_norm_backward(*arguments)
    truth = reference_backend.layer_norm_backward(grad.double(), x.double(), *truth[1:], *double([weight]), *needs)
    check(ours, theirs, truth, ("dx", "dweight", "dbias"), unit)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(shape, dtype):
    c = shape[-1]
    x = values(*shape, dtype=dtype, scale=2, mean=1)
    check_layer_norm(x, values(c), values(c), values(*shape, dtype=dtype), dtype)


MIXES = [
    # x, parameters, y, gradient of y
    (torch.bfloat16, torch.float32, torch.float32, torch.float32),
    (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32, torch.bfloat16, torch.float32),
]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_layer_norm_in_mixed_dtypes(mix):
    x, parameters, y, grad = mix
    weight, bias = values(40, dtype=parameters), values(40, dtype=parameters)
    check_layer_norm(values(9, 40, dtype=x), weight, bias, values(9, 40, dtype=grad), y)


@pytest.mark.parametrize("c", [40, 4100])
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_layer_norm_gradients_that_are_not_asked_for_are_empty(needs, c):
    weight = values(c) if needs[1] else None
    check_layer_norm(values(3, c), weight, values(c) if needs[2] else None, values(3, c), torch.float32, needs=needs)


def test_layer_norm_statistics_are_taken_in_two_passes():
    """A mean of 1000 at a deviation of 1: E[x^2] - E[x]^2 would lose all of it in fp32."""
    for c in (96, 5000):
        x = values(2, c, mean=1000)
        check_layer_norm(x, None, None, values(2, c), torch.float32, needs=(True, False, False))


def test_layer_norm_of_large_fp16_stays_finite():
    x = (torch.randn(3, 96).sign() * 60000).to(DEVICE, torch.float16)
    y, mean, rstd = ops.layer_norm(x, None, None, 1e-6, torch.float16)
    assert all(t.isfinite().all() for t in (y, mean, rstd))
    assert y.abs().max() < 3


def test_layer_norm_of_a_constant_row():
    y, _, rstd = ops.layer_norm(torch.full((2, 96), 3.0, device=DEVICE), None, None, 1e-6, torch.float32)
    assert not y.any() and torch.allclose(rstd, torch.tensor(1e3, device=DEVICE))


def test_layer_norm_propagates_nan_within_its_row():
    x = values(5, 40)
    x[2, 7] = float("nan")
    y = ops.layer_norm(x, None, None, 1e-6, torch.float32)[0]
    assert y[2].isnan().all() and y.isnan().sum() == 40


# --- bias + GELU


def check_bias_gelu(x, bias, grad, approximate):
    arguments = x, bias, approximate
    unit = torch.finfo(x.dtype).eps / 2
    ours, theirs = ops.bias_gelu(*arguments), reference_backend.bias_gelu(*arguments)
    check([ours], [theirs], [reference_backend.bias_gelu(*double(arguments))], ["y"], unit)
    ours, theirs = ops.bias_gelu_backward(grad, *arguments), reference_backend.bias_gelu_backward(grad, *arguments)
    truth = reference_backend.bias_gelu_backward(*double((grad, *arguments)))
    check(ours[:1], theirs[:1], truth[:1], ["dx"], unit)
    if bias is not None:  # a sum of terms that may cancel: the floor is a share of their magnitudes
        terms = truth[0].abs().flatten(0, -2).sum(0) if x.dim() > 1 else truth[0].abs()
        unit *= rms(terms) / rms(truth[1])
        if approximate == "tanh":
            unit *= 2  # exp2 of up to 20: its argument's rounding is that of several units of the result
        check(ours[1:], theirs[1:], truth[1:], ["dbias"], unit)
    else:
        assert ours[1].shape == (0,)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 3), (70, 160), (5, 1), (3, 5, 100), (1, 3072), (7,)], ids=str)
def test_bias_gelu(shape, dtype, approximate):
    x, grad = values(*shape, dtype=dtype, scale=3), values(*shape, dtype=dtype)
    check_bias_gelu(x, values(shape[-1], dtype=dtype), grad, approximate)
    check_bias_gelu(x, None, grad, approximate)
    check_bias_gelu(x, values(shape[-1]), grad, approximate)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_bias_gelu_of_non_finite_values(approximate):
    x = torch.tensor([[float("inf"), -float("inf"), float("nan"), 100.0, -100.0, 0.0]], device=DEVICE)
    for dtype in DTYPES:
        ours = ops.bias_gelu(x.to(dtype), None, approximate)
        assert ours[0, 0] == float("inf") and ours[0, 2].isnan() and ours[0, 3] == 100
        assert ours[0, 4] == 0 and ours[0, 5] == 0
        dx = ops.bias_gelu_backward(torch.ones_like(x).to(dtype), x.to(dtype), None, approximate)[0]
        assert dx[0, 3] == 1 and dx[0, 4] == 0 and dx[0, 5] == 0.5


# --- both


def test_no_rows():
    x, c = values(0, 8), values(8)
    y, mean, rstd = ops.layer_norm(x, c, c, 1e-6, torch.bfloat16)
    assert y.shape == (0, 8) and y.dtype == torch.bfloat16 and mean.shape == rstd.shape == (0,)
    for long in (8, 5000):
        x, c = values(0, long), values(long)
        dx, dweight, dbias = ops.layer_norm_backward(x, x, mean, rstd, c, True, True, True)
        assert dx.shape == x.shape and not dweight.any() and not dbias.any() and dweight.shape == dbias.shape == (long,)
    assert ops.bias_gelu(x, None, "none").shape == x.shape
    dx, dbias = ops.bias_gelu_backward(x, x, c, "none")
    assert dx.shape == x.shape and dbias.shape == c.shape and not dbias.any()


def test_wrong_arguments_are_named():
    x = values(4, 8)
    with pytest.raises(RuntimeError, match="layer_norm: argument 'x': expected a contiguous tensor, got strides"):
        ops.layer_norm(x.t(), None, None, 1e-6, torch.float32)
    with pytest.raises(RuntimeError, match=r"bias_gelu: argument 'bias': expected dtype .*, got torch\.float64"):
        ops.bias_gelu(x, values(8, dtype=torch.float64), "none")
    with pytest.raises(RuntimeError, match="layer_norm: backend 'triton' is forced, but Triton kernels take float32"):
        ops.layer_norm(x.double(), None, None, 1e-6, torch.float64)


@pytest.mark.skipif(launch.INTERPRETED, reason="runs in the interpreter have nothing that could differ")
def test_the_bits_repeat():
    x, grad, c = values(25088, 384, dtype=torch.bfloat16), values(25088, 384, dtype=torch.bfloat16), values(384)

    def run():
        y, mean, rstd = ops.layer_norm(x, c, c, 1e-6, torch.bfloat16)
        dx = ops.layer_norm_backward(grad, x, mean, rstd, c, True, True, True)
        return y, mean, rstd, *dx, ops.bias_gelu(x, c, "none"), *ops.bias_gelu_backward(grad, x, c, "none")

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.skipif(launch.INTERPRETED, reason="CUDA graphs are for a GPU")
def test_graph_capture_and_no_synchronisation():
    x, c = values(1000, 96, dtype=torch.bfloat16), values(96)

    def run():
        y, mean, rstd = ops.layer_norm(x, c, c, 1e-6, torch.bfloat16)
        return y, *ops.layer_norm_backward(y, x, mean, rstd, c, True, True, True), ops.bias_gelu(y, c, "tanh")

    expected = run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
