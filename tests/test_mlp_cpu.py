"""bias_gelu, layer_norm_mlp and their backwards on the CPU: the compiled kernels against fp64, by the numerics rule."""

import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_kernels import native
from numerics import assert_close

ops = torch.ops.convnext_kernels

NAMES = [
    "z",
    "norm_weight",
    "norm_bias",
    "fc1_weight",
    "fc1_bias",
    "grn_weight",
    "grn_bias",
    "fc2_weight",
    "fc2_bias",
    "layer_scale",
]
EVERYTHING = (1 << len(NAMES)) - 1
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def accumulation(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(ours, theirs, truth, name, unit=None):
    if ours.dtype == torch.float64:
        assert (ours - truth).abs().max() <= 1e-10 * truth.abs().max() + 1e-10, name
    else:
        assert_close(ours, theirs, truth, name, unit)


# --- GELU


def gelu_parts(x, approximate):
    """GELU, its derivative, and the sum of the magnitudes of the derivative's two terms, in fp64, without cancellation
    where x is far below 0."""
    if approximate == "none":
        gate = 0.5 * torch.special.erfc(-x / math.sqrt(2))
        slope = torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    else:
        scale = 2 * math.sqrt(2 / math.pi)
        gate = torch.sigmoid(scale * (x + 0.044715 * x**3))
        slope = gate * torch.sigmoid(-scale * (x + 0.044715 * x**3)) * scale * (1 + 3 * 0.044715 * x * x)
    rest = torch.where(slope == 0, 0, x * slope)
    return x * gate, gate + rest, gate + rest.abs()


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_inputs(dtype, approximate):
    """Every finite value of GELU and its derivative is the rounded true one, or its neighbour near a tie: before they
    are rounded they are as exact as csrc/common/cpu_math.h says."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    y = ops.bias_gelu(x, None, approximate)
    ones = torch.ones_like(x)
    dx, _ = ops.bias_gelu_backward(ones, x, None, approximate)
    finite = x.isfinite()
    truth, derivative, terms = gelu_parts(x.double(), approximate)
    info = torch.finfo(dtype)
    # The instruction that rounds to bf16 makes 0 of subnormal numbers.
    accuracy, least = (2**-11, info.tiny) if dtype == torch.bfloat16 else (2**-13, info.tiny * info.eps)
    for ours, true, size in ((y, truth, truth.abs()), (dx, derivative, terms)):
        # Results that overflow to infinity do so as rounding to the dtype does.
        expected = true.to(dtype)
        overflows = expected.isinf() & finite
        assert torch.equal(ours[overflows], expected[overflows])
        kept = finite & ~overflows
        allowed = info.eps / 2 * true.abs() + accuracy * size + 2e-7 * (true.abs() < 1) + least
        error = (ours.double() - true).abs()
        assert (error[kept] <= allowed[kept]).all(), x[kept][(error - allowed)[kept].argmax()]
    # As PyTorch in fp64 (its fp32 kernel is oneDNN's, which makes NaN of infinity).
    others = x[~finite].double()
    theirs = F.gelu(others, approximate=approximate)
    assert torch.equal(y[~finite].isnan(), theirs.isnan()) and torch.equal(y[~finite].isinf(), theirs.isinf())
    theirs = torch.ops.aten.gelu_backward(torch.ones_like(others), others, approximate=approximate)
    assert torch.equal(dx[~finite].isnan(), theirs.isnan())


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_in_fp32_and_fp64(approximate):
    x = torch.cat([torch.linspace(-14, 14, 200001), torch.logspace(-30, 2, 1000), -torch.logspace(-30, 2, 1000)])
    truth, derivative, _ = gelu_parts(x.double(), approximate)
    y = ops.bias_gelu(x, None, approximate)
    dx, _ = ops.bias_gelu_backward(torch.ones_like(x), x, None, approximate)
    # Relative also in the tail; there the rounding of x^2 counts x^2 / 2 times.
    relative = 2.0**-24 * (8 + 4 * x.double().square().clamp(max=200))
    assert ((y.double() - truth).abs() <= relative * truth.abs() + 1e-36).all()
    assert ((dx.double() - derivative).abs() <= 2.0**-22 * derivative.abs().clamp(min=1)).all()
    theirs = torch.ops.aten.gelu_backward(torch.ones_like(x), x, approximate=approximate)
    assert_close(y, F.gelu(x, approximate=approximate), truth, "gelu")
    assert_close(dx, theirs, derivative, "derivative")
    wide = x.double()
    assert torch.allclose(ops.bias_gelu(wide, None, approximate), truth, rtol=1e-12, atol=0)
    dx, _ = ops.bias_gelu_backward(torch.ones_like(wide), wide, None, approximate)
    assert torch.allclose(dx, derivative, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("columns", [1, 3, 40, 100, 384])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_bias_gelu(dtype, columns, has_bias, approximate):
    x, grad = (torch.randn(11, 30, columns).to(dtype) for _ in range(2))
    bias = torch.randn(columns).to(dtype) if has_bias else None

    def eager(dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (x, bias) if t is not None]
        y = F.gelu(sum(leaves), approximate=approximate)
        return y.detach(), torch.autograd.grad(y, leaves, grad.to(dtype))

    y = ops.bias_gelu(x, bias, approximate)
    dx, dbias = ops.bias_gelu_backward(grad, x, bias, approximate)
    (truth, truth_grads), (theirs, their_grads) = eager(torch.float64), eager(dtype)
    compare(y, theirs, truth, "y")
    compare(dx, their_grads[0], truth_grads[0], "dx")
    assert dbias.dtype == accumulation(dtype)
    if has_bias:
        compare(dbias.to(dtype), their_grads[1], truth_grads[1], "dbias")
    else:
        assert dbias.shape == (0,)


def test_bias_gelu_without_rows():
    x, bias = torch.randn(0, 3, 8).bfloat16(), torch.randn(8)
    assert ops.bias_gelu(x, bias, "none").shape == x.shape
    dx, dbias = ops.bias_gelu_backward(x, x, bias, "none")
    assert dx.shape == x.shape and torch.equal(dbias, torch.zeros(8))


# --- LayerNorm + MLP


def parameters(c, k, grn, dtype=torch.float64):
    """From norm_weight to layer_scale: V1 has a layer scale, V2 has GRN."""
    shapes = [(c,), (c,), (k, c), (k,), (k,) if grn else None, (k,) if grn else None, (c, k), (c,)]
    shapes.append(None if grn else (c,))
    made = [
        None if s is None else torch.randn(s, dtype=torch.float64) * (s[-1] ** -0.5 if s[1:] else 1) for s in shapes
    ]
    made[0] += 1
    return [None if p is None else p.to(dtype) for p in made]


def plain(z, residual, p, sample_scale, approximate):
    """The operator in PyTorch's own functions; the hidden tensor too."""
    norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias, layer_scale = p
    hidden = F.linear(F.layer_norm(z, z.shape[-1:], norm_weight, norm_bias, 1e-6), fc1_weight, fc1_bias)
    g = F.gelu(hidden, approximate=approximate)
    if grn_weight is not None:
        norm = torch.linalg.vector_norm(g, dim=tuple(range(1, z.dim() - 1)), keepdim=True)
        g = g + (grn_weight * (g * (norm / (norm.mean(-1, keepdim=True) + 1e-6))) + grn_bias)
    y = F.linear(g, fc2_weight, fc2_bias)
    if layer_scale is not None:
        y = y * layer_scale
    if sample_scale is not None:
        y = y * sample_scale.to(y.dtype).view(-1, *[1] * (z.dim() - 1))
    return y if residual is None else residual + y, hidden


def differentiated(z, residual, p, sample_scale, approximate, grad, autocast=None):
    """plain's results, and the gradients of z and the parameters (None where there is no parameter)."""
    z = z.clone().requires_grad_()
    p = [None if t is None else t.clone().requires_grad_() for t in p]
    with torch.autocast(z.device.type, dtype=autocast) if autocast else contextlib.nullcontext():
        y, hidden = plain(z, residual, p, sample_scale, approximate)
    leaves = [z, *(t for t in p if t is not None)]
    grads = iter(torch.autograd.grad(y, leaves, grad.to(y.dtype), allow_unused=True))
    return y.detach(), hidden.detach(), [next(grads), *(None if t is None else next(grads) for t in p)]


class Case:
    """Random arguments in a mode: a dtype's name, or 'mixed-bf16', 'mixed-fp16' for autocast's mixture, where z is in
    16 bits and the parameters, the residual and the result are fp32."""

    def __init__(self, mode, shape, grn, drop=False, hidden=None, residual=True):
        self.autocast = DTYPES[mode[6:]] if mode.startswith("mixed-") else None
        self.dtype = torch.float32 if self.autocast else DTYPES[mode]
        self.z_dtype = self.autocast or self.dtype
        self.unit = torch.finfo(self.z_dtype).eps / 2
        c = shape[-1]
        self.z = torch.randn(shape).to(self.z_dtype)
        self.residual = torch.randn(shape).to(self.dtype) if residual else None
        self.grad = torch.randn(shape).to(self.dtype)
        self.p = parameters(c, hidden or 4 * c, grn, self.dtype)
        self.sample_scale = self.dropped = None
        if drop:
            self.sample_scale = torch.full(shape[:1], 1.25, dtype=accumulation(self.z_dtype))
            self.dropped = torch.arange(shape[0]) % 3 == 1
            self.sample_scale[self.dropped] = 0

    def poisoned(self, tensor):
        """What dropped samples hold must not matter."""
        if self.dropped is None:
            return tensor
        tensor = tensor.clone()
        tensor[self.dropped] = float("nan")
        return tensor

    def run(self, approximate="none", keep_hidden=False, mask=EVERYTHING):
        z = self.poisoned(self.z)
        y, mean, rstd, hidden = ops.layer_norm_mlp(
            z, self.residual, *self.p, self.sample_scale, 1e-6, approximate, self.dtype, keep_hidden
        )
        grads = ops.layer_norm_mlp_backward(
            self.poisoned(self.grad), z, mean, rstd, hidden, *self.p, self.sample_scale, approximate, mask
        )
        return y, mean, rstd, hidden, grads

    def check(self, approximate="none", keep_hidden=False):
        y, mean, rstd, hidden, grads = self.run(approximate, keep_hidden)
        wide = [None if t is None else t.double() for t in self.p]
        arguments = self.sample_scale, approximate
        residual = None if self.residual is None else self.residual.double()
        # Selection, as the operator has it; multiplying with 0 is the same here, as the values are finite.
        truth, true_hidden, true_grads = differentiated(self.z.double(), residual, wide, *arguments, self.grad.double())
        theirs, their_hidden, their_grads = differentiated(
            self.z, self.residual, self.p, *arguments, self.grad, self.autocast
        )
        assert y.dtype == self.dtype
        compare(y, theirs.to(y.dtype), truth, "y", self.unit)
        assert mean.dtype == rstd.dtype == accumulation(self.z_dtype)
        if keep_hidden:
            if self.dropped is not None:
                for tensor in (true_hidden, their_hidden):
                    tensor[self.dropped] = 0
            compare(hidden, their_hidden, true_hidden, "hidden", self.unit)
        else:
            assert hidden.shape == (0,) and hidden.dtype == self.z_dtype
        if self.dropped is not None:
            assert torch.equal(y[self.dropped], (self.residual if self.residual is not None else 0 * y)[self.dropped])
            assert all(t[self.dropped].eq(0).all() for t in (mean, rstd, grads[0]))
        for name, like, ours, other, true in zip(NAMES, [self.z, *self.p], grads, their_grads, true_grads, strict=True):
            if like is None:
                assert ours.shape == (0,), name
                continue
            assert ours.dtype == (self.z_dtype if name == "z" else accumulation(self.z_dtype)), name
            compare(ours.to(other.dtype), other, true, f"gradient of {name}", self.unit)


@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("mode", [*DTYPES, "mixed-bf16", "mixed-fp16"])
def test_numerics(mode, approximate, grn, drop):
    for keep_hidden in (False, True):
        Case(mode, (5, 6, 7, 24), grn, drop).check(approximate, keep_hidden)


@pytest.mark.parametrize("channels", [1, 3, 8, 40, 96, 100, 384])
@pytest.mark.parametrize("mode", DTYPES)
def test_every_channel_count(mode, channels):
    # A hidden width that is no multiple of anything, in half of the cases.
    hidden = None if channels % 2 else 4 * channels + 5
    Case(mode, (3, 4, 5, channels), grn=channels in (3, 96), hidden=hidden).check()


@pytest.mark.parametrize("shape", [(37, 16), (1, 300, 16), (2, 3, 4, 5, 16)], ids=str)
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_other_ranks(shape, grn):
    if grn and len(shape) == 2:
        pytest.skip("the plain expression has no positions to take the norm over")
    Case("fp32", shape, grn, drop=True).check()


def test_grn_of_single_positions():
    """(N, C): the norm over no dimensions is the absolute value."""
    case = Case("fp64", (6, 5), grn=True)
    y = case.run()[0]
    z = case.z.view(6, 1, 5)
    assert torch.allclose(y, plain(z, case.residual.view(6, 1, 5), case.p, None, "none")[0].view(6, 5), rtol=1e-10)


@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize(
    "mode, shape, grn",
    [("bf16", (3, 56, 56, 96), True), ("bf16", (4, 56, 56, 48), False), ("fp32", (8, 30, 30, 96), False)],
)
def test_several_chunks(mode, shape, grn, drop):
    """A stage's shape, with too many rows for one pass; chunks with and without a dropped sample inside."""
    case = Case(mode, shape, grn, drop)
    case.check(keep_hidden=drop)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    "shape, hidden", [((700, 24), 96), ((700, 40), 8), ((30, 72), 288), ((3, 9, 10, 17), 70)], ids=str
)
def test_gradients_of_weights(mode, shape, hidden):
    """More rows than one product adds up; K below C; fewer rows than channels; nothing that fills whole vectors."""
    Case(mode, shape, grn=False, hidden=hidden).check()


@pytest.mark.parametrize("mode", ["fp64", "bf16"])
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_output_mask(mode, grn):
    case = Case(mode, (3, 4, 5, 12), grn, drop=True)
    everything = case.run()[-1]
    masks = [1 << i for i in range(len(NAMES))] + [0, 0b0000001001, 0b1010010000, 0b0110000110, 0b0001100001]
    for mask in masks:
        for i, (ours, full) in enumerate(zip(case.run(mask=mask)[-1], everything, strict=True)):
            if mask >> i & 1:
                assert torch.allclose(ours, full, rtol=1e-10, atol=1e-12), (NAMES[i], mask)
            else:
                assert ours.shape == (0,), (NAMES[i], mask)


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_without_optional_parameters(mode):
    case = Case(mode, (4, 5, 6, 16), grn=False, residual=False)
    for i in (0, 1, 3, 7, 8):
        case.p[i] = None
    case.check()
    case = Case(mode, (4, 5, 6, 16), grn=False, drop=True, residual=False)
    case.p[7] = None  # a layer scale without fc2's bias
    case.check(keep_hidden=True)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(0, 4)] * 2, st.integers(1, 9), st.integers(1, 20)),
    hidden=st.integers(1, 40),
    grn=st.booleans(),
    drop=st.booleans(),
    keep_hidden=st.booleans(),
)
def test_any_shape(shape, hidden, grn, drop, keep_hidden):
    torch.manual_seed(sum(shape))
    case = Case("fp64", shape, grn, drop, hidden)
    if case.z.numel():
        case.check(keep_hidden=keep_hidden)
    else:
        y, _, _, kept, grads = case.run(keep_hidden=keep_hidden)
        assert y.shape == shape and kept.shape == ((*shape[:-1], hidden) if keep_hidden else (0,))
        assert grads[0].shape == shape
        for gradient, parameter in zip(grads[1:], case.p, strict=True):
            assert gradient.eq(0).all() and gradient.shape == ((0,) if parameter is None else parameter.shape)


def test_every_sample_dropped():
    case = Case("bf16", (3, 4, 4, 8), grn=False, drop=True)
    case.sample_scale.zero_()
    case.dropped[:] = True
    y, mean, rstd, hidden, grads = case.run(keep_hidden=True)
    assert torch.equal(y, case.residual)
    assert all(t.eq(0).all() for t in (mean, rstd, hidden, *grads))


def test_zero_activations_have_a_zero_grn_gradient():
    """G = 0: h is so far below 0 that GELU is 0 in a whole channel."""
    case = Case("fp32", (2, 3, 3, 8), grn=True)
    case.p[3][5] = -100
    assert all(g.isfinite().all() for g in case.run()[-1])
    case.check()


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_non_finite_values_spread_as_in_pytorch(grn):
    case = Case("fp32", (3, 4, 5, 8), grn)
    case.z[1, 2, 3, 4] = float("inf")
    y, *_, grads = case.run()
    theirs, _, their_grads = differentiated(case.z, case.residual, case.p, None, "none", case.grad)
    assert torch.equal(y.isnan(), theirs.isnan()) and y.isnan().any()
    for name, ours, other in zip(NAMES, grads, their_grads, strict=True):
        assert other is None or torch.equal(ours.isnan(), other.isnan()), name


def test_large_fp16():
    case = Case("fp16", (2, 4, 4, 16), grn=False)
    case.z = (case.z.sign() * 60000 + 50 * case.z).half()
    case.check()


@pytest.mark.parametrize("mode", ["fp32", "bf16"])
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_callers_modes_do_not_matter(mode, grn):
    """Neither autocast, nor the grad mode, nor parameters that require gradients."""
    case = Case(mode, (3, 4, 5, 16), grn, drop=True)
    with torch.no_grad():
        expected = case.run(keep_hidden=True)
    case.p = [None if p is None else p.requires_grad_() for p in case.p]
    results = [case.run(keep_hidden=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results.append(case.run(keep_hidden=True))
    with torch.inference_mode():
        results.append(case.run(keep_hidden=True))
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result[:-1], expected[:-1], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(result[-1], expected[-1], strict=True))


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def on_onednn():
    """Whether the operators take oneDNN's inner product for fp32 and bf16."""
    bindings = native.status().bindings
    avx512 = bindings is not None and bindings.cpu_capability().startswith("avx512")
    return avx512 and torch.backends.mkldnn.is_available()


def products(case):
    """PyTorch's matrix products of the operator's shapes, whose bits are not ours to promise."""
    rows, fc1_weight, fc2_weight = case.z.flatten(0, -2), case.p[2], case.p[6]
    hidden = F.linear(rows, fc1_weight, case.p[3])
    return [hidden, F.linear(hidden, fc2_weight), rows @ fc2_weight, hidden.t() @ rows, rows.t() @ hidden]


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["fp32", "bf16"])
def test_same_bits_for_any_number_of_threads(mode, grn):
    case = Case(mode, (6, 28, 28, 48), grn, drop=True)
    names, results, theirs = ["y", "mean", "rstd", *NAMES], [], []
    for count in (2, 2, 1):
        with threads(count):
            y, mean, rstd, _, grads = case.run()
            results.append([y, mean, rstd, *grads])
            theirs.append(products(case))
    for name, a, b in zip(names, results[0], results[1], strict=True):
        assert torch.equal(a, b), f"{name} differs from run to run"
    same = all(torch.equal(a, b) for a, b in zip(theirs[0], theirs[2], strict=True))
    if same or (on_onednn() and mode == "fp32"):  # none of the operators' products is mm's then
        for name, a, b in zip(names, results[0], results[2], strict=True):
            assert torch.equal(a, b), f"{name} depends on the number of threads"


@pytest.mark.parametrize("mode", ["fp32", "mixed-bf16"])
def test_matrix_products_run_on_onednn(mode):
    if not on_onednn():
        pytest.skip("PyTorch's default matrix products serve here")
    case = Case(mode, (2, 10, 10, 16), grn=False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        case.run()
    calls = {event.key: event.count for event in profile.key_averages()}
    # h, h again and two gradients of weights; in fp32 also the branch's result and the gradients of g and of a.
    assert calls["mkldnn::_linear_pointwise"] == (7 if mode == "fp32" else 4)
    assert calls.get("aten::mm", 0) == (0 if mode == "fp32" else 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_gelu_gives_the_same_bits_for_any_number_of_threads(dtype):
    x, bias = torch.randn(3000, 100).to(dtype), torch.randn(100)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.bias_gelu_backward(x, x, bias, "none"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16"])
def test_every_capability(capability):
    """The numerics again in a process that runs the kernels compiled for another instruction set."""
    files = [__file__, str(Path(__file__).with_name("test_layer_norm_cpu.py"))]
    tests = "all_16_bit or gelu_in_fp32 or every_channel_count or several_chunks or equal_values"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, "-k", tests]
    environment = {**os.environ, "CONVNEXT_KERNELS_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "this processor does not support" in done.stdout + done.stderr:
        pytest.skip(f"this processor does not support {capability}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


# --- errors


def arguments(operator, **changes):
    case = Case("fp32", (2, 3, 3, 8), grn=True)
    common = dict(zip(NAMES[1:], case.p, strict=True), sample_scale=torch.ones(2))
    if operator == "layer_norm_mlp":
        made = dict(z=case.z, residual=case.residual, **common, eps=1e-6, approximate="none", out_dtype=torch.float32)
        made["keep_hidden"] = False
    else:
        rows = torch.ones(2, 3, 3)
        made = dict(grad=case.grad, z=case.z, mean=rows, rstd=rows, hidden=torch.empty(0), **common)
        made |= dict(approximate="none", output_mask=EVERYTHING)
    assert not changes.keys() - made.keys()
    return made | changes


E = torch.empty


@pytest.mark.parametrize(
    "operator, changes, message",
    [
        ("layer_norm_mlp", dict(z=E(8)), "layer_norm_mlp: argument 'z': expected .*rank 2 or more, got rank 1"),
        ("layer_norm_mlp", dict(z=E(2, 0)), "argument 'z': expected at least one channel"),
        ("layer_norm_mlp", dict(z=E(2, 8, 3, 3).permute(0, 2, 3, 1)), "argument 'z': expected a contiguous"),
        ("layer_norm_mlp", dict(z=E(2, 3, 3, 8).int()), "argument 'z'.*got Int"),
        (
            "layer_norm_mlp",
            dict(residual=E(2, 3, 8)),
            r"'residual': expected shape \(2, 3, 3, 8\), got shape \(2, 3, 8\)",
        ),
        ("layer_norm_mlp", dict(residual=E(2, 3, 3, 8).double()), "'residual': expected float64 together.*got Double"),
        ("layer_norm_mlp", dict(norm_weight=E(9)), "argument 'norm_weight': expected shape"),
        ("layer_norm_mlp", dict(norm_bias=E(8).long()), "argument 'norm_bias'.*got Long"),
        ("layer_norm_mlp", dict(fc1_weight=E(32, 8, 1)), "argument 'fc1_weight': expected a tensor of rank 2"),
        ("layer_norm_mlp", dict(fc1_weight=E(0, 8)), "argument 'fc1_weight': expected at least one row"),
        ("layer_norm_mlp", dict(fc1_weight=E(32, 9)), r"argument 'fc1_weight': expected shape \(32, 8\)"),
        ("layer_norm_mlp", dict(fc1_bias=E(8)), "argument 'fc1_bias'"),
        ("layer_norm_mlp", dict(grn_weight=E(8)), "argument 'grn_weight'"),
        ("layer_norm_mlp", dict(grn_weight=None), "argument 'grn_weight': expected both of .* or neither, got None"),
        ("layer_norm_mlp", dict(grn_bias=None), "argument 'grn_bias': expected both of .* or neither, got None"),
        ("layer_norm_mlp", dict(fc2_weight=E(8, 31)), r"argument 'fc2_weight': expected shape \(8, 32\)"),
        ("layer_norm_mlp", dict(fc2_bias=E(32)), "argument 'fc2_bias'"),
        ("layer_norm_mlp", dict(layer_scale=E(8, 1, 1)), "argument 'layer_scale'"),
        ("layer_norm_mlp", dict(sample_scale=E(3)), "argument 'sample_scale'"),
        ("layer_norm_mlp", dict(sample_scale=E(2).double()), "argument 'sample_scale'.*expected Float, got Double"),
        ("layer_norm_mlp", dict(approximate="erf"), "argument 'approximate': expected 'none' or 'tanh', got erf"),
        ("layer_norm_mlp", dict(out_dtype=torch.int64), "argument 'out_dtype'.*got Long"),
        ("layer_norm_mlp_backward", dict(grad=E(2, 3, 8)), "layer_norm_mlp_backward: argument 'grad'"),
        ("layer_norm_mlp_backward", dict(mean=E(2, 3)), "argument 'mean'"),
        ("layer_norm_mlp_backward", dict(rstd=E(2, 3, 3).double()), "argument 'rstd'.*got Double"),
        ("layer_norm_mlp_backward", dict(hidden=E(2, 3, 3, 8)), r"'hidden': expected shape \(2, 3, 3, 32\)"),
        ("layer_norm_mlp_backward", dict(hidden=E(2, 3, 3, 32).half()), "argument 'hidden'.*got Half"),
        ("layer_norm_mlp_backward", dict(output_mask=1024), "argument 'output_mask'.*got 1024"),
        ("layer_norm_mlp_backward", dict(approximate=""), "argument 'approximate'"),
        ("layer_norm_mlp_backward", dict(fc1_weight=E(32, 7)), "argument 'fc1_weight'"),
    ],
)
def test_errors(operator, changes, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, operator)(*arguments(operator, **changes).values())


@pytest.mark.parametrize(
    "operator, args, message",
    [
        ("bias_gelu", (torch.tensor(1.0), None, "none"), "bias_gelu: argument 'x': expected .*, got"),
        ("bias_gelu", (E(2, 3).t(), None, "none"), "argument 'x': expected a contiguous"),
        ("bias_gelu", (E(2, 3), E(2), "none"), "argument 'bias'"),
        ("bias_gelu", (E(2, 3), None, "sigmoid"), "argument 'approximate'"),
        ("bias_gelu_backward", (E(3, 3), E(2, 3), None, "none"), "bias_gelu_backward: argument 'grad'.*shape"),
        ("bias_gelu_backward", (E(2, 3).half(), E(2, 3), None, "none"), "argument 'grad': expected .*Float, got Half"),
        ("bias_gelu_backward", (E(2, 3), E(2, 3), E(4), "none"), "argument 'bias'"),
    ],
)
def test_bias_gelu_errors(operator, args, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(ops, operator)(*args)
