"""The CUDA entries (csrc/*/cuda*.cu: checks, workspace, plan, launch, registration) as PyTorch calls them, executed on
the CPU: the ordinary tests of operators and blocks run in a process where the entries are the CPU's implementation, and
the engine of tests/cuda_on_host/ runs their kernels. Operators without an entry run through PyTorch's kernels there.
"""

import re

import pytest

import cuda_programs
from convnext_kernels import backends
from cuda_entries import Entries, registered_operators

REGISTERED = registered_operators()
CHECKS = "tests/cuda_on_host/check_entries.py"

# Tests of the CPU library itself, and what differs on purpose.
NOT_THEIRS = {
    "every_capability": "the capabilities of the CPU library",
    "number_of_threads": "one thread runs everything",
    "run_on_onednn": "the matrix products of the CPU library",
    "another_device": "no other device to try, and the message says CUDA",
    "test_depthwise_conv_cpu.py and non_finite": "the tuned weight gradient multiplies NaN by the padding's zeros too",
    "test_depthwise_conv_cpu.py and dropped_samples": "a residual's NaN stays NaN, not bit for bit: check_entries.py",
    "all_16_bit_inputs or gelu_in_fp32": "bounds of the CPU's GELU; csrc/mlp/gelu.cuh's are in test_cuda_on_host.py",
    "test_mlp_cpu.py and bias_gelu and fp32-1-": "PyTorch's CPU kernel is better than its fp32 formula there",
}
# What holds for compiled kernels only, or names their errors.
OF_COMPILED_KERNELS = {
    "layer_norm": ["test_layer_norm_cpu.py"],
    "layer_norm_backward": ["test_layer_norm_cpu.py"],
    "layer_norm_mlp": ["kept_hidden", "test_mlp_cpu.py and not bias_gelu"],
    "layer_norm_mlp_backward": ["test_mlp_cpu.py and not bias_gelu"],
}


@pytest.fixture(scope="module")
def entries(request):
    for entries in cuda_programs.provide(request, [], Entries):
        if len(request.session.items) > 5:  # the whole file: all of them side by side
            for variant, edits in [("plain", ()), ("asan", ()), *((d[0], planted(d)) for d in DEFECTS.values())]:
                entries.start_library(variant, edits)
        yield entries


def selection():
    left_out = list(NOT_THEIRS)
    for operator in sorted(set(backends.OPERATORS) - REGISTERED):
        left_out += [f"agrees_with_the_compiled_one and {operator}]", *OF_COMPILED_KERNELS.get(operator, ())]
    return " and ".join(f"not ({expression})" for expression in left_out)


def passed(done):
    """The number of tests that passed; none may have failed."""
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def launched(path):
    return {name: int(count) for name, count in map(str.split, path.read_text().splitlines())}


def test_there_are_entries():
    assert set(backends.OPERATORS) >= REGISTERED
    assert {"bias_gelu", "depthwise_conv2d", "depthwise_conv2d_weight_grad"} <= REGISTERED


def test_operators_and_blocks(entries, tmp_path):
    files = ["operators", "block", "depthwise_conv_cpu", "mlp_cpu", "layer_norm_cpu"]
    files = [f"tests/test_{name}.py" for name in files]
    done = entries.run_pytest("plain", tmp_path / "launches", CHECKS, *files, "-k", selection())
    assert passed(done) > 700
    assert set(launched(tmp_path / "launches")) == REGISTERED


@pytest.mark.parametrize(("schedule", "approximation"), [("reverse", "low"), ("random", "mixed"), ("greedy", "high")])
def test_blocks_in_other_schedules(entries, tmp_path, schedule, approximation):
    done = entries.run_pytest(
        *("plain", tmp_path / "launches", "tests/test_block.py", "-k", f"(numerics or options) and {selection()}"),
        schedule=schedule,
        approximation=approximation,
    )
    assert passed(done) > 30
    assert launched(tmp_path / "launches")


def test_bounds(entries, tmp_path):
    """AddressSanitizer knows where PyTorch's tensors end."""
    expression = f"(check_entries or odd_shapes or opcheck and not gradients) and {selection()}"
    files = [CHECKS, "tests/test_block.py", "tests/test_operators.py"]
    done = entries.run_pytest("asan", tmp_path / "launches", *files, "-k", expression)
    assert passed(done) > 100
    assert set(launched(tmp_path / "launches")) == REGISTERED


def test_a_refused_launch_is_a_python_error(entries, tmp_path):
    """The plan is for 227 KiB of shared memory; the engine gives a block what it has on every GPU from sm_80 on."""
    done = entries.run_pytest("plain", tmp_path / "launches", CHECKS, "-k", "refused_launch", shared_kib=227)
    assert passed(done) == 1


# --- the tests are right: defects planted in a copy of the entries

ENTRY = "depthwise_conv/cuda.cu"
DEFECTS = {
    "result-of-the-wrong-width": (
        "asan",
        "params.result_width = static_cast<int>(c.y.size(3));",
        "params.result_width = static_cast<int>(c.y.size(2));",
        "depthwise_conv_fp64",
        "heap-buffer-overflow",
    ),
    "workspace-a-row-short": (
        "asan",
        "empty(x, {plan.partial_rows(), kernel_size",
        "empty(x, {plan.partial_rows() - 1, kernel_size",
        "depthwise_conv_fp64",
        "heap-buffer-overflow",
    ),
    "alignment-of-one-tensor-only": (
        "asan",
        "is_vector_aligned(x) && is_vector_aligned(grad),",
        "is_vector_aligned(x),",
        "unaligned",
        "misaligned",
    ),
    "drops-forgotten-where-the-cast-is-in-the-same-pass": (
        "plain",
        "params.sample_scale = data_or_null<float>(sample_scale);",
        "params.sample_scale = nullptr;",
        "the_cast_in_the_same_pass_on_tensor_cores",
        "assert torch.equal(y, ops.depthwise_conv2d(x_copy, weight, bias, 1, sample_scale))",
    ),
    "a-sum-not-launched": (
        "plain",
        "if (plan.partial_rows() == 0) return {zeros",
        "if (plan.partial_rows() >= 0) return {empty",
        "depthwise_conv_fp64",
        "Mismatched elements",
    ),
}


def planted(defect):
    return ((ENTRY, *defect[1:3]),)


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_in_an_entry_is_found(entries, tmp_path, name):
    variant, _, _, expression, message = DEFECTS[name]
    edits = planted(DEFECTS[name])
    done = entries.run_pytest(variant, tmp_path / "launches", CHECKS, "-x", "-k", expression, edits=edits)
    assert done.returncode != 0, f"the planted defect was not found:\n{done.stdout}"
    assert message in done.stdout + done.stderr
