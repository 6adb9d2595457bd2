"""The Triton depthwise convolution without a GPU: interpreted against fp64, and compiled for every kind of chip."""

import pytest
import torch

pytest.importorskip("triton")

from convnext_kernels.triton_kernels import config, depthwise_conv, launch
from triton_tools import compile_launch, in_interpreter

CHIPS = (80, 90, 100)


def test_every_kernel_in_the_interpreter():
    in_interpreter("test_gpu_triton_depthwise_conv.py")


def launches(chip, n, c, h, w, kernel, stride, dtype, residual_dtype):
    """What the three operators launch for a shape, with drop path, bias and residual, by name."""
    meta = {"device": "meta"}
    out_h, out_w = (h - 1) // stride + 1, (w - 1) // stride + 1
    x, grad, residual = (
        torch.empty(n, height, width, c, dtype=d, **meta).permute(0, 3, 1, 2)
        for height, width, d in ((h, w, dtype), (out_h, out_w, dtype), (h, w, residual_dtype))
    )
    weight, bias = torch.empty(c, 1, kernel, kernel, dtype=dtype, **meta), torch.empty(c, dtype=dtype, **meta)
    scale = torch.empty(n, **meta)
    padding = [(size - 1) % stride for size in (h, w)]
    with launch.recorded(launch.chip_of_architecture(chip)) as recorded:
        depthwise_conv.depthwise_conv2d(x, weight, bias, stride, scale)
        depthwise_conv.depthwise_conv2d_input_grad(grad, weight, residual, stride, padding, scale)
        depthwise_conv.depthwise_conv2d_weight_grad(grad, x, kernel, stride, scale)
    return recorded


# The tuned kernel at both ends of a ConvNeXt, in the mode autocast makes of it and in fp32.
@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    "case",
    [
        (128, 96, 56, 56, 7, 1, torch.bfloat16, torch.float32),
        (128, 768, 7, 7, 7, 1, torch.float32, torch.float32),
    ],
    ids=["96@56 bf16", "768@7 fp32"],
)
def test_tuned_kernels_compile_without_stack_and_shared_memory(case, chip):
    names = set()
    for recorded in launches(chip, *case):
        code = compile_launch(recorded, chip)
        names.add(code.name)
        assert code.stack == 0, f"{code.name} spills {code.stack} bytes on sm_{chip}"
        assert code.shared <= 1024  # of the pass that adds the partials up
        if code.name != "column_sums_kernel":
            # Eight warps a multiprocessor and more: two on each of its schedulers.
            assert code.registers <= 240, f"{code.name} takes {code.registers} registers on sm_{chip}"
    assert names == {"_convolution_kernel", "_weight_gradient_kernel", "column_sums_kernel"}


@pytest.mark.parametrize("kernel,stride", [(3, 1), (9, 1), (7, 2)])
def test_other_kernel_sizes_and_strides_compile(kernel, stride):
    for recorded in launches(90, 2, 100, 13, 9, kernel, stride, torch.bfloat16, torch.bfloat16):
        code = compile_launch(recorded, 90)
        assert code.stack <= 16, code.name  # these are not tuned: a predicate or two may not fit


def test_the_main_loop_reuses_what_it_loads(monkeypatch):
    """49 weights in registers: an FMA in the loop takes no load of its own. Whatever Triton's default, it is an FMA."""
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    recorded = launches(90, 128, 96, 56, 56, 7, 1, torch.bfloat16, torch.bfloat16)
    for index in (0, 2):  # the convolution, the weight gradient
        sass = compile_launch(recorded[index], 90).sass()
        strip = recorded[index].constants["STRIP"]
        assert sass.count("FFMA") >= 49 * strip
        assert sass.count("LDG") < 49 * strip / 3
        assert " ATOM" not in sass and " RED." not in sass


# --- the plan


@pytest.mark.parametrize("chip", CHIPS)
def test_strips_bands_and_programs(chip):
    for n, c, size in ((128, 96, 56), (1, 96, 56), (128, 768, 7), (3, 40, 13), (1, 3, 1), (2, 64, 600)):
        for recorded in launches(chip, n, c, size, size, 7, 1, torch.bfloat16, torch.bfloat16):
            if recorded.kernel.__name__ == "column_sums_kernel":
                continue
            height, width, tasks, strips, bands, band_rows = recorded.arguments[-6:]
            constants, grid = recorded.constants, recorded.grid
            assert strips * constants["STRIP"] >= width > (strips - 1) * constants["STRIP"]
            assert bands * band_rows >= height > (bands - 1) * band_rows
            assert tasks == n * strips * bands
            assert grid[0] * constants["BLOCK_C"] >= c and 1 <= grid[1] <= tasks
    # One image gives every multiprocessor something to do: it is cut into bands.
    few, many = (launches(chip, n, 96, 56, 56, 7, 1, torch.bfloat16, torch.bfloat16)[0].arguments[-2] for n in (1, 128))
    assert few > 1 and many == 1


def test_candidates_of_the_tuner_compile():
    problem = config.Problem(192, 7, torch.bfloat16, 65536, 90)
    for candidate in config.candidates("depthwise_conv", problem)[3::3]:
        with config.override("depthwise_conv", candidate):
            recorded = launches(90, 16, 192, 28, 28, 7, 1, torch.bfloat16, torch.float32)[1]
        assert compile_launch(recorded, 90).stack == 0, candidate
