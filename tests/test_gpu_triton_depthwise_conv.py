"""The Triton depthwise convolution and its gradients against fp64: on a GPU, and under TRITON_INTERPRET=1 on the CPU.

test_triton_depthwise_conv.py starts the interpreter.
"""

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import reference_backend
from convnext_kernels.triton_kernels import config, depthwise_conv, launch
from numerics import assert_close

pytestmark = [] if launch.INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ops = torch.ops.convnext_kernels

# (n, c, h, w, kernel, stride)
SHAPES = [
    *[(2, 40, 13, 9, 7, 1), (1, 96, 7, 7, 7, 1), (2, 1, 4, 5, 7, 1), (3, 3, 1, 1, 7, 1), (1, 100, 2, 3, 7, 1)],
    *[(2, 3, 5, 6, 3, 1), (1, 8, 6, 5, 5, 1), (1, 5, 4, 11, 9, 1), (1, 5, 12, 2, 11, 1)],
    *[(2, 40, 7, 6, 7, 2), (1, 3, 5, 8, 3, 2), (1, 16, 1, 1, 11, 2)],
]
GPU_SHAPES = [
    *[(8, 96, 56, 56, 7, 1), (4, 192, 28, 28, 7, 1), (5, 384, 14, 14, 7, 1), (9, 768, 7, 7, 7, 1)],
    *[(1, 32, 224, 224, 7, 1), (2, 80, 57, 58, 7, 1), (2, 96, 28, 27, 7, 2), (1, 33, 20, 21, 9, 1)],
]
if not launch.INTERPRETED:
    SHAPES += GPU_SHAPES


@pytest.fixture(autouse=True)
def triton_backend():
    with ck.use_backend("triton"):
        yield


@pytest.fixture(autouse=launch.INTERPRETED)
def narrow_strips():
    """The interpreter takes 20 us a multiplication: strips of two columns, and several of them."""
    small = config.Config({"STRIP": 2, "BLOCK_C": 32}, num_warps=1)
    with config.override("depthwise_conv", small), config.override("depthwise_conv_weight_gradient", small):
        yield


def images(n, c, h, w, dtype):
    return torch.randn(n, h, w, c, device=DEVICE).to(dtype).permute(0, 3, 1, 2)


def drop(n):
    """The last sample but one is dropped."""
    scale = torch.full((n,), 1.25, device=DEVICE)
    scale[max(n - 2, 0) :][:1] = 0
    return scale


def poisoned(tensor, scale):
    """NaN where a sample is dropped: it must not be read, or at least not count."""
    tensor = tensor.clone()
    tensor[scale == 0] = float("nan")
    return tensor


def run(module, x, weight, bias, grad, residual, stride, scale):
    padding = [(size - 1) % stride for size in x.shape[2:]]
    return {
        "y": module.depthwise_conv2d(x, weight, bias, stride, scale),
        "dx": module.depthwise_conv2d_input_grad(grad, weight, residual, stride, padding, scale),
        **dict(
            zip(
                ("dweight", "dbias"),
                module.depthwise_conv2d_weight_grad(grad, x, weight.shape[-1], stride, scale),
                strict=True,
            )
        ),
    }


def check(shape, dtype, residual_dtype, with_drop, with_bias=True, parameter_dtype=None):
    n, c, h, w, kernel, stride = shape
    x = images(n, c, h, w, dtype)
    weight = (torch.randn(c, 1, kernel, kernel, device=DEVICE) / kernel).to(parameter_dtype or dtype)
    bias = torch.randn(c, device=DEVICE).to(parameter_dtype or dtype) if with_bias else None
    grad = images(n, c, (h - 1) // stride + 1, (w - 1) // stride + 1, dtype)
    residual = None if residual_dtype is None else images(n, c, h, w, residual_dtype)
    scale = drop(n) if with_drop else None
    given = [x, weight, bias, grad, residual]
    theirs = run(reference_backend, *given, stride, scale)
    truth = run(reference_backend, *[None if t is None else t.double() for t in given], stride, scale)
    if with_drop:
        x, grad = poisoned(x, scale), poisoned(grad, scale)
    ours = run(ops, x, weight, bias, grad, residual, stride, scale)
    unit = torch.finfo(dtype).eps / 2
    for name, value in ours.items():
        assert_close(value, theirs[name], truth[name], name, unit)
        if value.dim() == 4 and name != "dweight":
            assert value.permute(0, 2, 3, 1).is_contiguous(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    if launch.INTERPRETED and (dtype == torch.float32) == (shape in SHAPES[::2]) and shape[1] > 1:
        pytest.skip("in the interpreter a shape runs in fp32 or in 16 bits")
    # In a 16-bit mode the residual stream is of that dtype (pure) or fp32 (autocast).
    residual_dtype = torch.float32 if shape[0] % 2 else dtype
    check(shape, dtype, residual_dtype, with_drop=shape[0] > 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_without_bias_and_residual_and_with_fp32_parameters(stride):
    check((2, 8, 5, 4, 3, stride), torch.float16, None, with_drop=False, with_bias=False, parameter_dtype=torch.float32)
    check((2, 8, 5, 4, 3, stride), torch.float16, torch.float32, with_drop=True, parameter_dtype=torch.float32)


@pytest.mark.parametrize("dropped", [[0], [0, 1]])
def test_dropped_samples(dropped):
    """A dropped sample is zero, its input gradient the residual; if all are, the weights' gradients are zero."""
    n, scale = 2, torch.ones(2, device=DEVICE)
    scale[dropped] = 0
    x, grad, residual = (poisoned(images(n, 8, 3, 4, torch.float32), scale) for _ in range(3))
    residual = residual.nan_to_num()
    weight = torch.randn(8, 1, 3, 3, device=DEVICE)
    ours = run(ops, x, weight, None, grad, residual, 1, scale)
    assert (ours["y"][dropped] == 0).all() and torch.equal(ours["dx"][dropped], residual[dropped])
    assert not any(t.isnan().any() for t in ours.values())
    assert (len(dropped) < n) == bool(ours["dweight"].any())


@pytest.mark.parametrize("stride", [1, 2])
def test_no_samples(stride):
    x, weight = images(0, 8, 5, 5, torch.float32), torch.randn(8, 1, 7, 7, device=DEVICE)
    ours = run(
        ops, x, weight, None, images(0, 8, (4 // stride) + 1, (4 // stride) + 1, torch.float32), None, stride, None
    )
    assert ours["y"].numel() == ours["dx"].numel() == 0 and ours["dx"].shape == x.shape
    assert not ours["dweight"].any() and not ours["dbias"].any()
    assert ours["dweight"].shape == weight.shape and ours["dbias"].shape == (8,)


def test_non_finite_values_stay_where_they_are():
    x = images(1, 8, 9, 9, torch.float32)
    x[0, 3, 4, 4] = float("inf")
    y = ops.depthwise_conv2d(x, torch.ones(8, 1, 3, 3, device=DEVICE), None, 1, None)
    infinite = y.isinf()
    assert infinite[0, 3, 3:6, 3:6].all() and infinite.sum() == 9 and not y.isnan().any()


def test_bands_and_strips_and_programs_do_not_change_a_value(monkeypatch):
    """However the map is cut: the forward pass and the input gradient bit for bit, the sums to rounding."""
    x, grad = images(2, 8, 12, 5, torch.float32), images(2, 8, 12, 5, torch.float32)
    weight = torch.randn(8, 1, 3, 3, device=DEVICE)
    results = []
    for strip, programs, band in ((2, 1, 12), (3, 1000, 3), (5, 2, 5)):
        monkeypatch.setattr(depthwise_conv, "_PROGRAMS_A_MULTIPROCESSOR", programs)
        monkeypatch.setattr(depthwise_conv, "_LEAST_BAND", band)
        cut = config.Config({"STRIP": strip, "BLOCK_C": 32}, num_warps=1)
        with config.override("depthwise_conv", cut), config.override("depthwise_conv_weight_gradient", cut):
            results.append(run(ops, x, weight, None, grad, x, 1, None))
    for other in results[1:]:
        assert torch.equal(other["y"], results[0]["y"]) and torch.equal(other["dx"], results[0]["dx"])
        torch.testing.assert_close(other["dweight"], results[0]["dweight"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(other["dbias"], results[0]["dbias"], rtol=1e-4, atol=1e-4)


def test_the_bits_repeat():
    n, c, h, w, kernel, stride = (2, 8, 4, 5, 3, 1) if launch.INTERPRETED else (4, 96, 56, 56, 7, 1)
    x, grad, weight = images(n, c, h, w, DTYPES[-1]), images(n, c, h, w, DTYPES[-1]), torch.randn(c, 1, kernel, kernel)
    arguments = x, weight.to(DEVICE, DTYPES[-1]), None, grad, None, stride, None
    first, second = run(ops, *arguments), run(ops, *arguments)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_wrong_arguments_are_named():
    x, weight = images(1, 8, 5, 5, torch.float32), torch.randn(8, 1, 3, 3, device=DEVICE)
    with pytest.raises(RuntimeError, match="depthwise_conv2d: argument 'x': expected a contiguous tensor, got strides"):
        ops.depthwise_conv2d(x.contiguous(), weight, None, 1, None)
    with pytest.raises(
        RuntimeError, match=r"depthwise_conv2d: argument 'weight': expected dtype .*, got torch\.float64"
    ):
        ops.depthwise_conv2d(x, weight.double(), None, 1, None)
    with pytest.raises(RuntimeError, match="backend 'triton' is forced, but Triton kernels take float32, float16"):
        ops.depthwise_conv2d(x.double(), weight.double(), None, 1, None)


@pytest.mark.gpu_memory(20)
@pytest.mark.skipif(launch.INTERPRETED, reason="a tensor of 8 GiB is for a GPU")
def test_more_elements_than_32_bits_count():
    # The last sample lies beyond element 2^31.
    x = torch.zeros(3, 1024, 1024, 1024, dtype=torch.float16, device=DEVICE).permute(0, 3, 1, 2)
    x[-1, :, -9:, -9:] = images(1, 1024, 9, 9, torch.float16)[0]
    weight = torch.randn(1024, 1, 7, 7, device=DEVICE, dtype=torch.float16)
    y = ops.depthwise_conv2d(x, weight, None, 1, None)
    small = ops.depthwise_conv2d(
        x[-1:, :, -20:, -20:].contiguous(memory_format=torch.channels_last), weight, None, 1, None
    )
    assert torch.equal(y[-1, :, -17:, -17:], small[0, :, -17:, -17:]) and not y[:-1].any()


@pytest.mark.skipif(launch.INTERPRETED, reason="CUDA graphs are for a GPU")
def test_graph_capture_and_no_synchronisation():
    x, weight = images(2, 96, 14, 14, torch.bfloat16), torch.randn(96, 1, 7, 7, device=DEVICE, dtype=torch.bfloat16)
    grad, scale = images(2, 96, 14, 14, torch.bfloat16), drop(2)
    expected = run(ops, x, weight, None, grad, None, 1, scale)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(ops, x, weight, None, grad, None, 1, scale)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(ops, x, weight, None, grad, None, 1, scale)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(captured[name], expected[name]) for name in expected)
