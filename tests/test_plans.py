"""The launch plans of the CUDA kernels, through `_C`: for thousands of shapes on every architecture each result is
computed exactly once, no block is without work, and the chip's limits are kept, beyond 2^31 elements too.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convnext_kernels import native

bindings = native.load().bindings
pytestmark = pytest.mark.skipif(bindings is None, reason="the libraries come without bindings")
if bindings is not None:
    plans = bindings.plans
    depthwise_conv, mlp = plans.depthwise_conv, plans.mlp

ARCHITECTURES = [80, 86, 89, 90, 100, 120]
MOST_IN_GRID = 65535  # blocks along y
INT32 = 2**31 - 1
BLOCK_OVERHEAD = 1024  # shared memory the system takes of each block

examples = settings(max_examples=400, deadline=None)
architectures = st.sampled_from(ARCHITECTURES)
channel_counts = st.one_of(st.integers(1, 200), st.sampled_from([96, 192, 384, 768, 1536, 100, 3000, 2**24]))
sizes = st.one_of(st.integers(1, 80), st.integers(1, 5000))
batches = st.one_of(st.integers(0, 300), st.sampled_from([2**20, 2**31 - 1, 2**31, 2**33]))


def divide_up(a, b):
    return -(-a // b)


# --- chips


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_chip_of_architecture(architecture):
    chip = plans.chip_of_architecture(architecture)
    assert chip.multiprocessors > 0
    assert chip.threads_per_multiprocessor in (1536, 2048)
    # The overhead of a block that takes all it can get.
    assert chip.shared_bytes_per_multiprocessor - chip.shared_bytes_per_block == BLOCK_OVERHEAD
    assert chip.shared_bytes_per_block >= 99 * 1024


def test_unknown_architecture():
    with pytest.raises(ValueError, match="'compute_capability': expected 80, 86, 89, 90, 100 or 120, got 75"):
        plans.chip_of_architecture(75)


# --- depthwise convolution: the tuned kernels


def tile_kinds():
    return [depthwise_conv.Kind.CONVOLUTION, depthwise_conv.Kind.WEIGHT_GRADIENT]


def check_tile_limits(plan, kind, chip, samples, channels, height, width, element_bytes):
    chunk = depthwise_conv.CHANNELS_OF_A_CHUNK
    assert 1 <= plan.warps <= depthwise_conv.MOST_WARPS
    assert plan.warps == plan.strips * plan.images
    assert 0 < plan.shared_bytes <= chip.shared_bytes_per_block
    assert plan.shared_bytes >= 2 * plan.stage_elements(kind) * element_bytes
    assert plan.warps * 32 <= chip.threads_per_multiprocessor
    assert 1 <= plan.row_blocks <= MOST_IN_GRID and plan.chunks <= INT32
    # Every channel and every column once, and none beyond a whole chunk or tile.
    assert (plan.chunks - 1) * chunk < channels <= plan.chunks * chunk
    assert (plan.tiles - 1) * plan.columns < width <= plan.tiles * plan.columns
    assert plan.images == 1 or plan.tiles == 1
    assert plan.rows == divide_up(samples, plan.images) * plan.tiles * height
    assert plan.first_row(0) == 0 and plan.first_row(plan.row_blocks) == plan.rows


def check_pieces(plan):
    """Equal pieces, none of them empty: at both ends and in the middle."""
    piece = plan.rows // plan.row_blocks
    assert piece >= 1
    middle = plan.row_blocks // 2
    for block in {0, 1, middle, plan.row_blocks - 1} & set(range(plan.row_blocks)):
        assert piece <= plan.first_row(block + 1) - plan.first_row(block) <= piece + 1


@examples
@given(data=st.data(), architecture=architectures, samples=batches, channels=channel_counts)
def test_tile_plan(data, architecture, samples, channels):
    height, width = data.draw(sizes), data.draw(sizes)
    chip = plans.chip_of_architecture(architecture)
    for kind in tile_kinds():
        for element_bytes in (2, 4):
            plan = depthwise_conv.plan_tiles(kind, samples, channels, height, width, element_bytes, chip)
            if samples == 0:
                assert plan.row_blocks == 0
                continue
            check_tile_limits(plan, kind, chip, samples, channels, height, width, element_bytes)
            check_pieces(plan)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tile_plan_of_every_width(architecture):
    """What is near a limit of the chip is met for certain."""
    chip = plans.chip_of_architecture(architecture)
    for kind in tile_kinds():
        for element_bytes in (2, 4):
            for width in range(1, 260):
                for samples in (1, 2, 3, 5, 128):
                    shape = (samples, 64, 14, width, element_bytes)
                    plan = depthwise_conv.plan_tiles(kind, *shape, chip)
                    check_tile_limits(plan, kind, chip, *shape)


@settings(max_examples=150, deadline=None)
@given(
    architecture=architectures,
    samples=st.integers(1, 40),
    channels=st.sampled_from([8, 96, 768]),
    height=st.integers(1, 40),
    width=st.integers(1, 300),
    element_bytes=st.sampled_from([2, 4]),
    multiprocessors=st.integers(1, 200),
)
def test_stages_cover_every_row_once(architecture, samples, channels, height, width, element_bytes, multiprocessors):
    of = plans.chip_of_architecture(architecture)
    chip = plans.Chip(multiprocessors, of.shared_bytes_per_block, of.shared_bytes_per_multiprocessor)
    for kind in tile_kinds():
        plan = depthwise_conv.plan_tiles(kind, samples, channels, height, width, element_bytes, chip)
        computed = walk(plan, kind, samples)
        assert len(computed) == divide_up(samples, plan.images) * plan.tiles * height
        assert set(computed.values()) == {1}


def walk(plan, kind, samples):
    """How often each (first image, tile, row) is computed by the stages of all blocks."""
    computed = {}
    convolution = kind == depthwise_conv.Kind.CONVOLUTION
    for block in range(plan.row_blocks):
        segment, expected_step, rows = None, None, 0
        for stage in plan.stages(kind, block):
            assert 1 <= stage.steps <= 7
            if segment is None:  # a segment begins: some steps before its first row fill the window of seven rows
                segment = (stage.sample, stage.tile, stage.first, stage.end)
                assert 0 <= stage.sample < samples and stage.sample % plan.images == 0
                assert 0 <= stage.tile < plan.tiles and 0 <= stage.first < stage.end <= plan.height
                lead = 3 if convolution else 6
                expected_step = max(stage.first - lead, 0 if convolution else -3)
                for row in range(stage.first, stage.end):
                    key = (stage.sample, stage.tile, row)
                    computed[key] = computed.get(key, 0) + 1
                rows += stage.end - stage.first
            assert (stage.sample, stage.tile, stage.first, stage.end) == segment
            assert stage.step == expected_step
            expected_step += stage.steps
            if stage.last:
                # The row three below the last one completes it, or the image's edge does.
                assert expected_step == (min(stage.end + 3, plan.height) if convolution else stage.end)
                segment = None
        assert segment is None, "the last segment has no last stage"
        assert rows == plan.first_row(block + 1) - plan.first_row(block) > 0
    return computed


def test_blocks_outside_of_the_grid_are_refused():
    chip = plans.chip_of_architecture(90)
    plan = depthwise_conv.plan_tiles(depthwise_conv.Kind.CONVOLUTION, 1, 8, 7, 7, 2, chip)
    with pytest.raises(IndexError, match="argument 'block': expected 0 to"):
        plan.stages(depthwise_conv.Kind.CONVOLUTION, plan.row_blocks)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stage", [(96, 56), (192, 28), (384, 14), (768, 7), (128, 56), (1024, 7), (96, 96)], ids=str)
def test_resident_warps_in_the_usual_stages(stage, architecture):
    """In 16-bit modes two warps or more for each of a multiprocessor's four schedulers, and few idle."""
    channels, size = stage
    chip = plans.chip_of_architecture(architecture)
    for kind in tile_kinds():
        plan = depthwise_conv.plan_tiles(kind, 128, channels, size, size, 2, chip)
        blocks = chip.shared_bytes_per_multiprocessor // (plan.shared_bytes + BLOCK_OVERHEAD)
        warps = min(blocks * plan.warps, depthwise_conv.RESIDENT_WARPS)
        # The weight gradient stages two tensors, of which 100 KiB hold less.
        narrow = chip.shared_bytes_per_multiprocessor < 128 * 1024 and kind == depthwise_conv.Kind.WEIGHT_GRADIENT
        assert warps >= (5 if narrow else 8)
        assert plan.row_blocks * plan.chunks >= 0.75 * chip.multiprocessors


# --- depthwise convolution: the simple kernels, and the choice


@examples
@given(architecture=architectures, samples=batches, channels=channel_counts, height=sizes)
def test_simple_plan(architecture, samples, channels, height):
    chip = plans.chip_of_architecture(architecture)
    plan = depthwise_conv.plan_simple(samples, channels, height, chip)
    assert plan.rows == samples * height
    if samples == 0:
        assert plan.row_blocks == 0
        return
    chunk = depthwise_conv.CHANNELS_OF_A_CHUNK
    assert (plan.chunks - 1) * chunk < channels <= plan.chunks * chunk
    assert 1 <= plan.row_blocks <= min(MOST_IN_GRID, plan.rows)
    assert plan.first_row(0) == 0 and plan.first_row(plan.row_blocks) == plan.rows
    for block in {0, plan.row_blocks // 2, plan.row_blocks - 1}:
        assert plan.first_row(block) < plan.first_row(block + 1)


@given(
    kernel_size=st.sampled_from([3, 5, 7, 9, 11]),
    stride=st.sampled_from([1, 2]),
    channels=st.integers(1, 2000),
    element_bytes=st.sampled_from([2, 4, 8]),
    aligned=st.booleans(),
)
def test_tuned_kernels_get_whole_vectors(kernel_size, stride, channels, element_bytes, aligned):
    tuned = depthwise_conv.is_tuned(kernel_size, stride, channels, element_bytes, aligned)
    possible = (kernel_size, stride) == (7, 1) and element_bytes < 8 and aligned
    assert tuned == (possible and channels * element_bytes % 16 == 0)


# --- bias + GELU


@examples
@given(
    backward=st.booleans(),
    rows=st.one_of(st.integers(0, 5000), st.sampled_from([2**24, 2**31 - 1, 2**31, 2**40])),
    columns=st.one_of(st.integers(1, 5000), st.sampled_from([384, 1536, 3072, 12288, 2**26])),
    element_bytes=st.sampled_from([2, 4, 8]),
    aligned=st.booleans(),
    architecture=architectures,
)
def test_bias_gelu_plan(backward, rows, columns, element_bytes, aligned, architecture):
    chip = plans.chip_of_architecture(architecture)
    plan = mlp.plan_bias_gelu(backward, rows, columns, element_bytes, aligned, chip.multiprocessors)
    if rows == 0:
        assert plan.row_blocks == 0
        return
    tuning = mlp.bias_gelu_tuning(backward, element_bytes)
    threads = plan.block_columns * plan.block_rows
    assert 1 <= threads <= mlp.ROW_PASS_THREADS
    assert mlp.ROW_PASS_THREADS * tuning.blocks_per_sm <= chip.threads_per_multiprocessor
    assert 1 <= plan.row_blocks <= MOST_IN_GRID and 1 <= plan.column_blocks <= INT32
    vectorised = aligned and element_bytes < 8 and columns * element_bytes % 16 == 0
    assert plan.vector_size == (16 // element_bytes if vectorised else 1)
    # Every column once: whole vectors, the last block neither empty nor beyond need.
    vectors, rest = divmod(columns, plan.vector_size)
    assert rest == 0
    assert (plan.column_blocks - 1) * plan.block_columns < vectors <= plan.column_blocks * plan.block_columns
    # The grid steps over all rows; its last block begins before the end.
    assert (plan.row_blocks - 1) * plan.block_rows * tuning.thread_rows < rows
    # The sums of a block's columns.
    accumulation_bytes = 8 if element_bytes == 8 else 4
    assert threads * plan.vector_size * accumulation_bytes <= 48 * 1024


# --- the MLP's passes over rows, and its chunks


@examples
@given(
    data=st.data(),
    heavy=st.booleans(),
    groups=st.one_of(st.integers(0, 300), st.sampled_from([2**20])),
    rows=st.one_of(st.integers(0, 5000), st.sampled_from([2**24, 2**31])),
    columns=st.one_of(st.integers(1, 5000), st.sampled_from([384, 1536, 3072, 12288])),
    element_bytes=st.sampled_from([2, 4, 8]),
    aligned=st.booleans(),
    architecture=architectures,
)
def test_row_pass_plan(data, heavy, groups, rows, columns, element_bytes, aligned, architecture):
    chip = plans.chip_of_architecture(architecture)
    row_pass = data.draw(st.sampled_from(sorted(mlp.RowPass.__members__)))
    tuning = mlp.row_pass_tuning(mlp.RowPass.__members__[row_pass], heavy, element_bytes)
    vector_size = mlp.row_pass_vector_size(columns, element_bytes, aligned)
    plan = mlp.plan_row_pass(tuning, groups, rows, columns, vector_size, chip.multiprocessors)
    if groups == 0 or rows == 0:
        assert plan.row_blocks == 0
        return
    threads = plan.block_columns * plan.block_rows
    assert 1 <= threads <= mlp.ROW_PASS_THREADS
    assert mlp.ROW_PASS_THREADS * tuning.blocks_per_sm <= chip.threads_per_multiprocessor
    assert 1 <= plan.row_blocks <= MOST_IN_GRID
    vectors, rest = divmod(columns, plan.vector_size)
    assert rest == 0 and plan.vector_size == vector_size
    assert (plan.column_blocks - 1) * plan.block_columns < vectors <= plan.column_blocks * plan.block_columns
    assert (plan.row_blocks - 1) * plan.block_rows * tuning.thread_rows < rows


@examples
@given(
    rows=st.one_of(st.integers(0, 10**6), st.sampled_from([2**31, 2**40])),
    images=st.booleans(),
    unit=st.integers(1, 50176),
    row_bytes=st.integers(2, 200_000),
    image_bytes=st.integers(1, 100_000),
    call_bytes=st.one_of(st.just(0), st.integers(0, 2**29)),
    most_rows=st.sampled_from([1024, 65536, 2**31]),
)
def test_chunks_of_the_mlp(rows, images, unit, row_bytes, image_bytes, call_bytes, most_rows):
    if not images:
        unit, image_bytes = 1, 0
    rows -= rows % unit
    most_bytes = mlp.MAX_WORKSPACE_BYTES
    chunk = mlp.chunk_rows(rows, unit, row_bytes, image_bytes, call_bytes, most_bytes, most_rows)
    # Whole images; never more rows than there are, but one unit; the workspace is kept where more than the least fits.
    assert chunk >= unit and chunk % unit == 0
    assert chunk <= max(rows, unit)
    assert chunk <= max(most_rows, unit)
    least = unit if images else 1024
    used = call_bytes + chunk * row_bytes + chunk // unit * image_bytes
    assert used <= most_bytes or chunk <= least


# --- LayerNorm


@examples
@given(
    backward=st.booleans(),
    rows=st.one_of(st.integers(0, 5000), st.sampled_from([2**24, 2**31, 2**40])),
    channels=st.one_of(st.integers(1, 600), st.integers(1, 9000), st.sampled_from([96, 192, 384, 768, 1536])),
    bytes_=st.sampled_from([2, 4, 8]),
    other_bytes=st.sampled_from([2, 4, 8]),
    aligned=st.booleans(),
    architecture=architectures,
)
def test_layer_norm_plan(backward, rows, channels, bytes_, other_bytes, aligned, architecture):
    layer_norm = plans.layer_norm
    chip = plans.chip_of_architecture(architecture)
    make = layer_norm.plan_backward if backward else layer_norm.plan
    plan = make(rows, channels, bytes_, other_bytes, aligned, chip)
    if rows == 0:
        assert plan.blocks == 0
        return
    assert 32 <= plan.threads <= layer_norm.THREADS and plan.threads % 32 == 0
    assert 0 <= plan.shared_bytes <= chip.shared_bytes_per_block
    assert 1 <= plan.blocks <= INT32
    # The last block has rows.
    assert (plan.blocks - 1) * plan.block_rows < rows
    assert plan.vector_size == 1 or (aligned and channels % plan.vector_size == 0)
    if plan.vectors:
        assert layer_norm.has_kernel(backward, plan.vector_size, plan.vectors)
        # A row in its threads' registers, and lanes of one warp or whole warps hold it.
        assert plan.row_threads * plan.vectors * plan.vector_size >= channels
        assert plan.row_threads in (1, 2, 4, 8, 16) or plan.row_threads % 32 == 0
    else:
        assert plan.block_rows == 1
    assert plan.partial_rows == plan.sum_blocks
    assert (plan.sum_blocks >= 1) == backward and plan.sum_blocks <= min(rows, INT32)


# --- depthwise convolution on the tensor cores


@examples
@given(
    architecture=architectures,
    samples=batches,
    channels=channel_counts,
    height=sizes,
    width=sizes,
    staged_bytes=st.sampled_from([2, 4]),
    rounds=st.booleans(),
)
def test_tensor_plan(architecture, samples, channels, height, width, staged_bytes, rounds):
    chip = plans.chip_of_architecture(architecture)
    for kind in tile_kinds():
        # An input in fp32, in a convolution without a residual.
        input_bytes = 4 if rounds and kind == depthwise_conv.Kind.CONVOLUTION and staged_bytes == 2 else 2
        plan = depthwise_conv.plan_tensor(kind, samples, channels, height, width, staged_bytes, chip, input_bytes)
        assert plan.exists
        if samples == 0:
            assert plan.row_blocks == 0
            continue
        assert 0 < plan.shared_bytes <= chip.shared_bytes_per_block
        blocks = plan.resident_blocks
        assert blocks >= 1
        assert blocks * (plan.shared_bytes + BLOCK_OVERHEAD) <= chip.shared_bytes_per_multiprocessor
        chunk = depthwise_conv.CHANNELS_OF_A_TENSOR_CHUNK
        assert (plan.chunks - 1) * chunk < channels <= plan.chunks * chunk
        # Every row and column of every image in one patch, and no patch outside of them.
        assert (plan.row_patches - 1) * plan.rows < height <= plan.row_patches * plan.rows
        assert (plan.column_patches - 1) * plan.columns < width <= plan.column_patches * plan.columns
        assert plan.columns <= plan.blocks * 8 and plan.rows == plan.segments * plan.segment_rows
        assert plan.images * plan.segments <= 8
        assert plan.images == 1 or plan.row_patches == 1
        assert plan.patches == divide_up(samples, plan.images) * plan.row_patches * plan.column_patches
        assert 1 <= plan.row_blocks <= MOST_IN_GRID and plan.chunks <= INT32
        assert plan.first_patch(0) == 0 and plan.first_patch(plan.row_blocks) == plan.patches
        for block in {0, plan.row_blocks // 2, plan.row_blocks - 1}:
            assert plan.first_patch(block) < plan.first_patch(block + 1)
