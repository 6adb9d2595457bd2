"""layer_norm_mlp and its backward by the CUDA kernels: values, dropped samples, chunks and their workspace, streams,
graphs, no synchronisation, determinism."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

import convnext_kernels as ck
import numerics

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
ops = torch.ops.convnext_kernels
NAMES = ["z", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "grn_weight", "grn_bias"]
NAMES += ["fc2_weight", "fc2_bias", "layer_scale"]
EVERYTHING = (1 << len(NAMES)) - 1
MODES = {  # of z and the products, and of parameters, residual and result
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "mixed-bf16": (torch.bfloat16, torch.float32),
    "mixed-fp16": (torch.float16, torch.float32),
}
WORKSPACE = 256 * 2**20


@pytest.fixture(autouse=True)
def backend():
    """The compiled kernels: on a GPU, `auto` takes Triton's for this operator, which have tests of their own."""
    with ck.use_backend("cuda"):
        yield


def random(*shape, scale=1.0):
    return scale * torch.randn(shape, device=DEVICE, dtype=torch.float64)


def plain(z, residual, p, sample_scale, approximate):
    """The operator in PyTorch's own functions."""
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
    return residual + y


class Case:
    """Random arguments. V1 has a layer scale, of size `layer_scale`; V2 has GRN. What dropped samples hold is NaN."""

    def __init__(self, mode, shape, grn, drop=False, layer_scale=1.0):
        self.type, self.wide_type = MODES[mode]
        self.autocast = self.type if self.type != self.wide_type else None
        c = shape[-1]
        k = 4 * c
        made = [1 + random(c), random(c), random(k, c, scale=c**-0.5), random(k)]
        made += [random(k), random(k)] if grn else [None, None]
        made += [random(c, k, scale=k**-0.5), random(c), None if grn else random(c, scale=layer_scale)]
        self.p = [None if t is None else t.to(self.wide_type) for t in made]
        self.z, self.residual, self.grad = random(*shape).to(self.type), *(random(*shape) for _ in range(2))
        self.residual, self.grad = self.residual.to(self.wide_type), self.grad.to(self.wide_type)
        self.sample_scale = None
        self.dropped = torch.zeros(shape[0], device=DEVICE, dtype=torch.bool)
        if drop:
            self.dropped = torch.arange(shape[0], device=DEVICE) % 3 == 1
            self.sample_scale = torch.where(self.dropped, 0.0, 1.25)
        self.poisoned_z, self.poisoned_grad = self.z.clone(), self.grad.clone()
        self.poisoned_z[self.dropped] = self.poisoned_grad[self.dropped] = float("nan")

    def forward(self, approximate="none", keep_hidden=False):
        arguments = self.poisoned_z, self.residual, *self.p, self.sample_scale, 1e-6, approximate, self.wide_type
        return ops.layer_norm_mlp(*arguments, keep_hidden)

    def backward(self, results, approximate="none", mask=EVERYTHING):
        arguments = self.poisoned_grad, self.poisoned_z, *results[1:], *self.p, self.sample_scale, approximate, mask
        return ops.layer_norm_mlp_backward(*arguments)

    def run(self, approximate="none", keep_hidden=False):
        """y and the gradients that exist."""
        results = self.forward(approximate, keep_hidden)
        grads = self.backward(results, approximate)
        return [results[0], *(g for g, t in zip(grads, [self.z, *self.p], strict=True) if t is not None)]

    def names(self):
        return ["y", *(name for name, t in zip(NAMES, [self.z, *self.p], strict=True) if t is not None)]

    def in_pytorch(self, dtype=None, approximate="none"):
        """The same, as PyTorch computes it in this mode or in `dtype`."""
        convert = (lambda t: t) if dtype is None else (lambda t: t.to(dtype))
        z, *p = (None if t is None else convert(t).detach().requires_grad_() for t in (self.z, *self.p))
        autocast = dtype is None and self.autocast
        with torch.autocast(DEVICE, self.autocast) if autocast else contextlib.nullcontext():
            y = plain(z, convert(self.residual), p, self.sample_scale, approximate)
        leaves = [t for t in (z, *p) if t is not None]
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad.to(y.dtype))]

    def check(self, approximate="none", keep_hidden=False):
        unit = torch.finfo(self.type).eps / 2
        ours, theirs = self.run(approximate, keep_hidden), self.in_pytorch(None, approximate)
        truth = self.in_pytorch(torch.float64, approximate)
        for name, a, b, exact in zip(self.names(), ours, theirs, truth, strict=True):
            numerics.assert_close(a.to(b.dtype), b, exact, name, unit)
        assert torch.equal(ours[0][self.dropped], self.residual[self.dropped])
        assert not ours[1][self.dropped].any()


@pytest.mark.parametrize("drop", [False, True], ids=["whole", "drop"])
@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("mode", MODES)
def test_against_fp64(mode, approximate, grn, drop):
    for keep_hidden in (False, True):
        Case(mode, (5, 14, 14, 96), grn, drop).check(approximate, keep_hidden)


@pytest.mark.parametrize(
    "shape", [(3, 5, 5, 3), (2, 7, 7, 40), (4, 13, 9, 100), (2, 7, 7, 768), (300, 1, 1, 32)], ids=str
)
@pytest.mark.parametrize("mode", ["fp32", "bf16", "mixed-bf16"])
def test_other_shapes(mode, shape):
    Case(mode, shape, grn=shape[-1] in (40, 768), drop=True).check()


@pytest.mark.parametrize("mode", ["bf16", "fp16", "mixed-fp16"])
def test_layer_scale_of_a_new_block(mode):
    """1e-6: what it scales must not vanish in fp16."""
    case = Case(mode, (4, 14, 14, 64), grn=False, layer_scale=1e-6)
    case.grad *= 64
    case.poisoned_grad *= 64
    case.check()


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_any_mask(grn):
    case = Case("mixed-bf16", (3, 14, 14, 64), grn, drop=True)
    results = case.forward(keep_hidden=True)
    everything = case.backward(results)
    for mask in [1 << i for i in range(len(NAMES))] + [0, 0b0000001001, 0b1010010000, 0b0110000110]:
        for i, (ours, full) in enumerate(zip(case.backward(results, mask=mask), everything, strict=True)):
            if mask >> i & 1:
                # Not always the same bits: without a gradient to take along, GRN's sums have another order.
                error = numerics.rms(ours.double() - full.double())
                assert error <= torch.finfo(torch.bfloat16).eps * numerics.rms(full), (NAMES[i], mask)
            else:
                assert ours.shape == (0,), (NAMES[i], mask)


def test_no_samples():
    case = Case("bf16", (0, 7, 7, 32), grn=False, drop=True)
    y, *grads = case.run()
    assert y.shape == case.z.shape and grads[0].shape == case.z.shape
    assert not any(grad.any() for grad in grads)


# --- more rows than one workspace takes

LARGE = {"v1": (64, 56, 56, 96), "v2": (48, 56, 56, 128)}  # some 600 MiB of hidden rows, or 550


@pytest.mark.parametrize("version", LARGE)
def test_workspace_is_bounded(version):
    case = Case("bf16", LARGE[version], version == "v2", drop=True)
    results = case.forward()
    grads = case.backward(results)
    kept = sum(t.numel() * t.element_size() for t in (*results, *grads))
    del results, grads
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case.backward(case.forward())
    torch.cuda.synchronize()
    # The allocator rounds each of some 20 tensors up; cuBLASLt takes 32 MiB for as long as a product with a bias runs.
    assert torch.cuda.max_memory_allocated() - before <= kept + WORKSPACE + 20 * 2**21 + 2**25


@pytest.mark.parametrize("version", LARGE)
def test_chunks_are_the_samples_put_together(version):
    case = Case("mixed-bf16", LARGE[version], version == "v2", drop=True)
    names, whole = case.names(), case.run()
    halves = []
    full = [case.poisoned_z, case.poisoned_grad, case.residual, case.sample_scale]
    for half in (slice(0, len(full[0]) // 2), slice(len(full[0]) // 2, None)):
        case.poisoned_z, case.poisoned_grad, case.residual, case.sample_scale = (t[half] for t in full)
        halves.append(case.run())
    for name, ours, first, second in zip(names, whole, *halves, strict=True):
        expected = torch.cat([first, second]) if name in ("y", "z") else first.double() + second.double()
        # The products' own rounding may depend on the number of rows; a sum over 10^5 rows loses some digits of fp32.
        scale = expected.double().square().mean().sqrt()
        unit = torch.finfo(torch.bfloat16).eps if name in ("y", "z") else 1e-4
        assert (ours.double() - expected.double()).square().mean().sqrt() <= unit * scale, name


# --- manners


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_two_runs_are_the_same_bits(grn):
    case = Case("mixed-bf16", (16, 28, 28, 192), grn, drop=True)
    first = case.run()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, case.run(), strict=True))


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_side_stream(grn):
    case = Case("bf16", (8, 28, 28, 96), grn, drop=True)
    expected = case.run()
    stream, z = torch.cuda.Stream(), case.poisoned_z
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Long work first: launched on another stream, the operators would read z before it is written.
        case.poisoned_z = torch.zeros_like(z)
        torch.cuda._sleep(50_000_000)
        case.poisoned_z.copy_(z)
        got = case.run()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_cuda_graph(grn):
    case = Case("mixed-bf16", (8, 28, 28, 96), grn, drop=True)
    case.run()  # the products' library is set up at the first call
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case.run()
    for step in range(2):
        # Which samples are dropped is read from the device at each replay.
        case.sample_scale.copy_(torch.where(torch.arange(8, device=DEVICE) % 2 == step, 0.0, 1.25))
        case.poisoned_z.copy_(random(*case.z.shape))
        case.poisoned_grad.copy_(random(*case.z.shape))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, case.run(), strict=True))


@pytest.mark.parametrize("grn", [False, True], ids=["v1", "v2"])
def test_no_synchronisation(grn):
    case = Case("mixed-bf16", (8, 28, 28, 96), grn, drop=True)
    case.run()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        case.run(keep_hidden=True)
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_errors_name_operator_and_argument():
    case = Case("bf16", (2, 3, 3, 8), grn=False)
    case.p[2] = case.p[2].cpu()
    with pytest.raises(RuntimeError, match="layer_norm_mlp: argument 'fc1_weight': expected a CUDA tensor"):
        case.forward()
