"""What tests have of Triton's interpreter: a GPU's arithmetic, NaN in fresh memory, and who accesses what."""

import contextlib

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from convnext_kernels.triton_kernels import launch
from triton_tools import in_interpreter

interpreted = pytest.mark.skipif(not launch.INTERPRETED, reason="of the interpreter's process")


@pytest.mark.skipif(launch.INTERPRETED, reason="it is this process")
def test_in_the_interpreter():
    in_interpreter("test_triton_interpreter.py")


# --- arithmetic


@triton.jit
def _arithmetic_kernel(x, y, z, wide, total, product, fused, rounded, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    a, b, c = tl.load(x + i), tl.load(y + i), tl.load(z + i)
    tl.store(total + i, a + b)
    tl.store(product + i, a * b)
    tl.store(fused + i, tl.fma(a, b, c))
    tl.store(rounded + i, tl.load(wide + i).to(rounded.dtype.element_ty))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_numbers_are_rounded_to_the_nearest_and_once(dtype):
    x, y, z = torch.randn(3, 4096, dtype=torch.float64).to(dtype)
    z -= x * y  # what is left of the product is what an FMA does not round
    wide = torch.cat([torch.randn(2048), 2.0 ** torch.randint(-140, 127, (2048,)) * torch.randn(2048)])
    wide[::7] = (wide[::7].to(dtype).float() * (1 + torch.finfo(dtype).eps / 2)).nan_to_num()  # halfway
    results = [torch.empty_like(x) for _ in range(4)]
    launch.run(_arithmetic_kernel, (4,), x, y, z, wide, *results, N=1024)
    exact = x.double() * y.double()
    for ours, expected in zip(results, (x + y, x * y, (exact + z.double()).to(dtype), wide.to(dtype)), strict=True):
        assert torch.equal(ours, expected)
    assert not torch.equal(results[2], x * y + z)


@triton.jit
def _product_kernel(a, b, sums, powers, N: tl.constexpr):
    row, column = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    at = row * N + column
    product = tl.dot(tl.load(a + at), tl.load(b + at))
    tl.store(sums + at, product)
    tl.store(powers + at, tl.exp2(product))


@interpreted
def test_products_of_bf16_are_summed_in_fp32_and_exp2_has_no_denormals():
    a, b = torch.randn(2, 32, 32).bfloat16()
    a *= 8
    sums, powers = torch.empty(2, 32, 32)
    launch.run(_product_kernel, (1,), a, b, sums, powers, N=32)
    torch.testing.assert_close(sums, a.float() @ b.float(), rtol=1e-5, atol=1e-4)
    expected = torch.exp2(sums)
    expected[expected < 2.0**-126] = 0
    assert (expected == 0).any()
    torch.testing.assert_close(powers, expected, rtol=1e-5, atol=0)


@triton.jit
def _tf32_kernel(a, b, sums, N: tl.constexpr, PRECISION: tl.constexpr):
    at = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(sums + at, tl.dot(tl.load(a + at), tl.load(b + at), input_precision=PRECISION))


@interpreted
def test_tf32_has_10_bits():
    last_read, not_read = 1 + 2.0**-10, 1 + 2.0**-11 + 2.0**-23
    a, sums = torch.eye(16), torch.empty(16, 16)
    for precision, expected in (("tf32", 1.0), ("ieee", not_read)):
        for factor, value in ((last_read, last_read), (not_read, expected)):
            b = torch.full((16, 16), factor)
            for factors in ((a, b), (b, a)):
                launch.run(_tf32_kernel, (1,), *factors, sums, N=16, PRECISION=precision)
                assert sums.eq(value).all()


# --- accesses


@interpreted
def test_fresh_memory_is_seen():
    assert torch.empty(5, dtype=torch.bfloat16).isnan().all()


@triton.jit
def _copy_kernel(x, y, N: tl.constexpr, SHIFT: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i + SHIFT))


@interpreted
def test_access_outside_is_seen():
    x, y = torch.zeros(64)[16:32], torch.zeros(16)
    launch.run(_copy_kernel, (1,), x, y, N=16, SHIFT=0)
    for shift in (-1, 1):
        with pytest.raises(Exception, match="1 of 16 accesses are outside the tensors"):
            launch.run(_copy_kernel, (1,), x, y, N=16, SHIFT=shift)


@triton.jit
def _exchange_kernel(x, y, N: tl.constexpr, FROM: tl.constexpr, TO: tl.constexpr):
    """Program p copies N numbers of x to y: of two such parts from part p + FROM to part p + TO."""
    p, i = tl.program_id(0), tl.arange(0, N)
    tl.store(y + (p + TO) % 2 * N + i, tl.load(x + (p + FROM) % 2 * N + i))


@triton.jit
def _two_steps_kernel(x, y, N: tl.constexpr, BARRIER: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y + i, tl.load(x + i))
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + i, tl.load(y + (i + 1) % N))


@triton.jit
def _sum_kernel(x, y, N: tl.constexpr, SAME: tl.constexpr):
    """N numbers to N // 2 places."""
    i = tl.arange(0, N)
    value = tl.load(x + (i // 2 if SAME else i))
    tl.store(y + i // 2, value)


@interpreted
@pytest.mark.parametrize(
    "kernel, programs, constants, race",
    [
        (_exchange_kernel, 2, dict(FROM=1, TO=0), None),
        (_exchange_kernel, 2, dict(FROM=1, TO=1), None),
        (_exchange_kernel, 1, dict(FROM=0, TO=1), None),
        (_two_steps_kernel, 1, dict(BARRIER=True), None),
        (_two_steps_kernel, 1, dict(BARRIER=False), "written and read by one program, without a barrier"),
        (_two_steps_kernel, 2, dict(BARRIER=True), "read, and written by another program"),
        (_sum_kernel, 1, dict(SAME=True), None),
        (_sum_kernel, 1, dict(SAME=False), "8 of 16 accesses: two values written to one place"),
        (_sum_kernel, 2, dict(SAME=True), "written by two programs"),
    ],
)
def test_race_is_seen(kernel, programs, constants, race):
    x, y = torch.arange(32.0), torch.zeros(32)
    expected = pytest.raises(Exception, match=race) if race else contextlib.nullcontext()
    with expected:
        launch.run(kernel, (programs,), x, y, N=16, **constants)


@triton.jit
def _reader_and_writer_kernel(x, y, N: tl.constexpr, WRITER: tl.constexpr):
    i = tl.arange(0, N)
    if tl.program_id(0) == WRITER:
        tl.store(x + i, 1.0)
    else:
        tl.store(y + i, tl.load(x + i))


@interpreted
@pytest.mark.parametrize(
    "writer, race", [(0, "read, and written by another program"), (1, "read by one program, then")]
)
def test_race_of_a_program_that_reads_and_one_that_writes_is_seen(writer, race):
    x, y = torch.zeros(2, 16)
    launch.run(_reader_and_writer_kernel, (1,), x, y, N=16, WRITER=writer)
    with pytest.raises(Exception, match=race):
        launch.run(_reader_and_writer_kernel, (2,), x, y, N=16, WRITER=writer)
