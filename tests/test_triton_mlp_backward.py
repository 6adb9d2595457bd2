"""layer_norm_mlp_backward in Triton without a GPU: its values in the interpreter, its machine code for every chip, its
plan's memory."""

import pytest
import torch

pytest.importorskip("triton")

from convnext_kernels import triton_kernels
from convnext_kernels.triton_kernels import config, launch
from convnext_kernels.triton_kernels.mlp_backward import WORKSPACE_BYTES, layer_norm_mlp_backward
from convnext_kernels.triton_kernels.mlp_backward_config import MOST_ROW_COLUMNS
from triton_tools import compile_launch, in_interpreter, longest_sum

PRODUCTS = (
    *("hidden_gradients_kernel", "weight_gradient_kernel", "norm_gradient_kernel", "input_gradient_kernel"),
    "row_gradients_kernel",
)
EVERYTHING = (1 << 10) - 1


def test_values_in_the_interpreter():
    in_interpreter("test_gpu_triton_mlp_backward.py")


def arguments(shape, dtype, grn=False, drop=False, kept=False, approximate="none", autocast=True, hidden=None):
    """The operator's arguments on the meta device: with autocast, fp32 parameters and gradient."""
    c = shape[-1]
    k = hidden or 4 * c

    def new(*sizes, dtype=torch.float32 if autocast else dtype):
        return torch.empty(sizes, dtype=dtype, device="meta")

    grn_parameters = (new(k), new(k)) if grn else (None, None)
    return (
        new(*shape),
        new(*shape, dtype=dtype),
        new(*shape[:-1], dtype=torch.float32),
        new(*shape[:-1], dtype=torch.float32),
        new(*((*shape[:-1], k) if kept else (0,)), dtype=dtype),
        *(new(c), new(c), new(k, c), new(k), *grn_parameters, new(c, k), new(c), None if grn else new(c)),
        new(shape[0], dtype=torch.float32) if drop else None,
        approximate,
        EVERYTHING,
    )


def launches_of(capability, given, **options):
    with launch.recorded(launch.chip_of_architecture(capability)) as launches:
        results = layer_norm_mlp_backward(*given, **options)
    return launches, results


def check_machine_code(capability, given):
    launches, _ = launches_of(capability, given)
    seen, names = set(), set()
    for one in launches:
        absent = tuple(argument is None for argument in one.arguments)
        key = one.kernel.__name__, absent, tuple(sorted((name, str(value)) for name, value in one.constants.items()))
        if key in seen:
            continue
        seen.add(key)
        compiled = compile_launch(one, capability)
        what = f"{compiled.name} {one.constants} on sm_{capability}"
        # What runs once a call may lack a register or two, and so may fp32: ptxas prefers more programs a
        # multiprocessor. And whole rows take all there are. With Triton 3.6 sm_80 lacks two at 384 channels. What
        # waits for a second product does so on the stack where two programs share a multiprocessor, and some in fp32.
        in_16_bits = given[1].dtype != torch.float32
        exact = in_16_bits and compiled.name in PRODUCTS and compiled.name != "row_gradients_kernel"
        most = 16 if not exact else 8 if capability < 90 else 0
        if compiled.name == "hidden_gradients_kernel":
            most = 256 if one.constants.get("maxnreg") == 128 else most if in_16_bits else 24
        assert compiled.stack <= most, f"{what}: {compiled.stack} bytes of stack"
        limit = launch.chip_of_architecture(capability).shared_bytes
        assert compiled.shared <= limit, f"{what}: {compiled.shared} bytes of shared memory, the chip has {limit}"
        if compiled.name in PRODUCTS:
            names.add(compiled.name)
            if in_16_bits:
                instruction = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
                assert instruction in compiled.ptx, what
    return names


@pytest.mark.parametrize("channels, size", [(40, 14), (96, 56), (128, 14), (192, 28), (256, 14), (384, 14), (768, 7)])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code(capability, channels, size):
    given = arguments((128, size, size, channels), torch.bfloat16, drop=True)
    names = check_machine_code(capability, given)
    in_two = {"hidden_gradients_kernel", "norm_gradient_kernel" if channels <= 256 else "input_gradient_kernel"}
    assert names == {"weight_gradient_kernel"} | ({"row_gradients_kernel"} if channels <= 128 else in_two)
    if channels <= 128:
        with config.override("mlp_backward_form", config.Config({"FUSED": 0})):
            assert check_machine_code(capability, given) == {"weight_gradient_kernel"} | in_two


@pytest.mark.parametrize("channels", [40, 96, 128])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code_of_whole_rows(capability, channels):
    """The kernel that makes dz with dh, in its other forms."""
    for dtype, options in [
        (torch.bfloat16, dict(kept=True)),
        (torch.float16, dict(drop=True, approximate="tanh")),
        (torch.bfloat16, dict(autocast=False)),
    ]:
        names = check_machine_code(capability, arguments((32, 28, 28, channels), dtype, **options))
        assert "row_gradients_kernel" in names


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_machine_code_of_other_forms(capability):
    for dtype, options in [
        (torch.bfloat16, dict(grn=True, drop=True)),
        (torch.bfloat16, dict(grn=True, kept=True, approximate="tanh", autocast=False)),
        (torch.float16, dict(kept=True)),
        (torch.float32, dict(grn=True)),
    ]:
        check_machine_code(capability, arguments((32, 28, 28, 192), dtype, **options))
    check_machine_code(capability, arguments((32, 7, 7, 768), torch.bfloat16, grn=True))
    check_machine_code(capability, arguments((32, 7, 7, 768), torch.float32, approximate="tanh"))


@pytest.mark.parametrize("capability", [86, 120])
def test_machine_code_for_small_shared_memories(capability):
    for shape in ((16, 56, 56, 96), (16, 28, 28, 192), (16, 7, 7, 768)):
        check_machine_code(capability, arguments(shape, torch.bfloat16, drop=True))
    check_machine_code(capability, arguments((16, 14, 14, 384), torch.float16, grn=True))


@pytest.mark.parametrize("capability", [80, 90])
def test_fp32_sums_are_cut(capability):
    """A sum over C, K or the rows as one chain of FMAs has twice the error of PyTorch's; the interpreter hides it."""
    shapes = {96: (32, 28, 28, 96), 512: (32, 7, 7, 512)}
    given = {channels: arguments(shape, torch.float32) for channels, shape in shapes.items()}
    launches = [*launches_of(capability, given[96])[0], *launches_of(capability, given[512])[0]]
    tiles = config.Config({"BLOCK_M": 16, "BLOCK_K": 16, "PROGRAMS": 1}, num_warps=8)
    with (
        config.override("mlp_backward_form", config.Config({"FUSED": 1})),
        config.override("mlp_backward_rows", tiles),
    ):
        launches += launches_of(capability, given[96])[0]
    depths = {
        "hidden_gradients_kernel": "BLOCK_C",
        "weight_gradient_kernel": "BLOCK_R",
        "norm_gradient_kernel": "BLOCK_K",
        "input_gradient_kernel": "BLOCK_K",
        "row_gradients_kernel": "C0",
    }
    products = {one.kernel.__name__: one for one in launches}
    for name, depth in depths.items():
        assert longest_sum(compile_launch(products[name], capability).ptx) == products[name].constants[depth], name


def test_threads_share_no_element_of_a_gradient_that_is_its_parts():
    """A thread that reads a part when another has stored the gradient there would take the one for the other."""
    for shape, hidden in (((2, 4, 4, 8), None), ((2, 4, 4, 16), None), ((2, 4, 4, 16), 8), ((16, 28, 28, 384), None)):
        launches, _ = launches_of(90, arguments(shape, torch.float32, hidden=hidden))
        (last,) = (one for one in launches if one.kernel.__name__ == "parameter_gradients_kernel")
        constants = last.constants
        threads = 32 * constants["num_warps"]
        assert constants["COLUMNS"] >= threads and constants["BLOCK_K"] * constants["BLOCK_C"] >= threads


def memory(launches, given, results):
    """Bytes of every tensor that launches read or write, other than arguments and results."""
    known = {id(t.untyped_storage()) for t in (*given, *results) if isinstance(t, torch.Tensor)}
    storages = {
        id(storage): storage
        for one in launches
        for storage in (t.untyped_storage() for t in one.arguments if isinstance(t, torch.Tensor))
    }
    return sum(storage.nbytes() for key, storage in storages.items() if key not in known)


@pytest.mark.parametrize("workspace", [24 << 20, WORKSPACE_BYTES])
@pytest.mark.parametrize("grn, kept", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize(
    "shape", [(128, 56, 56, 96), (128, 28, 28, 192), (64, 14, 14, 384), (3, 7, 7, 768), (4, 512, 512, 96)]
)
def test_workspace(shape, grn, kept, workspace):
    given = arguments(shape, torch.bfloat16, grn, drop=True, kept=kept)
    launches, results = launches_of(90, given, workspace_bytes=workspace)
    weights = 2 * sum(t.nbytes for t in given[5:14] if t is not None)
    image = shape[1] * shape[2] * (shape[3] * 10 * 2 + 400) if grn else 0
    assert memory(launches, given, results) <= max(workspace, image) + weights + (1 << 20)


def test_rows_are_covered_once():
    """Chunks follow one another, and every row has a program."""
    for shape, grn in (
        ((37, 14, 14, 96), False),
        ((37, 14, 14, 96), True),
        ((5, 300, 301, 96), True),
        ((1, 3, 5, 8), False),
    ):
        launches, _ = launches_of(90, arguments(shape, torch.bfloat16, grn), workspace_bytes=8 << 20)
        rows, rows_per_sample, first = shape[0] * shape[1] * shape[2], shape[1] * shape[2], 0
        for one in launches:
            if one.kernel.__name__ not in ("hidden_gradients_kernel", "row_gradients_kernel"):
                continue
            given = dict(zip(one.kernel.arg_names, one.arguments))
            begin, count = given["first"], given["rows"]
            assert begin == first and count > 0
            assert not grn or count % rows_per_sample == 0
            blocks = one.constants
            columns = 1 if one.kernel.__name__ == "row_gradients_kernel" else -(-4 * shape[3] // blocks["BLOCK_N"])
            assert one.grid == (-(-count // blocks["BLOCK_M"]) * columns,)
            first += count
        assert first == rows


def test_candidates_have_the_kernels_blocks():
    """Candidates have the blocks that the kernels take, and the defaults' names."""
    for kernel in (name for name in config.declared() if name.startswith("mlp_backward")):
        for chip in (80, 90, 120):
            for channels in (40, 96, 384, 768):
                problem = config.Problem(channels, 4 * channels, torch.bfloat16, 65536, chip)
                candidates = config.candidates(kernel, problem)
                # Rows of many channels do not fit the registers of the kernel for whole rows.
                only_form = kernel == "mlp_backward_form" and channels > MOST_ROW_COLUMNS
                assert len(candidates) == len(set(candidates)) and (len(candidates) > 1) != only_form
                assert len({tuple(sorted(candidate.blocks)) for candidate in candidates}) == 1, kernel


def test_takes_as_many_rows_as_int32_counts():
    with launch.recorded(launch.chip_of_architecture(90)):
        layer_norm_mlp_backward(*arguments((1, launch.MOST_ROWS, 8), torch.float16))
        with pytest.raises(RuntimeError, match=r"argument 'z': expected at most \d+ rows of C elements, got 2147"):
            layer_norm_mlp_backward(*arguments((2, launch.MOST_ROWS // 2 + 1, 8), torch.float16))


def test_takes_multiples_of_eight():
    with launch.recorded(launch.chip_of_architecture(90)):
        assert triton_kernels.why_not("layer_norm_mlp_backward", *arguments((2, 3, 24), torch.float16)) is None
        for channels, hidden in ((20, 80), (24, 100)):
            given = arguments((2, 3, channels), torch.float16, hidden=hidden)
            reason = triton_kernels.why_not("layer_norm_mlp_backward", *given)
            assert f"C = {channels} with K = {hidden}" in reason
            with pytest.raises(RuntimeError, match="multiples of 8"):
                layer_norm_mlp_backward(*given)
