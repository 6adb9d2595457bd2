"""Version 2 of the depthwise convolution's CUDA kernels, on the tensor cores, executed on the CPU (see
test_cuda_on_host.py): forward and the gradients of the input and of the weights against plain loops in double, in four
schedules with the same bits.
"""

import pytest

import cuda_programs
from cuda_programs import check, run

PROGRAM = "depthwise_conv"
DTYPES = ["bfloat16", "half"]
PARAMETERS = ["float", "bfloat16", "half", "double"]
OPERATORS = ["forward", "input_grad", "weight_grad"]

# (n, c, h, w): the stages of a ConvNeXt at 224 and 384 pixels, several images in a patch and a patch that is not full,
# patches cut short on both sides, halos on both sides, every number of blocks and segments, channels of half a chunk,
# single rows, columns and pixels.
SHAPES = [
    *[(0, 8, 7, 7), (1, 8, 1, 1), (9, 24, 1, 1), (1, 96, 7, 7), (9, 32, 7, 7), (5, 40, 7, 7), (1, 768, 7, 7)],
    *[(3, 32, 14, 14), (5, 16, 14, 13), (2, 24, 28, 28), (1, 16, 56, 56), (1, 8, 96, 96), (1, 8, 48, 48)],
    *[(1, 24, 24, 24), (5, 8, 12, 12), (1, 8, 57, 58), (2, 40, 13, 9), (1, 16, 2, 57), (1, 8, 4, 224), (1, 8, 120, 3)],
    *[(2, 24, 6, 8), (7, 8, 3, 2), (1, 40, 10, 15), (1, 8, 66, 17), (2, 8, 65, 16), (3, 8, 9, 33), (11, 8, 2, 5)],
    *[(1, 8, 70, 70), (4, 8, 17, 7), (2, 8, 34, 31), (1, 8, 1, 100), (1, 8, 100, 1)],
]
assert len(SHAPES) >= 30
REDUCED = [(0, 8, 7, 7), (1, 8, 1, 1), (5, 24, 7, 7), (3, 8, 13, 14), (1, 8, 34, 35)]


@pytest.fixture(scope="module")
def programs(request):
    wanted = [(PROGRAM, variant) for variant in cuda_programs.VARIANTS]
    yield from cuda_programs.provide(request, wanted + [mutant(*defect[:3]) for defect in DEFECTS.values()])


def options_of(operator, shape, dtype, number):
    """The case and the options that run `operator`; everything that can be chosen changes with `number`."""
    n, c, h, w = shape
    # A residual in the 16-bit type, or in fp32: autocast.
    residual = int(operator == "input_grad" and number % 3 != 0)
    result = "float" if residual and number % 3 == 1 else dtype
    options = {"n": n, "c": c, "h": h, "w": w, "kernel": 7, "stride": 1, "type": dtype, "aligned": 1}
    options |= {"drop": number % 4 - 1, "expect": "tensor", "version": "tensor"}
    # Blocks that begin anywhere in an image, and patches of eight segments and of fewer.
    options |= {"multiprocessors": 1 + number % 3, "shared": [163, 99, 48][number % 3]}
    if operator == "weight_grad":
        return "weight_gradient", options
    options |= {"result": result, "residual": residual, "transposed": int(operator == "input_grad"), "extra": 0}
    bias = "none" if operator == "input_grad" or number % 5 == 0 else PARAMETERS[(number + 1) % 4]
    return "convolution", options | {"weight": PARAMETERS[number % 4], "bias": bias, "nan": -1}


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
@pytest.mark.parametrize("operator", OPERATORS)
def test_depthwise_conv_on_tensor_cores(programs, operator, index):
    for number, dtype in enumerate(DTYPES):
        case, options = options_of(operator, SHAPES[index], dtype, index + number)
        check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("variant", ["asan", "race"])
def test_depthwise_conv_on_tensor_cores_bounds_and_races(programs, variant, operator):
    for index, shape in enumerate(REDUCED):
        for number in (index, index + 1):
            case, options = options_of(operator, shape, DTYPES[index % 2], number)
            check(programs.path(PROGRAM, variant), case, **options)


def rounding_options(shape, dtype, number):
    """Those of a convolution that rounds its input from fp32; weights, bias, drops and chips change with `number`."""
    case, options = options_of("forward", shape, dtype, number)
    assert case == "convolution"
    for name in ("result", "residual", "transposed", "extra", "expect"):
        del options[name]
    return "rounding_convolution", options | {"shared": [227, 163, 99][number % 3]}


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
def test_rounding_convolution_has_the_bits_of_two_passes(programs, index):
    for number, dtype in enumerate(DTYPES):
        case, options = rounding_options(SHAPES[index], dtype, index + number)
        check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("variant", ["asan", "race"])
def test_rounding_convolution_bounds_and_races(programs, variant):
    for index, shape in enumerate(REDUCED):
        for number in (index, index + 1):
            case, options = rounding_options(shape, DTYPES[index % 2], number)
            check(programs.path(PROGRAM, variant), case, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_convolution_keeps_a_nan(programs, dtype):
    case, options = rounding_options((3, 16, 7, 7), dtype, 0)
    check(programs.path(PROGRAM, "plain"), case, **options | {"nan": 40, "drop": 2})


@pytest.mark.parametrize("shape", [(3, 16, 7, 7), (2, 8, 14, 14), (1, 8, 30, 29)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_reaches_its_neighbours_only(programs, dtype, shape):
    n, c, h, w = shape
    for number in range(2):  # near the first corner, and in the middle of the last image
        position = (1 * w + 2) * c + 3 if number == 0 else ((n - 1) * h * w + h // 2 * w + w // 2) * c + 1
        case, options = options_of("forward", shape, dtype, number)
        check(programs.path(PROGRAM, "plain"), case, **options | {"nan": position, "drop": -1})


def test_the_plan_chooses_the_version(programs):
    case, options = options_of("forward", (2, 16, 14, 14), "bfloat16", 0)
    for shared, kernel in [(163, "tensor"), (99, "fma")]:
        chosen = {"version": "chosen", "shared": shared, "expect": kernel, "weight": "bfloat16"}
        check(programs.path(PROGRAM, "plain"), case, **options | chosen)


def test_tensor_plan(programs):
    """Thousands of shapes and chips: every result in one patch, no block without work, limits kept, no two rows of a
    matrix in the same banks of shared memory."""
    check(programs.path(PROGRAM, "plain"), "tensor_plan")


# --- the tests are right: defects planted in a copy of the kernels, for bf16 and with race hooks, which find all kinds


def mutant(file, old, new):
    return PROGRAM, "race", ((f"depthwise_conv/{file}", old, new),), ("-DONLY_TYPE=__nv_bfloat16",)


CONVOLUTION, SHARED = "kernels_tensor_convolution.cuh", "kernels_tensor.cuh"
WEIGHT_GRADIENT = "kernels_tensor_weight_gradient.cuh"
SMALL, ROWS = (3, 8, 7, 7), (1, 8, 70, 33)

DEFECTS = {
    # name: (file, old, new, operator, shape, what must be said)
    "barrier-before-wait": (
        CONVOLUTION,
        "    copy_async_wait<0>();\n    __syncthreads();  // the copies",
        "    __syncthreads();\n    copy_async_wait<0>();  // the copies",
        "forward",
        SMALL,
        "race: ",
    ),
    "copies-overwritten-while-read": (
        CONVOLUTION,
        "    __syncthreads();  // the planes are here, and nobody reads the copies any more\n",
        "",
        "forward",
        ROWS,
        "race: ",
    ),
    "results-before-the-plane-is-read": (
        CONVOLUTION,
        "      __syncwarp();  // nobody reads the plane any more",
        "      // nobody reads the plane any more",
        "input_grad",
        SMALL,
        "race: write after read: shared piece 0",
    ),
    "results-not-awaited": (
        CONVOLUTION,
        "    __syncthreads();  // the results are here\n",
        "",
        "forward",
        SMALL,
        "race: ",
    ),
    "rows-of-weights-swapped": (
        CONVOLUTION,
        "const int ky = 2 * step + i / 2 - i % 2;",
        "const int ky = 2 * step - i / 2 + i % 2;",
        "forward",
        SMALL,
        "wrong values, first y",
    ),
    "filter-one-column-aside": (
        CONVOLUTION,
        "first >= -1 ? first + 1 : first + 9)",
        "first >= -1 ? first + 1 : first + 8)",
        "forward",
        SMALL,
        "wrong values, first y",
    ),
    "columns-not-masked": (
        CONVOLUTION,
        "if (column + 1 < columns)",
        "if (column + 1 <= columns)",
        "forward",
        (1, 8, 1, 5),
        "out of bounds: y",
    ),
    "dropped-samples-get-the-bias": (
        CONVOLUTION,
        "const bool is_zero = !(live >> image & 1);",
        "const bool is_zero = !live;",
        "forward",
        SMALL,
        "wrong values, first y",
    ),
    "nan-spreads": (
        CONVOLUTION,
        "__any_sync(kFullWarp, zero_or_nan != 0)",
        "__any_sync(kFullWarp, zero_or_nan > 0)",
        "forward",
        SMALL,
        "nan",
    ),
    "residual-left-out": (
        CONVOLUTION,
        " + to_accumulation(residuals.element[l])",
        "",
        "input_grad",
        SMALL,
        "wrong values, first y",
    ),
    "halo-not-copied": (
        SHARED,
        "top(max(patch.row - halo, 0))",
        "top(max(patch.row - halo + 1, 0))",
        "forward",
        ROWS,
        "wrong values, first y",
    ),
    "zeros-left-out": (
        SHARED,
        "row >= above && row < above + copied_rows;",
        "row >= above;",
        "forward",
        SMALL,
        "read of unwritten shared memory: shared piece 1",
    ),
    "patch-of-another-image": (
        SHARED,
        "  sample += plan.images;\n",
        "  ++sample;\n",
        "forward",
        (40, 8, 7, 7),
        "wrong values, first y",
    ),
    "copy-of-the-halo": (
        SHARED,
        "row >= plan.rows || column < 0",
        "row > plan.rows || column < 0",
        "rounding",
        ROWS,
        "race: ",
    ),
    "copy-of-dropped-samples-left-out": (
        SHARED,
        "if constexpr (Pixels::kRounds) copied_images = pixels.existing;",
        "if constexpr (Pixels::kRounds) copied_images = pixels.existing & live;",
        "rounding",
        SMALL,
        "x_copy",
    ),
    "rounded-channels-swapped": (
        SHARED,
        "const uint4 low = at[0], high = at[column & 4 ? -1 : 1];",
        "const uint4 low = at[0], high = at[1];",
        "rounding",
        SMALL,
        "wrong values, first y",
    ),
    "gradient-barrier-before-wait": (
        WEIGHT_GRADIENT,
        "    copy_async_wait<0>();\n    __syncthreads();  // the copies",
        "    __syncthreads();\n    copy_async_wait<0>();  // the copies",
        "weight_grad",
        SMALL,
        "race: ",
    ),
    "gradient-planes-not-awaited": (
        WEIGHT_GRADIENT,
        "    __syncthreads();  // the planes are here, and nobody reads the copies any more\n",
        "",
        "weight_grad",
        SMALL,
        "race: ",
    ),
    "gradient-segments-counted-twice": (
        WEIGHT_GRADIENT,
        "matrix[i] &= exists;",
        "matrix[i] &= exists | ~0u;",
        "weight_grad",
        SMALL,
        "wrong values, first grad_weight",
    ),
    "gradient-rows-of-two-segments": (
        WEIGHT_GRADIENT,
        "(apart ? second : 0)",
        "(apart ? 0 : 0)",
        "weight_grad",
        SMALL,
        "wrong values, first grad_weight",
    ),
    "gradient-second-block-left-out": (
        WEIGHT_GRADIENT,
        "multiply_add<T>(sums[q][1], gradient[step], next);",
        "multiply_add<T>(sums[q][1], gradient[step], first);",
        "weight_grad",
        SMALL,
        "wrong values, first grad_weight",
    ),
    "gradient-sums-not-awaited": (
        WEIGHT_GRADIENT,
        "    __syncwarp();\n    if (lane < kSize) {",
        "    if (lane < kSize) {",
        "weight_grad",
        SMALL,
        "race: read after write: shared piece 0",
    ),
    "gradient-one-diagonal-aside": (
        WEIGHT_GRADIENT,
        "scratch[column * kRow + column + lane]",
        "scratch[column * kRow + column + lane + 1]",
        "weight_grad",
        SMALL,
        "wrong values, first grad_weight",
    ),
    "gradient-bias-without-second-rows": (
        WEIGHT_GRADIENT,
        "float sum = bias[0] + bias[2];",
        "float sum = bias[0];",
        "weight_grad",
        SMALL,
        "wrong values, first grad_bias",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_in_tensor_kernels_is_found(programs, name):
    file, old, new, operator, shape, message = DEFECTS[name]
    # Number 16 has a bias and a residual in fp32, which a program for one type lacks.
    if operator == "rounding":
        case, options = rounding_options(shape, "bfloat16", 16)
    else:
        case, options = options_of(operator, shape, "bfloat16", 16)
    options |= {"result": "bfloat16", "drop": 1 if shape[0] > 1 else -1, "multiprocessors": 1}
    if name == "nan-spreads":
        options |= {"nan": 0}
    status, output = run(programs.path(*mutant(file, old, new)), case, **options)
    assert status == 1, f"the planted defect was not found:\n{output}"
    assert message in output
