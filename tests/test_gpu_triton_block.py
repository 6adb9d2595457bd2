"""FusedConvNeXtBlock through the Triton backend, end to end: on a GPU, and under TRITON_INTERPRET=1 on the CPU.

test_triton_block.py starts the interpreter.
"""

import copy
import logging

import pytest
import torch

import convnext_kernels as ck
from convnext_kernels import backends
from convnext_kernels.triton_kernels import launch
from numerics import assert_close
from test_block import pair

pytestmark = [] if launch.INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if launch.INTERPRETED else "cuda"
# The interpreter takes half a minute for a real stage.
SHAPE = (3, 16, 4, 3) if launch.INTERPRETED else (8, 96, 28, 28)


def image(dtype=torch.float32, shape=SHAPE):
    n, c, h, w = shape
    return torch.randn(n, h, w, c, dtype=torch.float64).to(DEVICE, dtype).permute(0, 3, 1, 2)


def blocks(dtype=torch.float32, **options):
    """The reference and the block that runs in Triton, with the same parameters of order 1."""
    theirs, ours = pair(SHAPE[1], **options)
    ours.backend = "triton"
    return theirs.to(DEVICE, dtype), ours.to(DEVICE, dtype)


def step(block, x, grad, autocast=None, seed=1):
    """One step of SGD: the output, the gradients, and the parameters after it."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    optimizer.zero_grad()
    with torch.autocast(DEVICE, autocast, enabled=autocast is not None):
        y = block(x)
    y.backward(grad.to(y.dtype))
    optimizer.step()
    gradients = {name: p.grad.clone() for name, p in block.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients, **{f"new {n}": p.detach() for n, p in block.named_parameters()}}


@pytest.fixture
def only_triton(monkeypatch):
    """Fails if an operator runs anywhere else; lists those that ran."""
    ran = []
    kernels = backends._triton_kernels()
    implementation = kernels.implementation

    def counted(operator):
        def run(*arguments):
            ran.append(operator)
            return implementation(operator)(*arguments)

        return run

    def forbidden(*_):
        raise AssertionError("ran outside of Triton")

    monkeypatch.setattr(kernels, "implementation", counted)
    monkeypatch.setattr(backends, "_decided", {})
    for operator in backends.OPERATORS:
        monkeypatch.setattr(backends.reference_backend, operator, forbidden)
    return ran


STEP = [
    *("depthwise_conv2d", "layer_norm_mlp"),
    *("layer_norm_mlp_backward", "depthwise_conv2d_input_grad", "depthwise_conv2d_weight_grad"),
]


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("mode", ["fp32", "pure", "autocast"])
def test_a_training_step_matches_the_reference(mode, use_grn, drop_path, only_triton):
    dtype, autocast = {
        "fp32": (torch.float32, None),
        "pure": (torch.bfloat16, None),
        "autocast": (torch.float32, torch.bfloat16),
    }[mode]
    theirs, ours = blocks(dtype, use_grn=use_grn, drop_path=drop_path)
    truth_block = copy.deepcopy(theirs).double()
    x, grad = image(dtype), image(dtype)
    seed = seed_that_drops(theirs, x, autocast) if drop_path else 1
    expected, got = step(theirs, x, grad, autocast, seed), step(ours, x, grad, autocast, seed)
    first = "depthwise_conv2d_cast" if mode == "autocast" else "depthwise_conv2d"
    assert only_triton == [first, *STEP[1:]]
    if drop_path:  # the truth draws in fp64, which is another stream: it is told what was drawn
        truth_block.drop_path = _Fixed(kept(expected["y"], x), drop_path)
    truth = step(truth_block, x.double(), grad.double())
    unit = torch.finfo(autocast or dtype).eps / 2
    for name, value in truth.items():
        assert_close(got[name], expected[name], value, name, unit)


def kept(y, x):
    """Which samples a block did not drop (N,): the others are as they were."""
    return (y != x).flatten(1).any(1)


def seed_that_drops(block, x, autocast):
    """The first seed with which the block drops a sample and keeps another: a generator of each device has its own."""
    for seed in range(100):
        torch.manual_seed(seed)
        with torch.no_grad(), torch.autocast(DEVICE, autocast, enabled=autocast is not None):
            live = kept(block(x), x)
        if live.any() and not live.all():
            return seed
    raise AssertionError("no seed of 100 drops a sample and keeps another")


class _Fixed(torch.nn.Module):
    """Drop path with the samples given."""

    def __init__(self, kept, drop_path):
        super().__init__()
        self.scale = kept.double().view(-1, 1, 1, 1) / (1 - drop_path)

    def forward(self, x):
        return x * self.scale


@pytest.mark.parametrize("use_grn", [False, True], ids=["v1", "v2"])
def test_keeping_hidden_changes_nothing(use_grn):
    _, ours = blocks(use_grn=use_grn)
    other = copy.deepcopy(ours)
    other.recompute = False
    x, grad = image(), image()
    first, second = step(ours, x, grad), step(other, x, grad)
    for name, value in first.items():
        # Of a sum over all pixels, what its rounding may cost.
        size = max(1.0, value.abs().max().item())
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5 * size)


def test_inference_mode_and_no_grad(only_triton):
    _, ours = blocks()
    x = image()
    with torch.no_grad():
        y = ours(x)
    with torch.inference_mode():
        assert torch.equal(ours(x), y)
    assert only_triton == STEP[:2] * 2


def test_a_compiled_step_runs_in_triton(only_triton):
    theirs, ours = blocks(use_grn=True)
    compiled = torch.compile(ours, fullgraph=True)
    x = image().requires_grad_()
    y = compiled(x)
    y.square().mean().backward()
    assert only_triton == STEP
    torch.testing.assert_close(y, theirs(x), rtol=1e-4, atol=1e-4)


def test_two_steps_give_the_same_bits():
    _, ours = blocks(torch.bfloat16)
    other = copy.deepcopy(ours)
    x, grad = image(torch.bfloat16), image(torch.bfloat16)
    first, second = step(ours, x, grad), step(other, x, grad)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_channels_that_are_no_multiple_of_8(caplog):
    block = ck.FusedConvNeXtBlock(12, backend="triton", device=DEVICE)
    x = image(shape=(1, 12, 3, 3))
    message = r"layer_norm_mlp: backend 'triton' is forced, but .*multiples? of 8.*; argument 'z' is torch\.float32 of"
    with pytest.raises(RuntimeError, match=message):
        block(x)
    if launch.INTERPRETED:
        return  # auto runs on the CPU's own kernels there
    block.backend = None
    backends._log_fallback.cache_clear()
    with caplog.at_level(logging.WARNING, logger="convnext_kernels"):
        for _ in range(2):
            block(x)
    (line,) = [r.getMessage() for r in caplog.records if "layer_norm_mlp " in r.getMessage()]
    assert "of 8" in line


def test_what_auto_takes():
    expected = "cpu" if launch.INTERPRETED else "triton"
    assert backends.choose("layer_norm_mlp", DEVICE, "auto").backend == expected
    assert backends.choose("layer_norm_mlp", DEVICE, "triton").backend == "triton"
