"""The depthwise convolution's CUDA kernels, executed on the CPU (see test_cuda_on_host.py): forward, the gradients of
the input and of the weights, against plain loops in double, in four schedules with the same bits.
"""

import pytest

import cuda_programs
from cuda_programs import check, run

PROGRAM = "depthwise_conv"
BYTES = {"float": 4, "half": 2, "bfloat16": 2, "double": 8}
DTYPES = list(BYTES)
PARAMETERS = ["float", "bfloat16", "half", "double"]
OPERATORS = ["forward", "input_grad", "weight_grad"]

# (n, c, h, w): the stages of a ConvNeXt, several images side by side and a group that is not full, tiles of wide
# images, ragged edges, single rows, columns and pixels, channels of less than a vector, a chunk, and between two.
TUNED = [
    *[(0, 8, 7, 7), (1, 8, 1, 1), (3, 40, 1, 1), (1, 96, 7, 7), (9, 32, 7, 7), (5, 40, 7, 7), (2, 768, 7, 7)],
    *[(3, 96, 14, 14), (5, 16, 14, 13), (2, 48, 28, 28), (1, 96, 56, 56), (1, 8, 57, 58), (2, 40, 13, 9)],
    *[(1, 96, 13, 9), (1, 16, 2, 57), (1, 8, 4, 224), (1, 8, 120, 3), (2, 24, 6, 8), (7, 8, 3, 2), (1, 80, 10, 15)],
    *[(1, 100, 13, 9), (3, 1, 7, 7), (2, 3, 13, 9)],
]
# The same with a kernel size and a stride.
SIMPLE = [
    *[(2, 40, 13, 9, 3, 1), (1, 96, 7, 7, 5, 1), (1, 8, 20, 3, 9, 1), (2, 33, 6, 5, 11, 1), (1, 1, 1, 1, 11, 2)],
    *[(2, 40, 13, 9, 7, 2), (1, 96, 8, 8, 3, 2), (2, 3, 9, 6, 5, 2), (1, 100, 5, 12, 9, 2), (0, 5, 3, 3, 3, 2)],
    *[(1, 70, 7, 10, 11, 2), (4, 8, 2, 1, 7, 2)],
]
SHAPES = [(*shape, 7, 1) for shape in TUNED] + SIMPLE
REDUCED = [(0, 8, 7, 7), (1, 8, 1, 1), (5, 16, 7, 7), (2, 40, 13, 9), (1, 8, 3, 60)]
REDUCED = [(*shape, 7, 1) for shape in REDUCED] + [(2, 33, 6, 5, 3, 2), (1, 3, 5, 4, 9, 1)]
assert len(SHAPES) >= 30


@pytest.fixture(scope="module")
def programs(request):
    wanted = [(PROGRAM, variant) for variant in cuda_programs.VARIANTS]
    yield from cuda_programs.provide(request, wanted + [mutant(*defect[:3]) for defect in DEFECTS.values()])


def options_of(operator, shape, dtype, number):
    """The case and the options that run `operator`; everything that can be chosen changes with `number`."""
    n, c, h, w, kernel, stride = shape
    residual = int(operator == "input_grad" and number % 3 != 0)
    # Autocast: a 16-bit gradient and a residual in fp32. The other pairs of types have no tuned kernel.
    result = [dtype, "float", "half"][number % 3] if residual and dtype != "double" else dtype
    aligned = int(number % 7 != 3)
    narrowest = min(BYTES[dtype], BYTES[result])
    tuned = kernel == 7 and stride == 1 and aligned and dtype != "double" and c * narrowest % 16 == 0
    tuned = tuned and result in (dtype, "float")
    options = {"n": n, "c": c, "h": h, "w": w, "kernel": kernel, "stride": stride, "type": dtype, "aligned": aligned}
    options |= {"drop": number % 3 - 1, "expect": "fma" if tuned else "simple", "version": "fma"}
    # Pieces of the rows that begin and end anywhere, and shared memory for two to eight warps.
    options |= {"multiprocessors": 1 + number % 3, "shared": [99, 64, 48][number % 3]}
    if operator == "weight_grad":
        return "weight_gradient", options
    options |= {"result": result, "residual": residual, "transposed": int(operator == "input_grad")}
    options |= {"extra": number % 2 if operator == "input_grad" and stride == 2 else 0}
    parameter = PARAMETERS[number % 4]
    bias = "none" if operator == "input_grad" or number % 5 == 0 else PARAMETERS[(number + 1) % 4]
    return "convolution", options | {"weight": parameter, "bias": bias, "nan": -1}


@pytest.mark.parametrize("index", range(len(SHAPES)), ids=lambda i: "x".join(map(str, SHAPES[i])))
@pytest.mark.parametrize("operator", OPERATORS)
def test_depthwise_conv(programs, operator, index):
    for dtype in [DTYPES[index % 3], "bfloat16" if index % 3 != 2 else "double"]:
        case, options = options_of(operator, SHAPES[index], dtype, index + DTYPES.index(dtype))
        check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_stage_shapes_in_every_dtype(programs, operator, dtype):
    for number, shape in enumerate([(3, 32, 14, 14, 7, 1), (2, 40, 9, 7, 7, 1), (2, 12, 5, 6, 5, 2)]):
        case, options = options_of(operator, shape, dtype, number + 12)
        check(programs.path(PROGRAM, "plain"), case, **options)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("variant", ["asan", "race"])
def test_depthwise_conv_bounds_and_races(programs, variant, operator):
    for index, shape in enumerate(REDUCED):
        for dtype in [DTYPES[index % 4], "bfloat16"]:
            case, options = options_of(operator, shape, dtype, index + DTYPES.index(dtype))
            check(programs.path(PROGRAM, variant), case, **options)


def test_depthwise_conv_plan(programs):
    """Thousands of shapes and chips: every row in one block, no block without work, limits kept."""
    check(programs.path(PROGRAM, "plain"), "plan")


# --- the tests are right: defects planted in a copy of the kernels, for bf16 and with race hooks, which find all kinds


def mutant(file, old, new):
    return PROGRAM, "race", ((f"depthwise_conv/{file}", old, new),), ("-DONLY_TYPE=__nv_bfloat16",)


CONVOLUTION, WEIGHT_GRADIENT = "kernels_convolution.cuh", "kernels_weight_gradient.cuh"
SHARED, SIMPLE_KERNELS = "kernels.cuh", "kernels_simple.cuh"
SMALL, STRIDED = (2, 8, 9, 9, 7, 1), (2, 8, 5, 4, 3, 2)

DEFECTS = {
    # name: (file, old, new, operator, shape, what must be said)
    "convolution-barrier-before-wait": (
        CONVOLUTION,
        "    copy_async_wait<0>();\n    __syncthreads();  // the stage",
        "    __syncthreads();\n    copy_async_wait<0>();  // the stage",
        "forward",
        SMALL,
        "race: ",
    ),
    "convolution-row-store-no-barrier": (
        CONVOLUTION,
        "    __syncwarp();\n#pragma unroll\n    for (int i = 0; i < kVectors",
        "#pragma unroll\n    for (int i = 0; i < kVectors",
        "forward",
        SMALL,
        "race: read after write: shared piece 1",
    ),
    "convolution-no-wait": (
        CONVOLUTION,
        "    copy_async_wait<0>();\n",
        "",
        "forward",
        SMALL,
        "wrong values, first y",
    ),
    "convolution-window-turned-too-far": (
        CONVOLUTION,
        "window_row(phase, kPadding - ky)",
        "window_row(phase + 1, kPadding - ky)",
        "forward",
        SMALL,
        "wrong values, first y",
    ),
    "convolution-dropped-samples-get-the-bias": (
        CONVOLUTION,
        "= live ? bias[0] : 0.0f;",
        "= bias[0];",
        "forward",
        SMALL,
        "wrong values, first y",
    ),
    "convolution-columns-not-masked": (
        CONVOLUTION,
        "lane < kStoreLanes && column < shape.width ?",
        "lane < kStoreLanes ?",
        "forward",
        (1, 8, 3, 4, 7, 1),
        "out of bounds: y",
    ),
    "copy-one-column-aside": (
        SHARED,
        "- image * pitch - halo;",
        "- image * pitch - halo + 1;",
        "forward",
        SMALL,
        "wrong values, first y",
    ),
    "copy-columns-not-masked": (
        SHARED,
        "column < shape.width &&",
        "column <= shape.width &&",
        "forward",
        (1, 8, 2, 4, 7, 1),
        "wrong values, first y",
    ),
    "weight-gradient-barrier-before-wait": (
        WEIGHT_GRADIENT,
        "    copy_async_wait<0>();\n    __syncthreads();  // the stage",
        "    __syncthreads();\n    copy_async_wait<0>();  // the stage",
        "weight_grad",
        SMALL,
        "race: ",
    ),
    "weight-gradient-row-left-out": (
        WEIGHT_GRADIENT,
        "if (phase >= first_pair)",
        "if (phase > first_pair)",
        "weight_grad",
        SMALL,
        "wrong values, first grad_weight",
    ),
    "weight-gradient-sums-no-barrier": (
        WEIGHT_GRADIENT,
        "= sums[i];\n  __syncthreads();\n",
        "= sums[i];\n",
        "weight_grad",
        SMALL,
        "race: read after write: shared piece 0",
    ),
    "sum-partials-no-barrier": (
        WEIGHT_GRADIENT,
        "+ threadIdx.x] = sum;\n  __syncthreads();\n",
        "+ threadIdx.x] = sum;\n",
        "weight_grad",
        STRIDED,
        "race: read after write: shared piece 0",
    ),
    "sum-partials-row-lost": (
        WEIGHT_GRADIENT,
        "int64_t row = threadIdx.y; row < rows",
        "int64_t row = threadIdx.y + 1; row < rows",
        "weight_grad",
        STRIDED,
        "wrong values, first grad_weight",
    ),
    "simple-convolution-no-barrier": (
        SIMPLE_KERNELS,
        "  __syncthreads();\n",
        "",
        "forward",
        STRIDED,
        "race: read after write: shared piece 0",
    ),
    "simple-one-row-too-many": (
        SIMPLE_KERNELS,
        "source >= 0 && source < size",
        "source >= 0 && source <= size",
        "forward",
        STRIDED,
        "wrong values, first y",
    ),
    "simple-weight-gradient-no-bias": (
        SIMPLE_KERNELS,
        "tap <= taps; tap += kSimpleWarps",
        "tap < taps; tap += kSimpleWarps",
        "weight_grad",
        STRIDED,
        "wrong values, first grad_bias[0]",
    ),
    "simple-weight-gradient-dropped-samples-read": (
        SIMPLE_KERNELS,
        "      if (!is_live(shape, params.sample_scale, sample)) continue;\n",
        "",
        "weight_grad",
        STRIDED,
        "nan",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_in_depthwise_conv_is_found(programs, name):
    file, old, new, operator, shape, message = DEFECTS[name]
    # Number 16 has a bias and aligned tensors.
    case, options = options_of(operator, shape, "bfloat16", 16)
    options |= {"drop": 1 if shape[0] > 1 else -1, "multiprocessors": 1}
    status, output = run(programs.path(*mutant(file, old, new)), case, **options)
    assert status == 1, f"the planted defect was not found:\n{output}"
    assert message in output
