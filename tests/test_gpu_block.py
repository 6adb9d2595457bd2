"""The block's training step on a GPU: streams, CUDA graphs, no synchronisation, determinism, memory, large tensors.
Values, dtypes and errors: test_block.py and test_operators.py. Races and bounds: test_gpu_sanitizer.py.
"""

import pytest
import torch

import convnext_kernels as ck

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
# dtype of parameters and input, and autocast's
MODES = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "autocast-bf16": (torch.float32, torch.bfloat16),
    "autocast-fp16": (torch.float32, torch.float16),
}
STAGE = (8, 96, 56, 56)
every_block = pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
every_mode = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True, params=["auto", "cuda"])
def backend(request):
    """`auto` takes Triton's kernels for the LayerNorm and MLP; the CUDA kernels are for what those do not take."""
    with ck.use_backend(request.param):
        yield request.param


class Step:
    """A block, its input, the output's gradient and a drop-path vector; `run` is one training step."""

    def __init__(self, mode, use_grn, shape=None, dropped=True, block=ck.FusedConvNeXtBlock):
        shape = shape or STAGE
        self.dtype, self.autocast = MODES[mode]
        scale = {} if use_grn else {"layer_scale_init_value": 1.0}
        self.block = block(shape[1], use_grn=use_grn, **scale).to(DEVICE, self.dtype)
        if use_grn:
            with torch.no_grad():
                self.block.grn.gamma.normal_()
                self.block.grn.beta.normal_()
        self.x = self.image(shape).requires_grad_()
        self.grad = self.image(shape)
        self.sample_scale = None
        if dropped:
            self.sample_scale = torch.full((shape[0],), 1.25, device=DEVICE)
            self.sample_scale[1::3] = 0

    def image(self, shape):
        return torch.randn(shape, device=DEVICE).to(self.dtype).contiguous(memory_format=torch.channels_last)

    def forward(self):
        block = self.block
        grn = (block.grn.gamma, block.grn.beta) if block.grn is not None else (None, None)
        with torch.autocast("cuda", self.autocast, enabled=self.autocast is not None):
            return ck.convnext_block(
                *(self.x, block.dwconv.weight, block.dwconv.bias, block.norm.weight, block.norm.bias),
                *(block.pwconv1.weight, block.pwconv1.bias, *grn, block.pwconv2.weight, block.pwconv2.bias),
                *(block.gamma, self.sample_scale),
            )

    def clear(self):
        self.x.grad = None
        self.block.zero_grad(set_to_none=True)

    def run(self):
        """Output and gradients; those of the step before are let go of."""
        self.clear()
        y = self.forward()
        y.backward(self.grad.to(y.dtype))
        return [y.detach(), self.x.grad, *[parameter.grad for parameter in self.block.parameters()]]


def copies(tensors):
    return [tensor.clone() for tensor in tensors]


def assert_same_bits(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}: up to {(a - b).abs().max().item():.3g} apart"


@every_block
@every_mode
def test_two_runs_are_the_same_bits(mode, use_grn):
    step = Step(mode, use_grn)
    first = copies(step.run())
    for _ in range(3):
        assert_same_bits(step.run(), first)


@every_block
@pytest.mark.parametrize("mode", ["bf16", "autocast-bf16"])
def test_side_stream(mode, use_grn):
    step = Step(mode, use_grn)
    expected = copies(step.run())
    values = step.x.detach().clone()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        with torch.no_grad():
            step.x.zero_()
            # Long work first: launched on another stream, the kernels would read x before it is written.
            torch.cuda._sleep(50_000_000)
            step.x.copy_(values)
        got = step.run()
    stream.synchronize()
    assert_same_bits(got, expected)


@every_block
@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast-bf16"])
def test_cuda_graph_of_a_training_step(mode, use_grn):
    step = Step(mode, use_grn)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is set up once, libraries' workspaces for instance, is not for the graph
        for _ in range(3):
            step.run()
    torch.cuda.current_stream().wait_stream(stream)
    step.clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step.run()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            step.x.normal_()
            step.grad.normal_()
            # Which samples are dropped is read on the device: a replay follows it.
            step.sample_scale.bernoulli_(0.5)
        graph.replay()
        got = copies(captured)
        assert_same_bits(got, step.run())


@every_block
@every_mode
def test_no_synchronisation(mode, use_grn):
    step = Step(mode, use_grn)
    step.run()
    module = ck.FusedConvNeXtBlock(96, drop_path=0.3, use_grn=use_grn).to(DEVICE, step.dtype)
    module(step.x).sum().backward()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run()
        with torch.autocast("cuda", step.autocast, enabled=step.autocast is not None):
            y = module(step.x)
        y.backward(step.grad.to(y.dtype))
    finally:
        torch.cuda.set_sync_debug_mode(before)


@every_block
@pytest.mark.parametrize("mode", MODES)
def test_autocast_dtypes_are_eagers(mode, use_grn):
    ours, theirs = (Step(mode, use_grn, (2, 8, 5, 5), False, make) for make in BLOCKS)
    with torch.autocast("cuda", ours.autocast, enabled=ours.autocast is not None):
        expected = theirs.block(theirs.x)
    expected.backward(theirs.grad.to(expected.dtype))
    got = ours.run()
    assert got[0].dtype == expected.dtype
    assert got[1].dtype == theirs.x.grad.dtype
    for name, parameter in theirs.block.named_parameters():
        assert ours.block.get_parameter(name).grad.dtype == parameter.grad.dtype, name


BLOCKS = (ck.FusedConvNeXtBlock, ck.ReferenceConvNeXtBlock)


def test_another_device_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    step = Step("autocast-bf16", False)
    expected = step.run()
    step.block, step.x, step.grad = step.block.to("cuda:1"), step.x.detach().to("cuda:1"), step.grad.to("cuda:1")
    step.x.requires_grad_()
    step.sample_scale = step.sample_scale.to("cuda:1")
    assert torch.cuda.current_device() == 0
    for got, other in zip(step.run(), expected, strict=True):
        assert got.device == torch.device("cuda:1")
        torch.testing.assert_close(got.to("cuda:0"), other, rtol=2e-2, atol=2e-2 * other.abs().max().item())
    assert torch.cuda.current_device() == 0


# --- memory


@every_block
@pytest.mark.parametrize("mode", ["bf16", "autocast-bf16"])
def test_what_is_kept_for_the_backward(mode, use_grn):
    """2 bytes an input element for x where it is not the caller's own, and 2 for z; mean and rstd of each row."""
    shape = (32, 96, 56, 56)
    step = Step(mode, use_grn, shape)
    step.run()
    step.clear()
    before = torch.cuda.memory_allocated()
    y = step.forward()
    held = torch.cuda.memory_allocated() - before - y.numel() * y.element_size()
    elements = step.x.numel()
    allowed = elements * ((4 if step.autocast else 2) + 8 / shape[1])
    # The allocator may leave 1 MiB at the end of each of four tensors.
    assert held <= 1.01 * allowed + 2**22, f"{held / elements:.2f} bytes an element instead of {allowed / elements:.2f}"


@pytest.mark.gpu_memory(16)
@every_block
def test_peak_of_a_training_step_is_below_eagers(use_grn):
    peaks = []
    for make in BLOCKS:
        step = Step("autocast-bf16", use_grn, (256, 96, 56, 56), False, make)

        def run(step=step, make=make):
            if make is ck.FusedConvNeXtBlock:
                return step.run()
            step.clear()
            with torch.autocast("cuda", step.autocast):
                y = step.block(step.x)
            y.backward(step.grad.to(y.dtype))

        run()
        step.clear()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del step, run
    ours, eager = peaks
    assert ours <= 0.7 * eager, f"{ours / 2**20:.0f} MiB, eager {eager / 2**20:.0f} MiB"


@pytest.mark.gpu_memory(56)
@every_block
def test_more_than_2_to_31_elements(use_grn):
    shape = (2**31 // (96 * 56 * 56) + 3, 96, 56, 56)
    step = Step("bf16", use_grn, (2, *shape[1:]), dropped=False)
    small = copies(step.run())
    last_x, last_grad = step.x.detach(), step.grad
    for_all = torch.zeros(shape, device=DEVICE, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    step.x, step.grad = for_all, for_all.clone()
    step.x[-2:], step.grad[-2:] = last_x, last_grad
    step.x.requires_grad_()
    y, dx, *parameters = step.run()
    # The products' shapes differ, so the bits may.
    torch.testing.assert_close(y[-2:], small[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dx[-2:], small[1], rtol=2e-2, atol=2e-2 * small[1].abs().max().item())
    assert not dx[:-2].any()
    first = y[:1]
    for begin in range(0, shape[0] - 2, 1024):
        part = y[begin : min(begin + 1024, shape[0] - 2)]
        torch.testing.assert_close(part, first.expand_as(part), rtol=2e-2, atol=2e-2)
    for got, expected in zip(parameters, small[2:], strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=5e-2, atol=5e-2 * scale)
