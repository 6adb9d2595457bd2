"""layer_norm's CUDA kernels, executed on the CPU (see test_cuda_on_host.py): forward, normalisation with given
statistics and backward, against plain loops in double, in four schedules with the same bits.
"""

import pytest

import cuda_programs
from cuda_programs import check, run

PROGRAM = "layer_norm"
KERNELS = ["forward", "normalise", "backward"]
# The types of x, and of y or its gradient.
TYPES = [
    ("bfloat16", "bfloat16"),
    ("float", "float"),
    ("half", "half"),
    ("float", "bfloat16"),
    ("bfloat16", "float"),
    ("float", "half"),
    ("half", "float"),
    ("double", "double"),
]
PARAMETERS = ["float", "bfloat16", "none", "half", "double"]

# (rows, channels): nothing to do, single rows and channels, rows of one lane to whole warps, every vector size and
# tail, several steps of a block and several blocks, and rows too long for registers.
SHAPES = [
    *[(0, 96), (1, 1), (70, 1), (5, 3), (1, 7), (300, 8), (2, 8), (33, 12), (1, 40), (131, 40), (7, 33), (65, 48)],
    *[(9, 80), (1, 96), (64, 96), (150, 96), (401, 96), (17, 100), (66, 100), (31, 192), (5, 256), (9, 257), (2, 320)],
    *[(35, 320), (17, 384), (3, 512), (11, 768), (3, 1000), (5, 1024), (3, 1536), (7, 1536), (1, 2816), (2, 3072)],
    *[(1, 4096), (3, 4096), (2, 4095), (1, 5000), (2, 4099), (1, 8200)],
]
REDUCED = [(0, 8), (1, 1), (70, 3), (37, 40), (35, 96), (5, 100), (3, 520), (2, 1023), (2, 4099)]
assert len(SHAPES) >= 30


def few(variant):
    """The program with two pairs of types, which is enough for bounds and races."""
    return PROGRAM, variant, (), ("-DFEW_TYPES",)


@pytest.fixture(scope="module")
def programs(request):
    wanted = [(PROGRAM, "plain"), few("asan"), few("race")]
    yield from cuda_programs.provide(request, wanted + [mutant(*defect[:3]) for defect in DEFECTS.values()])


def options_of(kernel, shape, types, number, data="normal"):
    """The case and the options that run `kernel`; everything that can be chosen changes with `number`."""
    options = {"rows": shape[0], "channels": shape[1], "type": types[0], "other": types[1], "data": data}
    options |= {"weight": PARAMETERS[number % 5], "bias": PARAMETERS[(number + 1 + number // 5) % 5]}
    # Samples of 1, 5 or many rows, of which the first row is not always the first of its sample.
    options |= {"offset": int(number % 4 == 1), "sample_rows": [0, 5, 1, 49][number % 4]}
    options |= {"first_row": [0, 3, 52][number % 3], "multiprocessors": 1 + number % 3, "shared": [99, 227][number % 2]}
    if kernel == "backward":
        return "layer_norm_backward", options | {
            "wanted": 7 if number % 3 else 1 + number % 7,
            "chunks": 1 + number % 2,
        }
    return "layer_norm", options | {"given": int(kernel == "normalise")}


# --- the kernels are right


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: f"{SHAPES[i][0]}x{SHAPES[i][1]}")
@pytest.mark.parametrize("kernel", KERNELS)
def test_layer_norm(programs, kernel, index):
    for number in (index, index + 3):
        case, options = options_of(kernel, SHAPES[index], TYPES[number % len(TYPES)], number)
        check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("kernel", KERNELS)
def test_layer_norm_in_all_types(programs, kernel, types):
    for number, shape in enumerate([(67, 96), (9, 100), (5, 640), (3, 75), (2, 2048), (1, 4099)]):
        case, options = options_of(kernel, shape, types, number + TYPES.index(types))
        check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", ["asan", "race"])
def test_layer_norm_bounds_and_races(programs, variant, kernel):
    for index, shape in enumerate(REDUCED):
        for types in [("bfloat16", "bfloat16"), ("float", "bfloat16")][: 1 + index % 2]:
            case, options = options_of(kernel, shape, types, index)
            check(programs.path(*few(variant)), case, **options)


@pytest.mark.parametrize("shape", [(35, 96), (3, 1536), (5, 99), (2, 4099)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_large_mean_costs_no_digits(programs, kernel, shape):
    """Mean 10,000 and deviation 1 in fp32: E[x^2] - E[x]^2 would be wrong by several times the variance."""
    case, options = options_of(kernel, shape, ("float", "float"), 4, data="offset")
    check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("shape", [(35, 96), (3, 768), (5, 99), (2, 4099)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kernel", KERNELS)
def test_large_half_precision_stays_finite(programs, kernel, shape):
    case, options = options_of(kernel, shape, ("half", "half"), 4, data="large")
    check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("types", [("float", "float"), ("bfloat16", "bfloat16"), ("half", "float")], ids="-".join)
@pytest.mark.parametrize("shape", [(35, 96), (5, 1536), (7, 99), (3, 4099)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_non_finite_values_spoil_their_rows_only(programs, shape, types):
    case, options = options_of("forward", shape, types, 4, data="non_finite")
    check(programs.path(PROGRAM, "plain"), case, **options)


def test_layer_norm_plan(programs):
    """Some 60,000 shapes and chips: a slot for every element, no block without rows, limits kept."""
    check(programs.path(PROGRAM, "plain"), "plan")


# --- the tests are right: defects planted in a copy of the kernels, for bf16 and with race hooks, which find all kinds


def mutant(file, old, new):
    return PROGRAM, "race", ((f"layer_norm/{file}", old, new),), ("-DONLY_TYPE=__nv_bfloat16",)


HELD, LONG = "kernels.cuh", "kernels_long.cuh"

DEFECTS = {
    # name: (file, old, new, kernel, shape, what must be said)
    "row-sums-no-barrier": (
        HELD,
        "  }\n  __syncthreads();\n#pragma unroll\n  for (int i = 0; i < kValues; ++i) values[i] = 0;",
        "  }\n#pragma unroll\n  for (int i = 0; i < kValues; ++i) values[i] = 0;",
        "forward",
        (3, 1536),
        "race: read after write: shared piece 2",
    ),
    "row-sums-one-shuffle-too-few": (
        HELD,
        "for (int step = threads / 2; step > 0; step /= 2) {",
        "for (int step = threads / 2; step > 1; step /= 2) {",
        "forward",
        (35, 96),
        "wrong values, first mean[0]",
    ),
    "row-sums-in-one-buffer": (
        HELD,
        "      std::swap(sums_now, sums_next);\n",
        "",
        "backward",
        (9, 1536),
        "race: write after read: shared piece 1",
    ),
    "variance-counts-missing-vectors": (
        HELD,
        "const A origin = slots.has(j) ? mean : A(0);",
        "const A origin = mean;",
        "forward",
        (9, 40),
        "wrong values, first rstd[0]",
    ),
    "one-vector-too-many": (
        HELD,
        "return j * static_cast<int>(blockDim.x) < left;",
        "return j * static_cast<int>(blockDim.x) <= left;",
        "forward",
        (9, 40),
        "out of bounds: x",
    ),
    "dropped-rows-not-written": (
        HELD,
        "if (!live && row < params.rows) {",
        "if (!live && row + 35 < params.rows) {",
        "forward",
        (35, 96),
        "wrong values, first y[480]",
    ),
    "dropped-rows-are-read": (
        HELD,
        "    const bool live = row < params.rows && samples.has(static_cast<int>(row));\n    mean = 0",
        "    const bool live = row < params.rows;\n    mean = 0",
        "backward",
        (35, 96),
        "wrong values, first grad_x",
    ),
    "block-sums-no-barrier": (
        HELD,
        "    __syncthreads();\n    for (int c = thread_of_block(); c < channels;",
        "    for (int c = thread_of_block(); c < channels;",
        "backward",
        (35, 96),
        "race: read after write: shared piece 3",
    ),
    "long-row-no-barrier": (
        LONG,
        "= moments;\n  __syncthreads();\n",
        "= moments;\n",
        "forward",
        (3, 4099),
        "race: read after write: shared piece 0",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_in_layer_norm_is_found(programs, name):
    file, old, new, kernel, shape, message = DEFECTS[name]
    case, options = options_of(kernel, shape, ("bfloat16", "bfloat16"), 0)
    options |= {"weight": "float", "bias": "float", "multiprocessors": 1}
    if kernel == "backward":
        options |= {"wanted": 7, "chunks": 1}
    if "dropped" in name:
        options |= {"sample_rows": 5}
    status, output = run(programs.path(*mutant(file, old, new)), case, **options)
    assert status == 1, f"the planted defect was not found:\n{output}"
    assert message in output
