"""layer_norm_mlp by Triton without a GPU: the interpreter runs it, the compiler makes cubins of what it launches."""

import contextlib
import re

import pytest
import torch

pytest.importorskip("triton")

import triton_tools
from convnext_kernels import triton_kernels
from convnext_kernels.triton_kernels import config, launch, offline
from convnext_kernels.triton_kernels.mlp_forward import layer_norm_mlp

PRODUCTS = {"fused_kernel", "squares_kernel", "fc1_kernel", "fc2_kernel"}


def test_in_the_interpreter():
    triton_tools.in_interpreter("test_gpu_triton_mlp.py")


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, device="meta", dtype=dtype)


def launches(
    chip, channels, dtype, grn=False, drop=True, keep_hidden=False, shape=(64, 28, 28), fused=None, approximate="none"
):
    """What layer_norm_mlp launches on the chip; under autocast's mixture of dtypes."""
    c, k = channels, 4 * channels
    vectors = [meta(k) if grn else None] * 2
    arguments = [meta(*shape, c, dtype=dtype), meta(*shape, c), meta(c), meta(c), meta(k, c), meta(k), *vectors]
    arguments += [meta(c, k), meta(c), None if grn else meta(c), meta(shape[0]) if drop else None]
    with launch.recorded(chip) as recorded:
        form = "mlp_grn_form" if grn else "mlp_form"
        with config.override(form, config.Config({"FUSED": fused})) if fused is not None else contextlib.nullcontext():
            layer_norm_mlp(*arguments, 1e-6, approximate, torch.float32, keep_hidden)
    return recorded


# Every form of the operator at the table's channels, as it runs by default and where the other form is asked for.
# (channels, options); GRN brings its three kernels.
FORMS = {
    "fused-96": (96, {"keep_hidden": True}),
    "fused-96-v2": (96, {"grn": True, "fused": 1}),
    "fused-96-whole-tanh": (96, {"drop": False, "approximate": "tanh"}),
    "fused-128": (128, {}),
    "fused-192": (192, {}),
    "fused-192-v2": (192, {"grn": True, "fused": 1, "shape": (64, 14, 14)}),
    "fused-256": (256, {"fused": 1}),
    "fused-384": (384, {"fused": 1}),
    "fused-40": (40, {"grn": True}),
    "two-384": (384, {"fused": 0}),
    "two-512": (512, {"keep_hidden": True}),
    "two-512-v2": (512, {"grn": True, "shape": (64, 7, 7)}),
    "two-768-v2": (768, {"grn": True, "shape": (2, 64, 64)}),
    "two-fp32-96": (96, {"dtype": torch.float32, "grn": True}),
    "two-fp32-512": (512, {"dtype": torch.float32, "keep_hidden": True}),
}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", FORMS)
def test_compiles_within_the_chip(case, capability):
    """Next to no stack, shared memory within the chip's, and the tensor cores' instructions in every 16-bit product."""
    check_compiled(case, capability)


@pytest.mark.parametrize("capability", [86, 120])
@pytest.mark.parametrize("case", ["fused-96-v2", "fused-192", "fused-256", "two-384", "two-512-v2"])
def test_compiles_for_the_smaller_chips(case, capability):
    """99 KB of shared memory a block."""
    check_compiled(case, capability)


def check_compiled(case, capability):
    channels, options = FORMS[case]
    options = {"dtype": torch.bfloat16, **options}
    chip = launch.chip_of_architecture(capability)
    recorded = launches(chip, channels, **options)
    names = [each.kernel.__name__ for each in recorded]
    assert ("fused_kernel" in names) == case.startswith("fused") and ("fc2_kernel" in names) == case.startswith("two")
    # Chunks launch the same kernels again.
    for each in {repr((e.kernel, offline.specialised(e, capability), e.constants)): e for e in recorded}.values():
        code = triton_tools.compile_launch(each, capability)
        what = f"{case}, sm_{capability}, {code.name}, {each.constants}"
        # Where two programs share a multiprocessor, addresses wait for a product's end on the stack: with Triton 3.8 up
        # to 32 bytes, with 3.6 up to 120, beside the 3 KB that a thread's share of the tiles is.
        most = 128 if code.name == "fc2_kernel" and each.constants.get("maxnreg") == 128 else 0
        assert code.stack <= most, f"{what}: {code.stack} bytes of stack, {code.registers} registers"
        assert code.shared <= chip.shared_bytes, f"{what}: {code.shared} bytes of shared memory"
        if code.name in PRODUCTS and options["dtype"] != torch.float32:
            instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
            assert instruction in code.ptx, what
        if (
            code.name in ("fc1_kernel", "fc2_kernel")
            and chip.tma
            and capability != 120
            and options["dtype"].itemsize == 2
        ):
            assert "cp.async.bulk.tensor" in code.ptx, what
        elif code.name in PRODUCTS:
            assert "cp.async" in code.ptx, what
        # 16 bytes a thread wherever rows are read: the attributes of what is launched allow it.
        if code.name in ("fused_kernel", "norm_kernel"):
            assert re.search(r"ld\.global\.v4", code.ptx), what


@pytest.mark.parametrize("capability", [80, 90])
def test_fp32_sums_are_cut(capability):
    """A sum over C or K as one chain of FMAs has twice the error of PyTorch's, which the interpreter does not show."""
    chip, fp32 = launch.chip_of_architecture(capability), torch.float32
    recorded = launches(chip, 512, fp32)
    tiles = config.Config({"BLOCK_M": 16, "BLOCK_K": 16, "PROGRAMS": 1})
    with contextlib.ExitStack() as stack:
        for kernel in ("mlp_grn_fused", "mlp_squares"):
            stack.enter_context(config.override(kernel, tiles))
        recorded += launches(chip, 96, fp32, grn=True, fused=1)
    depths = {"fc1_kernel": "BLOCK_K", "fc2_kernel": "BLOCK_K", "squares_kernel": "C0", "fused_kernel": "C0"}
    products = {each.kernel.__name__: each for each in recorded if each.kernel.__name__ in PRODUCTS}
    for name, depth in depths.items():
        ptx = triton_tools.compile_launch(products[name], capability).ptx
        assert triton_tools.longest_sum(ptx) == products[name].constants[depth], name


def test_no_new_code_for_another_batch_size():
    """A kernel is specialised on no number of rows: sizes of 1, of multiples of 16 and odd ones share the code."""
    chip = launch.chip_of_architecture(90)
    for options in (dict(channels=96, grn=True), dict(channels=512, grn=True), dict(channels=512)):
        seen = set()
        for samples in (2, 3, 16, 17, 33):
            for each in launches(chip, dtype=torch.bfloat16, shape=(samples, 14, 14), **options):
                seen.add((each.kernel.__name__, repr(offline.specialised(each, 90)[:2]), repr(each.constants)))
        kernels = {name for name, *_ in seen}
        by_kernel = {name: [each for each in seen if each[0] == name] for name in kernels}
        assert all(len(each) == 1 for each in by_kernel.values()), by_kernel


def test_workspace_is_bounded():
    """a and g of a large batch go through in chunks of a few rows less than 256 MiB."""
    recorded = launches(launch.chip_of_architecture(90), 512, torch.bfloat16, shape=(512, 28, 28))
    products = [each for each in recorded if each.kernel.__name__ == "fc1_kernel"]
    rows = [each.arguments[-2] for each in products]
    assert sum(rows) == 512 * 28 * 28 and len(rows) > 1
    assert all(count * (512 + 2048) * 2 <= 256 << 20 for count in rows)
    assert [each.arguments[-3] for each in products] == [sum(rows[:i]) for i in range(len(rows))]


def test_refusals_outside_the_interpreter():
    z = torch.zeros(2, 3, 24)
    assert "need a CUDA tensor, not one on 'cpu'" in triton_kernels.why_not("layer_norm_mlp", z)
    assert "float64" in triton_kernels.why_not("layer_norm_mlp", z.double())
    arguments = [z, None, None, None, torch.zeros(96, 24), None, None, None, torch.zeros(24, 96), None, None, None]
    with pytest.raises(RuntimeError, match="layer_norm_mlp: argument 'z': expected a CUDA tensor, got one on 'cpu'"):
        layer_norm_mlp(*arguments, 1e-6, "none", torch.float32, False)


def test_takes_as_many_rows_as_int32_counts():
    widths = [None, None, None, meta(32, 8), None, None, None, meta(8, 32), None, None, None]
    options = 1e-6, "none", torch.float16, False
    with launch.recorded(launch.chip_of_architecture(90)):
        z = meta(1, launch.MOST_ROWS, 8, dtype=torch.float16)
        layer_norm_mlp(z, *widths, *options)
        z = meta(2, launch.MOST_ROWS // 2 + 1, 8, dtype=torch.float16)
        with pytest.raises(RuntimeError, match=r"layer_norm_mlp: argument 'z': expected at most \d+ rows .*, got 2147"):
            layer_norm_mlp(z, *widths, *options)


def test_takes_multiples_of_eight():
    with launch.recorded(launch.chip_of_architecture(90)):
        fine = [meta(2, 24), None, None, None, meta(96, 24)]
        assert triton_kernels.why_not("layer_norm_mlp", *fine) is None
        for channels, hidden in ((20, 80), (24, 100)):
            reason = triton_kernels.why_not(
                "layer_norm_mlp", meta(2, channels), None, None, None, meta(hidden, channels)
            )
            assert f"C = {channels} with K = {hidden}" in reason
