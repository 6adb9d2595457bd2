"""The CUDA kernels, executed on the CPU: every kernel in every dtype, in four schedules with the same bits, against
plain loops in double; bounds and races; and defects planted in engine and kernels, which must be found.

No GPU is needed and none is used: see tests/cuda_on_host/engine.h.
"""

import math
import subprocess

import pytest

import cuda_programs
from cuda_programs import check, run

DTYPES = ["float", "half", "bfloat16", "double"]
KERNELS = ["bias_gelu", "bias_gelu_backward"]
BIASES = ["float", "none", "half", "double", "bfloat16"]

# (rows, columns): nothing to do, single rows and columns, every vector size and tail, rows of several blocks, more rows
# than the grid takes in one step (the tests plan for a chip of one multiprocessor).
SHAPES = [
    *[(0, 8), (0, 3), (1, 1), (1, 3), (1, 8), (1, 16), (1, 40), (1, 96), (1, 384), (1, 3072)],
    *[(2, 7), (3, 5), (7, 1), (7, 3), (7, 40), (7, 96), (7, 100), (7, 384), (7, 768), (5, 2056)],
    *[(17, 24), (33, 65), (49, 3), (49, 33), (49, 40), (49, 96), (49, 100), (49, 384), (196, 1), (196, 8)],
    *[(130, 257), (300, 96), (701, 24), (1500, 3), (2900, 1), (3, 4104)],
]
REDUCED_SHAPES = [(0, 8), (1, 1), (7, 3), (7, 40), (33, 65), (130, 48), (300, 7), (3, 301)]
assert len(SHAPES) >= 30


@pytest.fixture(scope="module")
def programs(request):
    wanted = [(name, variant) for variant in cuda_programs.VARIANTS for name in ("engine", "mlp")]
    yield from cuda_programs.provide(request, wanted + [defect.program for defect in DEFECTS.values()])


# --- the kernels are right


def mlp_options(kernel, dtype, shape, index):
    """Both kinds of GELU on tensors that are aligned or not, with biases of all types in turn."""
    for kind in ["none", "tanh"]:
        number = index + (kind == "tanh") + 2 * DTYPES.index(dtype)
        bias, offset = BIASES[number % len(BIASES)], int(number % 3 == 0)
        yield {"type": dtype, "gelu": kind, "rows": shape[0], "columns": shape[1], "bias": bias, "offset": offset}


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: f"{SHAPES[i][0]}x{SHAPES[i][1]}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_mlp(programs, kernel, dtype, index):
    for options in mlp_options(kernel, dtype, SHAPES[index], index):
        check(programs.path("mlp", "plain"), kernel, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", ["asan", "race"])
def test_mlp_bounds_and_races(programs, variant, kernel, dtype):
    for index, shape in enumerate(REDUCED_SHAPES):
        for options in mlp_options(kernel, dtype, shape, index):
            check(programs.path("mlp", variant), kernel, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mlp_plan(programs, dtype):
    """Some 50,000 shapes and chips: every element in one block, no block without work, limits kept."""
    check(programs.path("mlp", "plain"), "bias_gelu_plan", type=dtype)


# --- the arithmetic is as good as csrc/mlp/gelu.cuh says


# Over all finite inputs, whatever errors the PTX manual allows the approximate instructions to make. `ulp`: no result
# is further than one unit in the last place from the correctly rounded one; `misrounded`: the share that is not it.
BOUNDS = {
    ("half", "none"): {"relative": 2**-15.5, "ulp": 1, "misrounded": 0.015, "tiny": 2**-29, "derivative": 2**-16},
    ("half", "tanh"): {"relative": 2**-19, "ulp": 1, "misrounded": 0.0002, "tiny": 2**-33, "derivative": 2**-20},
    ("bfloat16", "none"): {"relative": 2**-9.8, "ulp": 1, "misrounded": 0.0006, "tiny": 2**-123, "derivative": 2**-16},
    ("bfloat16", "tanh"): {"relative": 2**-17, "ulp": 0, "misrounded": 0, "tiny": 2**-123, "derivative": 2**-20},
}


@pytest.mark.parametrize(("dtype", "kind"), BOUNDS)
def test_gelu_bounds(programs, dtype, kind):
    status, output = run(programs.path("mlp", "plain"), "gelu_bounds", type=dtype, gelu=kind)
    assert status == 0, output
    measured = {key: float(value) for key, value in (line.split("=") for line in output.split())}
    assert measured.keys() == BOUNDS[dtype, kind].keys()
    for name, bound in BOUNDS[dtype, kind].items():
        assert measured[name] <= bound, f"{name}: {measured[name]:.3g} is above {bound:.3g}"


@pytest.mark.parametrize("kind", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_non_finite_values_is_pytorchs(programs, dtype, kind):
    # PyTorch's formulas on CUDA: -inf * 0 is NaN, and so is the derivative's inf * 0.
    status, output = run(programs.path("mlp", "plain"), "gelu_special", type=dtype, gelu=kind)
    assert status == 0, output
    values = [tuple(map(float, line.split())) for line in output.splitlines()]
    at_minus_infinity, at_infinity, at_nan = values
    assert all(map(math.isnan, at_minus_infinity + at_nan))
    assert at_infinity[0] == math.inf
    assert math.isnan(at_infinity[1])


# --- the tests are right: the engine's own kernels, without and with a defect


@pytest.mark.parametrize("variant", ["plain", "asan", "race"])
@pytest.mark.parametrize("case", ["pipeline", "warp", "count"])
def test_engine(programs, case, variant):
    check(programs.path("engine", variant), case, defect="none")


@pytest.mark.parametrize("variant", ["plain", "asan", "race"])
@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_engine_tensor_cores(programs, dtype, variant):
    check(programs.path("engine", variant), "matrix", type=dtype)


@pytest.mark.parametrize("variant", ["plain", "asan", "race"])
def test_engine_matrix_fragments(programs, variant):
    check(programs.path("engine", variant), "fragments")


ENGINE_DEFECTS = [
    # the case, its defect, the variant that must find it, and what it must say
    ("pipeline", "no_wait", "plain", "wrong values"),
    ("pipeline", "no_barrier_after_wait", "plain", "wrong values"),
    ("pipeline", "no_barrier_after_wait", "race", "race: read after write: shared piece 0"),
    ("pipeline", "no_barrier_before_refill", "plain", "greedy schedule: "),
    ("pipeline", "no_barrier_before_refill", "race", "race: write after read: shared piece 0"),
    ("pipeline", "divergent_barrier", "plain", "divergent barrier: thread 0,0,0 at "),
    ("pipeline", "early_exit", "plain", "1 threads had exited when the others came to the barrier at "),
    ("pipeline", "shared_out_of_bounds", "asan", "heap-buffer-overflow"),
    ("pipeline", "shared_out_of_bounds", "race", "out of bounds: shared piece 0"),
    ("pipeline", "global_out_of_bounds", "asan", "heap-buffer-overflow"),
    ("pipeline", "global_out_of_bounds", "race", "out of bounds: x"),
    ("pipeline", "misaligned", "plain", "cp.async: misaligned"),
    ("pipeline", "too_much_shared", "plain", "bytes of dynamic shared memory, the launch gave"),
    ("warp", "no_syncwarp", "race", "race: read after write: shared piece 0"),
    ("warp", "unwritten", "plain", "nan, allowed error"),
    ("warp", "unwritten", "race", "read of unwritten shared memory"),
    ("warp", "not_in_mask", "plain", "the calling lane is not in its own mask"),
    ("warp", "outside_mask", "plain", "which is not in the mask or has exited"),
    ("count", "plain_add", "race", "race: "),
    ("count", "float_atomic", "plain", "not the same bits as the forward schedule"),
]


@pytest.mark.parametrize(("case", "defect", "variant", "message"), ENGINE_DEFECTS)
def test_engine_finds(programs, case, defect, variant, message):
    program = programs.path("engine", variant)
    done = subprocess.run(
        [program, case, f"defect={defect}"], capture_output=True, text=True, env={"ASAN_OPTIONS": "detect_leaks=0"}
    )
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


# --- and so are the kernels' tests: defects planted in a copy of the kernels


class Defect:
    """A program with `old` replaced by `new` in csrc/`file`, the case that must fail, and what must be said."""

    def __init__(self, file, old, new, kernel, shape, message, dtype="bfloat16", offset=0):
        element = {"bfloat16": "__nv_bfloat16", "float": "float"}[dtype]
        # With the race hooks every kind of defect can be found: wrong values, bounds, races, order.
        self.program = ("mlp", "race", ((file, old, new),), (f"-DONLY_TYPE={element}",))
        self.kernel, self.message = kernel, message
        self.options = {"type": dtype, "gelu": "none", "bias": "float", "offset": offset}
        self.options |= {"rows": shape[0], "columns": shape[1]}


FORWARD = ("mlp/kernels.cuh", "bias_gelu")
ROW_WALK = ("mlp/row_walk.cuh", "bias_gelu")
BLOCK_SUM = ("mlp/row_walk.cuh", "bias_gelu_backward")
COLUMN_SUM = ("common/column_sum.cuh", "bias_gelu_backward")


def planted(where, old, new, shape, message, **rest):
    return Defect(where[0], old, new, where[1], shape, message, **rest)


DEFECTS = {
    "forward-one-row-too-many": planted(
        ROW_WALK, "return rows_left_ > 0;", "return rows_left_ >= 0;", (2, 8), "out of bounds: x"
    ),
    "forward-columns-not-masked": planted(
        FORWARD, "  if (column >= params.columns) return;\n", "", (5, 2056), "out of bounds: bias"
    ),
    "forward-next-bias": planted(
        FORWARD,
        "load_parameter(bias, params.bias, column);\n\n",
        "load_parameter(bias, params.bias, column + 1);\n\n",
        (7, 96),
        "wrong values, first y[0]",
    ),
    "backward-no-barrier": planted(
        BLOCK_SUM, "  __syncthreads();\n", "", (49, 96), "race: read after write: shared piece 0"
    ),
    "backward-row-of-threads-lost": planted(
        BLOCK_SUM, "r < blockDim.y; ++r", "r + 1 < blockDim.y; ++r", (49, 96), "wrong values, first grad_bias[0]"
    ),
    "backward-last-step-not-masked": planted(
        BLOCK_SUM, "rows_left_ > last_of_step_;", "rows_left_ >= last_of_step_;", (256, 8), "out of bounds: "
    ),
    "column-sum-no-barrier": planted(
        COLUMN_SUM, "  __syncthreads();\n", "", (300, 96), "race: read after write: shared piece 0"
    ),
    "column-sum-row-lost": planted(
        COLUMN_SUM,
        "row = threadIdx.y; row",
        "row = threadIdx.y + 1; row",
        (300, 96),
        "wrong values, first grad_bias[0]",
    ),
    "column-sum-float-atomics": planted(
        COLUMN_SUM,
        "  tile[threadIdx.y * kPadded + threadIdx.x] = sum;\n  __syncthreads();\n",
        "  if (threadIdx.y == 0) tile[threadIdx.x] = 0;\n  __syncthreads();\n"
        "  atomicAdd(tile + threadIdx.x, sum);\n  __syncthreads();\n"
        "  if (threadIdx.y == 0 && column < columns) sums[column] = tile[threadIdx.x];\n  return;\n",
        (2900, 8),
        "not the same bits",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_is_found(programs, name):
    defect = DEFECTS[name]
    status, output = run(programs.path(*defect.program), defect.kernel, **defect.options)
    assert status == 1, f"the planted defect was not found:\n{output}"
    assert defect.message in output
