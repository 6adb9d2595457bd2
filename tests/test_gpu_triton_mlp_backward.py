"""layer_norm_mlp_backward in Triton, on a GPU or in Triton's interpreter (started by test_triton_mlp_backward.py).

The rule of tests/numerics.py against autograd in fp64, with PyTorch in the same mode for comparison. The forward is the
reference's. The interpreter is slow: fewer and smaller cases there.
"""

import contextlib

import pytest
import torch

import test_mlp_cpu
from convnext_kernels import reference_backend
from convnext_kernels.triton_kernels import config, launch
from convnext_kernels.triton_kernels.launch import INTERPRETED
from convnext_kernels.triton_kernels.mlp_backward import layer_norm_mlp_backward
from test_mlp_cpu import EVERYTHING, NAMES

pytestmark = [] if INTERPRETED else pytest.mark.gpu

DEVICE = "cpu" if INTERPRETED else "cuda"
MODES = ["fp32", "fp16", "bf16", "mixed-fp16", "mixed-bf16"]
CHANNELS = [8, 40, 96, 128, 192, 256, 384, 512, 768]


@pytest.fixture(autouse=True)
def device():
    with torch.device(DEVICE):
        yield


class Case(test_mlp_cpu.Case):
    """Arguments whose backward runs through Triton. Dropped samples hold NaN in whatever is read."""

    workspace = None  # the configuration's

    def run(self, approximate="none", keep_hidden=False, mask=EVERYTHING):
        z, grad = self.poisoned(self.z), self.poisoned(self.grad)
        y, mean, rstd, hidden = reference_backend.layer_norm_mlp(
            z, self.residual, *self.p, self.sample_scale, 1e-6, approximate, self.dtype, keep_hidden
        )
        statistics = self.poisoned(mean), self.poisoned(rstd), self.poisoned(hidden) if keep_hidden else hidden
        arguments = grad, z, *statistics, *self.p, self.sample_scale, approximate, mask
        return y, mean, rstd, hidden, layer_norm_mlp_backward(*arguments, workspace_bytes=self.workspace)


class Name(str):
    """A kernel's, with the `grid` of its launch."""


@pytest.fixture
def launches(monkeypatch):
    """The names of the kernels that were launched, in order, each with its grid."""
    names, run = [], launch.run

    def recording(kernel, grid, *arguments, **constants):
        names.append(Name(kernel.__name__))
        names[-1].grid = grid
        run(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(launch, "run", recording)
    return names


def hidden_of(channels):
    """4 C, or a width that the interpreter gets through in a second."""
    return 4 * channels if channels <= 96 or not INTERPRETED else 72


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("mode", MODES[:3] if INTERPRETED else MODES)
def test_channels(mode, channels):
    shape = (3, 4, 7, channels) if INTERPRETED else (5, 13, 11, channels)
    Case(mode, shape, grn=False, drop=True, hidden=hidden_of(channels)).check()


@pytest.mark.parametrize("keep_hidden", [False, True], ids=["recompute", "kept"])
@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", MODES[3:] if INTERPRETED else MODES)
def test_variants(mode, grn, approximate, drop, keep_hidden):
    # 35 rows an image: a tile of rows has several images, and parts of images at its ends.
    shape = (6, 5, 7, 24) if INTERPRETED else (12, 13, 17, 96)
    Case(mode, shape, grn, drop).check(approximate, keep_hidden)


@pytest.mark.parametrize("keep_hidden", [False, True], ids=["recompute", "kept"])
@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize("channels", [24, 96, 256])
@pytest.mark.parametrize("fused", [0, 1], ids=["two kernels", "whole rows"])
def test_forms(fused, channels, drop, keep_hidden, launches):
    """dz in the kernel that makes dh, and in the one after it: several tiles of rows, the last not whole."""
    case = Case(MODES[-1], (5, 7, 11, channels), False, drop, hidden=hidden_of(channels))
    with contextlib.ExitStack() as stack:
        stack.enter_context(config.override("mlp_backward_form", config.Config({"FUSED": fused})))
        if INTERPRETED:
            stack.enter_context(
                config.override("mlp_backward_rows", config.Config({"BLOCK_M": 64, "BLOCK_K": 32, "PROGRAMS": 1}))
            )
        case.check("none", keep_hidden)
        assert ("row_gradients_kernel" in launches) == bool(fused)
        assert ("norm_gradient_kernel" in launches) != bool(fused)
        launches.clear()
        # Chunks of some 130 rows, of which the last is short; and dz alone, for which dh has no buffer.
        case.workspace = 160 * 3 * (2 * channels + 2 * hidden_of(channels)) * 2
        case.check("none", keep_hidden)
        assert launches.count("row_gradients_kernel" if fused else "hidden_gradients_kernel") > 1
        both = case.run(keep_hidden=keep_hidden)[-1][0], case.run(keep_hidden=keep_hidden, mask=1)[-1][0]
        assert torch.equal(*both)


@pytest.mark.parametrize("channels, shape", [(40, (2, 9, 17)), (24, (2, 16, 20)), (264, (2, 5, 5)), (8, (37,))])
def test_grn_of_small_and_large_images(channels, shape):
    """Images of several tiles and several segments, and of one position."""
    Case("fp32", (*shape[:1], *(shape[1:] or (1,)), channels), grn=True, hidden=hidden_of(channels)).check()


@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["fp32", "mixed-fp16"])
def test_several_chunks(mode, grn, drop, launches):
    """Chunks of part of the rows (of one image with GRN); with drop path the last has no live row."""
    case = Case(mode, (6, 10, 13, 32), grn, drop, hidden=64)
    case.workspace = 100_000
    case.check()
    kernels = "hidden_gradients_kernel", "row_gradients_kernel"
    assert sum(map(launches.count, kernels)) >= (6 if grn else 2)


def test_several_splits_of_the_rows(monkeypatch, launches):
    """Sums of weights from several programs, the last of them without rows."""
    from convnext_kernels.triton_kernels import mlp_backward_call

    monkeypatch.setattr(mlp_backward_call, "weight_splits", lambda *_: 5)
    case = Case("fp32", (3, 9, 9, 24), grn=False, drop=True)
    case.check()
    case.workspace = 200_000
    launches.clear()
    case.check()
    assert launches.count("weight_gradient_kernel") > 1


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_output_mask(grn, launches):
    case = Case("fp32", (3, 5, 5, 16), grn, drop=True)
    everything = case.run()[-1]
    masks = [1 << i for i in range(len(NAMES))] + [0, 0b0000001001, 0b1010010000, 0b0110000110, 0b0001100001]
    for mask in masks:
        launches.clear()
        for i, (ours, full) in enumerate(zip(case.run(mask=mask)[-1], everything)):
            if mask >> i & 1:
                torch.testing.assert_close(ours, full, rtol=1e-5, atol=1e-5, msg=NAMES[i])
            else:
                assert ours.shape == (0,) and ours.dtype == torch.float32, (NAMES[i], mask)
        # The products, which are what a gradient costs: dW1, db1 or LayerNorm's; dW2 or layer scale; dz.
        weights = bool(mask & 0b11110), bool(mask & (1 << 7 | 0 if grn else 1 << 7 | 1 << 9))
        products = [name.grid[2] for name in launches if name == "weight_gradient_kernel"]
        assert products == [sum(weights)] * any(weights), mask
        assert launches.count("norm_gradient_kernel") == (mask & 1), mask
    launches.clear()
    case.run(mask=1 << 8)  # fc2's bias: a sum over the gradient
    assert "hidden_gradients_kernel" not in launches


@pytest.mark.parametrize("mode", ["fp32", "fp16"])
@pytest.mark.parametrize("keep_hidden", [False, True], ids=["recompute", "kept"])
def test_without_optional_parameters(mode, keep_hidden):
    case = Case(mode, (4, 5, 6, 16), grn=False, residual=False)
    for i in (0, 1, 3, 7, 8):
        case.p[i] = None
    case.check(keep_hidden=keep_hidden)
    for without in (0, 1, 3, 7):  # each alone: LayerNorm's and the layer's scale are folded into the weights
        case = Case(mode, (4, 5, 6, 16), grn=False, drop=True, residual=False)
        case.p[without] = None
        case.check(keep_hidden=keep_hidden)


def test_every_sample_dropped():
    for grn in (False, True):
        case = Case("fp16", (3, 4, 4, 8), grn, drop=True)
        case.sample_scale.zero_()
        case.dropped[:] = True
        assert all(gradient.eq(0).all() for gradient in case.run(keep_hidden=True)[-1])


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_no_samples(grn):
    case = Case("fp16", (0, 4, 4, 8), grn)
    grads = case.run()[-1]
    assert grads[0].shape == case.z.shape and grads[0].dtype == case.z.dtype
    for gradient, parameter in zip(grads[1:], case.p):
        assert gradient.eq(0).all() and gradient.shape == ((0,) if parameter is None else parameter.shape)


def test_zero_activations_have_a_zero_grn_gradient():
    """G = 0: h is so far below 0 that GELU is 0 in a whole channel."""
    case = Case("fp32", (2, 3, 3, 8), grn=True)
    case.p[3][5] = -100
    assert all(g.isfinite().all() for g in case.run()[-1])
    case.check()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("scale", [1e-6, 0.0], ids=["small", "zero"])
def test_small_scales(mode, scale):
    """A layer scale as at the start of training, or 0, and a channel of LayerNorm with weight 0: no digits are lost."""
    case = Case(mode, (4, 7, 9, 24), grn=False, drop=True)
    case.p[8] *= scale
    case.p[0][3] = 0
    if case.z_dtype == torch.float16:
        case.grad *= 1000  # as a loss scale does
    case.check()


@pytest.mark.parametrize("channels", [24, 40, 72])
def test_rows_that_are_all_but_constant_in_fp16(channels):
    """Of zeros in the place of columns that are not there, LayerNorm would make -mean rstd, which fp16 cannot hold."""
    case = Case("fp16", (2, 3, 5, channels), grn=False)
    case.z = 100 + case.z / 64
    case.z[0] = 100
    case.check()


def test_large_fp16():
    case = Case("fp16", (2, 4, 4, 16), grn=False)
    case.z = (case.z.sign() * 60000 + 50 * case.z).half()
    case.check()


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_non_finite_values_spread_as_in_pytorch(grn):
    case = Case("fp32", (3, 4, 5, 8), grn)
    case.z[1, 2, 3, 4] = float("inf")
    grads = case.run()[-1]
    _, _, their_grads = test_mlp_cpu.differentiated(case.z, case.residual, case.p, None, "none", case.grad)
    for name, ours, other in zip(NAMES, grads, their_grads, strict=True):
        assert other is None or torch.equal(ours.isnan(), other.isnan()), name


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_two_runs_are_the_same_bits(grn):
    case = Case("mixed-fp16", (6, 10, 13, 32) if INTERPRETED else (64, 14, 14, 384), grn, drop=True)
    case.workspace = 200_000 if INTERPRETED else 32 << 20
    first, second = case.run()[-1], case.run()[-1]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


E = torch.empty


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(grad=E(2, 3, 8)), r"layer_norm_mlp_backward: argument 'grad': expected shape \(2, 3, 3, 8\)"),
        (dict(grad=E(2, 8, 3, 3).permute(0, 2, 3, 1)), "argument 'grad': expected a contiguous"),
        (dict(grad=E(2, 3, 3, 8).double()), "argument 'grad': expected dtype .*float64"),
        (dict(mean=E(2, 3)), "argument 'mean'"),
        (dict(rstd=E(2, 3, 3).half()), "argument 'rstd': expected dtype float32"),
        (dict(hidden=E(2, 3, 3, 8)), r"'hidden': expected shape \(2, 3, 3, 32\)"),
        (dict(hidden=E(2, 3, 3, 32).half()), "argument 'hidden': expected dtype"),
        (dict(output_mask=1024), "argument 'output_mask'.*got 1024"),
        (dict(approximate=""), "argument 'approximate'"),
        (dict(fc1_weight=E(32, 7)), "argument 'fc1_weight'"),
        (dict(grn_bias=None), "both of grn_weight and grn_bias"),
        (dict(sample_scale=E(3)), "argument 'sample_scale'"),
    ],
)
def test_errors(changes, message):
    arguments = test_mlp_cpu.arguments("layer_norm_mlp_backward", **changes)
    moved = [a.to(DEVICE) if isinstance(a, torch.Tensor) else a for a in arguments.values()]
    with pytest.raises(RuntimeError, match=message):
        layer_norm_mlp_backward(*moved)


# --- a GPU's own

gpu = pytest.mark.skipif(INTERPRETED, reason="the interpreter has no streams, graphs or memory of its own")


@gpu
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_cuda_graph_and_no_synchronisation(grn):
    case = Case("mixed-bf16", (16, 14, 14, 192), grn, drop=True)
    z, grad = case.z, case.grad
    _, mean, rstd, hidden = reference_backend.layer_norm_mlp(
        z, case.residual, *case.p, case.sample_scale, 1e-6, "none", case.dtype, False
    )
    arguments = grad, z, mean, rstd, hidden, *case.p, case.sample_scale, "none", EVERYTHING
    layer_norm_mlp_backward(*arguments)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer_norm_mlp_backward(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer_norm_mlp_backward(*arguments)
    for seed in range(2):  # other samples are dropped in the replays
        torch.manual_seed(seed)
        grad.normal_()
        case.sample_scale.bernoulli_(0.6)
        graph.replay()
        for a, b in zip(captured, layer_norm_mlp_backward(*arguments)):
            assert torch.equal(a, b)


@gpu
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_memory(grn):
    """Beyond the results, the workspace and the recast weights."""
    case = Case("mixed-bf16", (64, 56, 56, 96), grn)
    case.workspace = 64 << 20
    case.run()
    grads = case.run()[-1]
    results = sum(t.nbytes for t in grads)
    del grads
    _, mean, rstd, hidden = reference_backend.layer_norm_mlp(
        case.z, None, *case.p, None, 1e-6, "none", case.dtype, False
    )
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    arguments = case.grad, case.z, mean, rstd, hidden, *case.p, None, "none", EVERYTHING
    layer_norm_mlp_backward(*arguments, workspace_bytes=case.workspace)
    weights = sum(t.nbytes for t in case.p if t is not None)
    # The allocator leaves up to 1 MiB of a block that it had at the end of each large tensor.
    rounding = 16 << 20
    assert torch.cuda.max_memory_allocated() - before <= results + case.workspace + 2 * weights + rounding
