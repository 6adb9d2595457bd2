"""Triton's LayerNorm and bias+GELU without a GPU: interpreted against fp64, and compiled for every kind of chip."""

import pytest
import torch

pytest.importorskip("triton")

from convnext_kernels.triton_kernels import bias_gelu, launch, layer_norm
from triton_tools import compile_launch, in_interpreter

CHIPS = (80, 90, 100)


def test_every_kernel_in_the_interpreter():
    in_interpreter("test_gpu_triton_layer_norm.py")


def norm_launches(chip, rows, c, dtype, parameter_dtype=torch.float32):
    def empty(*shape, d=dtype):
        return torch.empty(*shape, dtype=d, device="meta")

    weight, statistics = empty(c, d=parameter_dtype), empty(rows, d=torch.float32)
    with launch.recorded(launch.chip_of_architecture(chip)) as recorded:
        layer_norm.layer_norm(empty(rows, c), weight, weight, 1e-6, dtype)
        arguments = empty(rows, c), empty(rows, c), statistics, statistics, weight
        layer_norm.layer_norm_backward(*arguments, True, True, True)
    return recorded


def gelu_launches(chip, rows, k, dtype, approximate):
    x, bias = torch.empty(rows, k, dtype=dtype, device="meta"), torch.empty(k, dtype=dtype, device="meta")
    with launch.recorded(launch.chip_of_architecture(chip)) as recorded:
        bias_gelu.bias_gelu(x, bias, approximate)
        bias_gelu.bias_gelu_backward(x, x, bias, approximate)
    return recorded


def check(recorded, chip):
    code = compile_launch(recorded, chip)
    assert code.stack == 0, f"{code.name} spills {code.stack} bytes on sm_{chip}"
    assert code.shared <= 16 * 1024
    assert code.registers * 32 * recorded.constants["num_warps"] <= 65536 // 2  # at least two programs fit
    return code


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("c", [96, 384, 768, 1536, 4096, 5000])
def test_layer_norm_compiles_without_stack(c, chip):
    for recorded in norm_launches(chip, 25088, c, torch.bfloat16):
        check(recorded, chip)


def test_layer_norm_reads_16_bytes_at_a_time():
    for dtype in (torch.bfloat16, torch.float32):
        for recorded in norm_launches(90, 25088, 96, dtype, dtype)[:2]:
            sass = check(recorded, 90).sass()
            assert "LDG.E.128" in sass and "STG.E.128" in sass
            assert " ATOM" not in sass and " RED." not in sass


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_bias_gelu_compiles_without_stack(dtype, approximate, chip):
    for recorded in gelu_launches(chip, 25088, 384, dtype, approximate):
        code = check(recorded, chip)
        if code.name != "column_sums_kernel":
            assert "LDG.E.128" in code.sass()


def test_no_kernel_pads_a_convnext_width():
    for c in (96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048):
        constants = norm_launches(90, 1000, c, torch.bfloat16)[0].constants
        assert constants["C0"] + constants["C1"] == c


def test_launch_does_not_depend_on_the_number_of_rows_within_a_bucket():
    """Nothing is compiled again for another batch size: the compile-time constants are the same."""
    for rows in (9000, 9001, 65536):
        first, other = (norm_launches(90, r, 96, torch.bfloat16) for r in (9000, rows))
        for a, b in zip(first, other, strict=True):
            assert a.constants == b.constants
