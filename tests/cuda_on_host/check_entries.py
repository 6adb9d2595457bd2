"""What only the CUDA entries do: run by tests/test_cuda_entries_on_host.py in a process where they are the CPU's.

The checks of the GPU test files are run from here as they stand, on CPU tensors: values, layouts, dtypes and errors.
"""

import os

import pytest
import torch

import test_gpu_bias_gelu
import test_gpu_depthwise_conv
from convnext_kernels import backends
from cuda_entries import registered_operators

for module in (test_gpu_bias_gelu, test_gpu_depthwise_conv):
    module.DEVICE = "cpu"

ops = torch.ops.convnext_kernels

# Those of moderate size that need no stream, graph or event.
FROM_GPU_TESTS = {
    test_gpu_bias_gelu: [
        *["bias_of_any_dtype", "without_bias", "unaligned_tensors", "empty", "errors_name_operator_and_argument"],
    ],
    test_gpu_depthwise_conv: [
        *["fp64", "parameters_of_any_dtype", "residual_of_any_dtype", "dropped_samples", "unaligned_tensors", "empty"],
        *["the_cast_in_the_same_pass", "non_finite_values_stay_where_they_reach", "errors_name_operator_and_argument"],
    ],
}
for module, names in FROM_GPU_TESTS.items():
    for name in names:
        globals()[f"test_{module.__name__.removeprefix('test_gpu_')}_{name}"] = getattr(module, f"test_{name}")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 24, 15, 13, 7, 1), (5, 8, 7, 7, 7, 1)], ids=lambda s: "x".join(map(str, s)))
def test_the_cast_in_the_same_pass_on_tensor_cores(monkeypatch, shape, dtype):
    monkeypatch.setenv(test_gpu_depthwise_conv.VERSION, "tensor")
    test_gpu_depthwise_conv.test_the_cast_in_the_same_pass(shape, dtype)


refusing = pytest.mark.skipif("CUDA_ON_HOST_SHARED_KIB" not in os.environ, reason="the engine gives what it promises")


def test_what_the_cuda_sources_register_is_what_runs():
    assert {choice.operator for choice in backends.describe("cpu") if choice.backend == "cpu"} == registered_operators()


def wide_gradient():
    """Planned for 227 KiB of shared memory it takes more than the 99 that there are."""
    x = torch.randn(1, 32, 7, 56).contiguous(memory_format=torch.channels_last)
    return ops.depthwise_conv2d_weight_grad(x, x, 7, 1, None)


@refusing
def test_a_refused_launch_names_the_operator():
    message = "depthwise_conv2d_weight_grad: launch: too much dynamic shared memory: .* a block has 101376"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            wide_gradient()
    # And the next launch is none the worse for it.
    x = torch.randn(1, 32, 7, 7).contiguous(memory_format=torch.channels_last)
    y = ops.depthwise_conv2d(x, torch.zeros(32, 1, 7, 7), torch.ones(32), 1, None)
    assert torch.equal(y, torch.ones_like(x))


@pytest.mark.skipif("CUDA_ON_HOST_SHARED_KIB" in os.environ, reason="for a chip of 99 KiB")
def test_the_same_launch_planned_for_its_chip():
    assert all(gradient.isfinite().all() for gradient in wide_gradient())
