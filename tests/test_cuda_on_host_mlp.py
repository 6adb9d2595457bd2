"""The passes of layer_norm_mlp around its matrix products, executed on the CPU (see test_cuda_on_host.py): each kernel
in every dtype against plain loops in double, in four schedules with the same bits; dropped samples hold NaN. And what
test_cuda_entries_on_host.py does not see of the entries that compose them: many chunks of rows.
"""

import re

import pytest

import cuda_programs
from cuda_entries import Entries
from cuda_programs import check, run

PROGRAM = "mlp_passes"
DTYPES = ["float", "half", "bfloat16", "double"]
PARAMETERS = ["float", "bfloat16", "half", "double"]

# (samples, rows of a sample, columns): no samples, single rows, columns and positions, every vector size and tail, rows
# of several blocks, the maps of ConvNeXt's last stages, more rows than the grid takes in one step.
SHAPES = [
    *[(0, 49, 96), (0, 1, 3), (1, 1, 1), (1, 1, 3), (1, 1, 8), (3, 1, 40), (5, 1, 96), (7, 1, 100), (2, 1, 384)],
    *[(1, 1, 3072), (1, 49, 1), (3, 49, 3), (2, 49, 8), (4, 49, 40), (3, 49, 96), (2, 49, 100), (2, 49, 384)],
    *[(1, 49, 3072), (1, 196, 1), (2, 196, 3), (3, 196, 8), (1, 196, 40), (2, 196, 96), (1, 196, 100), (1, 196, 384)],
    *[(40, 1, 8), (13, 2, 24), (6, 7, 33), (5, 9, 65), (4, 13, 48), (2, 5, 2056), (300, 1, 3), (3, 100, 7)],
]
REDUCED = [(0, 49, 8), (1, 1, 1), (3, 7, 40), (4, 9, 33), (5, 1, 96), (2, 25, 301), (3, 49, 8)]
assert len(SHAPES) >= 30


@pytest.fixture(scope="module")
def programs(request):
    wanted = [(PROGRAM, variant) for variant in cuda_programs.VARIANTS]
    for programs in cuda_programs.provide(request, wanted + [mutant(name) for name in DEFECTS], Entries):
        if sum(item.path == request.path for item in request.session.items) > 50:
            for edits in (SMALL_CHUNKS, *((*SMALL_CHUNKS, edit) for edit, _ in CHUNK_DEFECTS.values())):
                programs.start_library("plain", edits)
        yield programs


def rows_of(shape, number, whole_samples=False):
    """A chunk of rows: which samples are dropped, where it begins in the first one, alignment and chip change with
    `number`."""
    samples, sample_rows, columns = shape
    first = 0 if whole_samples else [0, sample_rows // 3, sample_rows - 1][number % 3] * (samples > 0)
    options = {"samples": samples, "sample_rows": sample_rows, "columns": columns, "first": first}
    return options | {"drop": number % 4 - 1, "offset": int(number % 5 == 4), "multiprocessors": 1 + number % 3}


def activation(shape, dtype, number):
    for grn in (0, 1):
        options = {"type": dtype, "gelu": ["none", "tanh"][(number + grn) % 2], "grn": grn}
        options |= {"bias": PARAMETERS[number % 4], "in_place": number % 2, "dropped": int(number % 4 == 2)}
        yield options | rows_of(shape, number, whole_samples=grn)


def activation_backward(shape, dtype, number):
    for grn in (0, 1):
        options = {"type": dtype, "gelu": ["none", "tanh"][(number + grn) % 2], "grn": grn}
        options |= {"bias": PARAMETERS[number % 4], "in_place": number % 2, "wants_y": int(number % 5 != 3)}
        yield options | {"partials": int(number % 7 != 5)} | rows_of(shape, number, whole_samples=grn)


def grn_sums(shape, dtype, number):
    for backward in (0, 1):
        options = {"type": dtype, "gelu": ["none", "tanh"][(number + backward) % 2], "backward": backward}
        yield options | rows_of(shape, number, whole_samples=True)


def grn_factors(shape, dtype, number):
    if dtype not in ("float", "double"):
        return
    for backward in (0, 1):
        options = {"type": dtype, "images": min(shape[0], 4), "parts": 1 + number % 6, "columns": shape[2]}
        yield options | {"weight": PARAMETERS[number % 4], "backward": backward}


def add_branch(shape, dtype, number):
    """The types of residual and result that have a kernel of their own, and the others."""
    if dtype == "double":
        pairs = [("double", "double", 0), ("none", "double", 0)]
    else:
        pairs = [(dtype, dtype, 1), ("float", "float", 1), (dtype, "float", 1), ("none", dtype, 1)]
        pairs += [("none", "float", 1), ("half" if dtype != "half" else "bfloat16", dtype, 0), ("bfloat16", "half", 0)]
    for residual, y, typed in (pairs[number % len(pairs)], pairs[(3 * number + 1) % len(pairs)]):
        if dtype != "double" and residual == "none":
            typed = int(y in (dtype, "float"))
        layer_scale = ["none", *PARAMETERS][number % 5]
        options = {"type": dtype, "residual": residual, "y": y, "layer_scale": layer_scale, "expect": typed}
        yield options | rows_of(shape, number)


def branch_grad(shape, dtype, number):
    grads = ["double"] if dtype == "double" else [dtype, "float", "half", "bfloat16"]
    for step in (0, 1):
        scaled, unscaled = [(1, 0), (0, 1), (1, 1)][(number + step) % 3]
        options = {"type": dtype, "grad": grads[(number + step) % len(grads)], "scaled": scaled, "unscaled": unscaled}
        options |= {"layer_scale": ["none", *PARAMETERS][number % 5], "partials": int(number % 4 != 3)}
        yield options | rows_of(shape, number)


def layer_scale(shape, dtype, number):
    channels, hidden = max(1, shape[0]), shape[2]
    options = {"type": dtype, "channels": channels, "hidden": hidden, "bias": ["none", *PARAMETERS][number % 5]}
    options |= {"layer_scale": PARAMETERS[number % 4], "weight": int(number % 3 != 1), "grad_bias": number % 2}
    options |= {"sums": int(number % 6 != 5), "grad_sums": int(number % 7 != 6), "grad_scale": int(number % 4 != 3)}
    yield options | {"offset": int(number % 5 == 4)}


def accumulate(shape, dtype, number):
    if dtype in ("float", "double"):
        count = max(1, shape[0]) * shape[1] * shape[2]
        yield {"type": dtype, "count": count, "multiprocessors": 1 + number % 3}


KERNELS = {
    function.__name__: function
    for function in (
        *(activation, activation_backward, grn_sums, grn_factors, add_branch, branch_grad, layer_scale, accumulate),
    )
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_pass(programs, kernel, dtype):
    for index, shape in enumerate(SHAPES):
        for options in KERNELS[kernel](shape, dtype, index + DTYPES.index(dtype)):
            check(programs.path(PROGRAM, "plain"), kernel, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", ["asan", "race"])
def test_pass_bounds_and_races(programs, variant, kernel, dtype):
    for index, shape in enumerate(REDUCED):
        for options in KERNELS[kernel](shape, dtype, index + DTYPES.index(dtype)):
            check(programs.path(PROGRAM, variant), kernel, **options)


def test_plans(programs):
    """Some 100,000 shapes and chips: every row in one part and one chunk, limits kept, samples found."""
    check(programs.path(PROGRAM, "plain"), "passes_plan")


# --- the tests are right: defects planted in a copy of the kernels


class Defect:
    """`old` replaced by `new` in csrc/`file`: what the case must say of it on bfloat16, or the type in `options`."""

    def __init__(self, file, old, new, case, shape, message, **options):
        self.edit = (file, old, new)
        self.case, self.message = case, message
        self.options = {"type": "bfloat16", "gelu": "none"} | options
        if shape:
            self.options |= {"samples": shape[0], "sample_rows": shape[1], "columns": shape[2], "first": 0, "offset": 0}
            self.options |= {"drop": options.get("drop", 1), "multiprocessors": 1}


HIDDEN, BRANCH, GRN, WEIGHTS = (f"mlp/kernels_{name}.cuh" for name in ("hidden", "branch", "grn", "weights"))
ACTIVATION = {"grn": 1, "bias": "float", "in_place": 0, "dropped": 0}
BACKWARD = {"grn": 1, "bias": "float", "in_place": 1, "wants_y": 1, "partials": 1}
ADD = {"residual": "bfloat16", "y": "bfloat16", "layer_scale": "float", "expect": 1}
GRAD = {"grad": "bfloat16", "layer_scale": "float", "scaled": 1, "unscaled": 1, "partials": 1}
FACTORS = {"type": "float", "images": 2, "parts": 3, "columns": 700, "weight": "float", "backward": 1}
SCALE = {
    "channels": 3,
    "hidden": 4200,
    "bias": "float",
    "layer_scale": "float",
    "weight": 1,
    "grad_bias": 1,
    "offset": 0,
}
SCALE |= {"sums": 1, "grad_sums": 1, "grad_scale": 1}

# Two of each kernel, which touch no other: one program holds the first of all, another the second.
DEFECTS = {
    "activation-columns-not-masked": Defect(
        *(HIDDEN, "  if (column >= params.rows.columns) return;\n", "", "activation", (2, 5, 2056)),
        "out of bounds: ",
        **ACTIVATION,
    ),
    "activation-dropped-image-gets-the-bias": Defect(
        *(HIDDEN, "live ? value[j] * factor[j] + bias[j] : A(0)", "value[j] * factor[j] + bias[j]"),
        *("activation", (3, 9, 40), "wrong values, first y["),
        **ACTIVATION,
    ),
    "activation-backward-sums-not-rounded": Defect(
        *(HIDDEN, "sum[j] += to_accumulation(rounded.element[j])", "sum[j] += gradient[j]"),
        *("activation_backward", (3, 9, 40), "wrong values, first partials["),
        **BACKWARD,
    ),
    "activation-backward-feedback-without-g": Defect(
        *(HIDDEN, "+ value[j] * feedback[j];", "+ feedback[j];", "activation_backward", (3, 9, 40)),
        "wrong values, first grad_x[",
        **BACKWARD,
    ),
    "grn-sums-next-row-of-partials": Defect(
        *(HIDDEN, "params.products + part)", "params.products + part + params.rows.columns)", "grn_sums", (3, 9, 40)),
        "out of bounds: products",
        backward=1,
    ),
    "grn-sums-next-image-dropped": Defect(
        *(HIDDEN, "static_cast<int>(block.group * params.", "static_cast<int>((block.group + 1) * params."),
        *("grn_sums", (4, 9, 40), "wrong values, first squares["),
        backward=0,
    ),
    "grn-factors-no-barrier": Defect(
        *(GRN, "  __syncthreads();\n", "", "grn_factors", None, "race: read after write: shared piece"), **FACTORS
    ),
    "grn-factors-division-by-zero": Defect(
        *(GRN, "norm == 0 ? A(0) : ", "", "grn_factors", None, "wrong values, first feedback["), **FACTORS
    ),
    "add-branch-columns-not-masked": Defect(
        *(BRANCH, "  if (column >= params.channels) return;\n", "", "add_branch", (2, 5, 2056), "out of bounds: "),
        **ADD,
    ),
    "add-branch-without-sample-scale": Defect(
        *(BRANCH, "value[j] * scale * layer_scale[j]", "value[j] * layer_scale[j]", "add_branch", (3, 9, 40)),
        "wrong values, first y[",
        **ADD,
    ),
    "branch-grad-sums-of-the-scaled": Defect(
        *(
            BRANCH,
            "if (!params.unscaled) rounded",
            "rounded",
            "branch_grad",
            (3, 9, 40),
            "wrong values, first partials[",
        ),
        **GRAD,
    ),
    "branch-grad-one-row-of-partials": Defect(
        *(BRANCH, "params.partials + blockIdx.y * params.channels", "params.partials", "branch_grad", (3, 49, 96)),
        "wrong values, first partials[",
        **GRAD,
    ),
    "layer-scale-no-barrier": Defect(
        *(WEIGHTS, "  __syncthreads();\n", "", "layer_scale", None, "race: read after write: shared piece"), **SCALE
    ),
    "layer-scale-columns-twice": Defect(
        *(WEIGHTS, "k += kWeightThreads * kVectorSize", "k += kWeightThreads", "layer_scale", None),
        "wrong values, first sums[",
        **SCALE,
    ),
    "accumulate-one-vector-too-many": Defect(
        *(WEIGHTS, "i < vectors", "i <= vectors", "accumulate", None, "out of bounds: x"),
        type="float",
        count=4096,
        multiprocessors=1,
    ),
    "accumulate-first-of-vector": Defect(
        *(WEIGHTS, "total[j] += value[j]", "total[j] += value[0]", "accumulate", None, "wrong values, first sum["),
        type="float",
        count=4096,
        multiprocessors=1,
    ),
}


def mutant(name):
    """The program that holds the defect: with the race hooks every kind can be found."""
    names = list(DEFECTS)
    edits = tuple(DEFECTS[other].edit for other in names[names.index(name) % 2 :: 2])
    return PROGRAM, "race", edits, ("-DONLY_TYPE=__nv_bfloat16",)


@pytest.mark.parametrize("name", DEFECTS)
def test_planted_defect_is_found(programs, name):
    defect = DEFECTS[name]
    status, output = run(programs.path(*mutant(name)), defect.case, **defect.options)
    assert status == 1, f"the planted defect was not found:\n{output}"
    assert defect.message in output


def test_every_kernel_has_two_defects():
    cases = [defect.case for defect in DEFECTS.values()]
    assert {kernel: cases.count(kernel) for kernel in KERNELS} == dict.fromkeys(KERNELS, 2)


# --- chunks: with no room for a workspace, they are as small as they can be: 1024 rows, or with GRN an image

SMALL_CHUNKS = tuple(
    (f"mlp/cuda_mlp_{name}.cu", "approximate, kMaxWorkspaceBytes", "approximate, 1") for name in ("forward", "backward")
)
CHUNK_TESTS = "several_chunks or (test_numerics and none and v2)"


def run_in_small_chunks(programs, tmp_path, expression, *edits):
    return programs.run_pytest(
        *("plain", tmp_path / "launches", "tests/test_mlp_cpu.py", "-k", expression), edits=(*SMALL_CHUNKS, *edits)
    )


def test_many_chunks(programs, tmp_path):
    done = run_in_small_chunks(programs, tmp_path, CHUNK_TESTS)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed >= 18
    launches = dict(map(str.split, (tmp_path / "launches").read_text().splitlines()))
    # In one chunk, a forward takes at most 6 launches, a backward at most 15.
    assert int(launches["layer_norm_mlp"]) > 2 * 6 * 2 * passed
    assert int(launches["layer_norm_mlp_backward"]) > 2 * 15 * 2 * passed


CHUNK_DEFECTS = {
    "only-the-last-chunk-counts": (
        ("mlp/cuda_mlp_backward.cu", "chunk.first > 0);", "false);"),
        "gradient of",
    ),
    "statistics-of-the-first-chunk": (
        ("mlp/cuda_mlp_backward.cu", "data_of<const A>(rstd_, chunk.first)", "data_of<const A>(rstd_, 0)"),
        "gradient of z",
    ),
    "residual-of-the-first-chunk": (
        (
            "mlp/cuda_mlp_forward.cu",
            "parameter_from(residual_, chunk.first * mlp_.channels)",
            "as_parameter(residual_)",
        ),
        "y: RMS error",
    ),
}


@pytest.mark.parametrize("name", CHUNK_DEFECTS)
def test_planted_defect_of_chunks_is_found(programs, tmp_path, name):
    edit, message = CHUNK_DEFECTS[name]
    done = run_in_small_chunks(programs, tmp_path, "several_chunks and bf16 and v2 or several_chunks and shape0", edit)
    assert done.returncode == 1, "the planted defect was not found"
    assert message in done.stdout
