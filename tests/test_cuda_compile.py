"""The compile gate: the CUDA sources compile for an old and a new architecture without warnings, no tuned kernel spills
registers or uses a stack, all stay within the registers that their plans count on, and the depthwise convolution's main
loop is FMA. `python -m benchmarks.resources --arch all` lists every kernel on every architecture.
"""

import re

import pytest

from benchmarks import resources
from build_tools import toolchain

SOURCES = resources.cuda_sources()
ARCHITECTURES = [80, 120]

# The plain kernels of unusual shapes divide 64-bit numbers before their loops: a call, which saves a few registers.
PLAIN = re.compile(r"^simple_")
PLAIN_STACK_BYTES = 64


@pytest.fixture(scope="module")
def compiled():
    """(source, architecture) -> (kernels, what the compiler said)."""
    toolkit, rejected = toolchain.find_toolkit()
    if not toolkit:
        pytest.skip(
            f"no CUDA compiler: {'; '.join(rejected) or 'none in CUDA_HOME, on PATH or in site-packages/nvidia'}"
        )
    for tool in ("cuobjdump", "nvdisasm"):
        try:
            resources.find_tool(tool)
        except resources.ResourceError as error:
            pytest.skip(str(error))
    return resources.compiled_kernels(SOURCES.values(), ARCHITECTURES, jobs=2)


def test_there_are_sources():
    assert SOURCES


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills(compiled, source, architecture):
    kernels, report = compiled[source, architecture]
    assert "warning" not in report, report
    assert len(kernels) == report.count("Compiling entry function")  # none where a source launches others' kernels
    for kernel in kernels:
        allowed = PLAIN_STACK_BYTES if PLAIN.search(kernel.name) else 0
        assert max(kernel.stack, kernel.spill_stores, kernel.spill_loads) <= allowed, kernel
        assert kernel.local_accesses == 0 or allowed, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("room", sorted({source.partition("/")[0] for source in SOURCES}))
def test_every_room_has_tuned_kernels(compiled, room, architecture):
    kernels = [k for source in SOURCES if source.startswith(f"{room}/") for k in compiled[source, architecture][0]]
    assert sum(not PLAIN.search(kernel.name) for kernel in kernels) >= 10


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_launch_bounds_can_be_launched(compiled, source, architecture):
    """A block of as many threads as the kernel was compiled for finds the registers it needs."""
    for kernel in compiled[source, architecture][0]:
        assert kernel.most_threads, f"{kernel.name} has no __launch_bounds__"
        given = -(-kernel.registers // 8) * 8
        assert given * kernel.most_threads <= 65536, kernel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_are_what_the_plans_count_on(compiled, architecture):
    plans = resources.load_plans()
    if plans is None:
        pytest.skip("the libraries come without bindings")
    chip = plans.chip_of_architecture(architecture)

    def resident_warps(kernel, threads):
        return resources.occupancy(kernel.registers, threads, 0, architecture, chip).warps

    seen = set()
    for kernels, _ in (compiled[source, architecture] for source in SOURCES):
        for kernel in kernels:
            kind = kernel.name.partition("<")[0]
            seen.add(kind)
            if kind in ("convolution_kernel", "weight_gradient_kernel"):
                for warps in (1, 2, 4, plans.depthwise_conv.MOST_WARPS):
                    assert resident_warps(kernel, 32 * warps) >= plans.depthwise_conv.RESIDENT_WARPS, kernel
            if kind in ("bias_gelu_kernel", "bias_gelu_backward_kernel"):
                tuning = plans.mlp.bias_gelu_tuning("backward" in kind, resources.element_bytes(kernel.name))
                threads = plans.mlp.ROW_PASS_THREADS
                assert resident_warps(kernel, threads) >= tuning.blocks_per_sm * threads // 32, kernel
    assert {"convolution_kernel", "weight_gradient_kernel", "bias_gelu_kernel", "bias_gelu_backward_kernel"} <= seen


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_convolutions_main_loop_is_fma(compiled, architecture):
    kernels, _ = compiled["depthwise_conv/cuda", architecture]
    forward = [k for k in kernels if re.match(r"convolution_kernel<(\w+), \1, (false|0)>", k.name)]
    assert len(forward) == 3, [k.name for k in kernels]
    for kernel in forward:
        assert kernel.share("FFMA") >= 0.7, kernel
        # One turn of the register window: 49 taps of 7 results in 7 rows, and not a part of it.
        assert kernel.loop["FFMA"] >= 49 * 7 * 7, kernel
