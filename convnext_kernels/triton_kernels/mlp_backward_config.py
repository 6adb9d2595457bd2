"""The tiles of layer_norm_mlp's backward: defaults, and what tuning tries. None has been timed on a GPU; each default
compiles without stack on its chips, or with as much as is said (tests/test_triton_mlp_backward.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import config, launch

__all__ = ["MOST_ROW_COLUMNS", "WORKSPACE_BYTES", "weight_splits"]

#: The most columns that a product with LayerNorm's backward in its epilogue holds: the pieces of a row together.
MOST_ROW_COLUMNS = 256

#: What the buffers of a chunk and the parts may take together; with GRN at least one image's rows, whatever they take.
WORKSPACE_BYTES = 256 << 20


def _asynchronous(problem: config.Problem) -> bool:
    """Whether products read their operands from shared memory (wgmma, tcgen05): more registers are left for sums."""
    return 90 <= problem.chip < 120


def _stages(problem: config.Problem, stage_bytes: int, most: int = 3) -> int:
    """num_stages for as many buffers of `stage_bytes` as fit the chip, at most `most`."""
    buffers = (launch.chip_of_architecture(problem.chip).shared_bytes - 4096) // stage_bytes
    # mma.sync's operands go through registers: Triton keeps a buffer less than there are stages.
    return max(1, min(most, buffers)) + (not _asynchronous(problem))


def _hidden(m: int, n: int, c: int, warps: int, stages: int, programs: int = 1) -> config.Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_C": c, "GROUP": 8, "PROGRAMS": programs}
    return config.Config(blocks, num_warps=warps, num_stages=stages)


def _hidden_default(problem: config.Problem, block_n: int = 128, grn: bool = False) -> config.Config:
    if problem.dtype.itemsize == 4:  # products of fp32 run on the fp32 units, out of registers
        return _hidden(64, 64, 16, 8, 2)
    block_m, block_c = 128, 64 if problem.channels % 64 == 0 else 32
    if problem.channels % block_c:  # masks along C take registers too
        block_n = 64
    if not _asynchronous(problem):
        block_m, block_n, block_c = 64, 128, 32
    # Two blocks share a multiprocessor, so that GELU in one runs under the products of the other. Some registers wait
    # for the second product on the stack, which adds up to 10 % to the bytes that a block reads, with GRN 5 to 55. GRN
    # in fp16 has fp32 summands, and two blocks not the shared memory for them. Without GRN C = 128 and what is no
    # multiple of 64 would add 70 to 130 %.
    two = problem.dtype == torch.bfloat16 if grn else problem.channels > 128 and block_c == 64
    programs = 2 if problem.chip == 90 and block_n == 128 and two else 1
    stages = _stages(problem, 2 * programs * (block_m + block_n) * block_c)
    return _hidden(block_m, block_n, block_c, 8, stages, programs)


def _weight_default(problem: config.Problem) -> config.Config:
    if problem.dtype.itemsize == 4:
        blocks = {"BLOCK_P": 64, "BLOCK_Q0": 64, "BLOCK_Q1": 0, "BLOCK_R": 32}
        return config.Config(blocks, num_warps=8, num_stages=2)
    q0, q1 = launch.column_pieces(problem.channels)
    if q0 + q1 > (192 if _asynchronous(problem) else 128):
        # A wide tile reads fewer bytes of the L2 for a product; 192 divides a ConvNeXt's 384 and 768.
        wide = ((128, 64), (256, 0)) if _asynchronous(problem) else ()
        tiles = (*wide, (128, 0), (64, 32), (64, 0))
        q0, q1 = next((tile for tile in tiles if problem.channels % sum(tile) == 0), tiles[-1])
    # From sm_100 on ptxas makes narrow tiles of 128 rows spill, for occupancy.
    p = 64 if problem.chip >= 100 and q0 + q1 < 64 else 128
    # mma.sync has a wide tile's operands in registers too, and dh twice where its sums are made.
    r = 32 if not _asynchronous(problem) and q0 + q1 > 96 else 64
    blocks = {"BLOCK_P": p, "BLOCK_Q0": q0, "BLOCK_Q1": q1, "BLOCK_R": r}
    return config.Config(blocks, num_warps=8, num_stages=_stages(problem, 2 * r * (p + q0 + q1)))


def _norm_default(problem: config.Problem) -> config.Config:
    if problem.dtype.itemsize == 4:
        return config.Config({"BLOCK_M": 32, "BLOCK_K": 16}, num_warps=8, num_stages=2)
    columns = sum(launch.column_pieces(problem.channels))
    # A tile of M rows does M FLOP for a byte of W1 out of the L2, and 64 rows may wait for it; 128 rows of 192 columns
    # compile without stack for bf16 on sm_90, but not everywhere.
    rows = 128 if columns <= 128 else 64
    block_k = 64 if _asynchronous(problem) else 32
    stages = _stages(problem, 2 * block_k * (rows + columns))
    return config.Config({"BLOCK_M": rows, "BLOCK_K": block_k}, num_warps=8, num_stages=stages)


def _form_default(problem: config.Problem) -> config.Config:
    # Up to 128 channels memory bounds the backward pass: reading dh once less is 8 C of some 58 C bytes a row. Beyond,
    # the tensor cores do, for which rows * columns tiles that fit the registers beside h and dg are small.
    fused = problem.dtype.itemsize == 2 and sum(launch.column_pieces(problem.channels)) <= 128
    return config.Config({"FUSED": int(fused)})


def _form_candidates(problem: config.Problem) -> Iterator[config.Config]:
    yield config.Config({"FUSED": 0})
    if problem.dtype.itemsize == 2 and sum(launch.column_pieces(problem.channels)) <= MOST_ROW_COLUMNS:
        yield config.Config({"FUSED": 1})


def _rows_default(problem: config.Problem) -> config.Config:
    columns = sum(launch.column_pieces(problem.channels))
    if problem.chip == 90 and columns <= 96 and problem.channels % 32 == 0:
        # A block waits for its products, its barriers and its rows in turn: three small ones wait for one another less
        # than the warps of a large one, and read the weights twice as often.
        return config.of_rows(64, 32, warps=4, stages=2, programs=3)
    rows, block_k = (128 if _asynchronous(problem) and columns <= 128 else 64), 64
    # Masks along C take registers too, and on sm_100 so does the copy of sums out of tensor memory.
    if problem.chip != 90 or problem.channels % 32:
        block_k = 32
    # hat and u take shared memory beside the buffers of both weights.
    spare = launch.chip_of_architecture(problem.chip).shared_bytes - 4 * rows * columns - 8192
    stages = max(1, min(2, spare // (4 * block_k * columns)))
    return config.of_rows(rows, block_k, warps=8, stages=stages)


def _rows_candidates(problem: config.Problem) -> Iterator[config.Config]:
    for m, k, warps in ((128, 64, 8), (128, 32, 8), (64, 64, 8), (64, 64, 4), (64, 32, 8), (64, 32, 4)):
        for stages in (1, 2, 3):
            yield config.of_rows(m, k, warps, stages)
    for m, k, warps, programs in ((64, 32, 4, 3), (64, 64, 4, 3), (128, 32, 8, 2)):
        yield config.of_rows(m, k, warps, 2, programs)


def _input_default(problem: config.Problem) -> config.Config:
    if problem.dtype.itemsize == 4:
        return config.Config({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "GROUP": 8}, num_warps=8, num_stages=2)
    # One large tile a multiprocessor where there are rows enough for that, as in fc2_kernel.
    wide = _asynchronous(problem) and problem.channels % 256 == 0 and problem.rows > 8192
    blocks = {"BLOCK_M": 128, "BLOCK_N": 256 if wide else 128, "BLOCK_K": 64, "GROUP": 8}
    return config.Config(blocks, num_warps=8, num_stages=_stages(problem, 2 * 64 * (128 + blocks["BLOCK_N"])))


def _hidden_candidates(problem: config.Problem) -> Iterator[config.Config]:
    if problem.dtype.itemsize == 4:
        return
    for m, n, warps in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 8), (64, 128, 4), (64, 64, 4)):
        for c in (32, 64):
            for stages in (2, 3, 4):
                yield _hidden(m, n, c, warps, stages)
    for c, stages in ((64, 3), (64, 2), (32, 5)):
        yield _hidden(128, 128, c, 8, stages, 2)


def _weight_candidates(problem: config.Problem) -> Iterator[config.Config]:
    if problem.dtype.itemsize == 4:
        return
    pieces = launch.column_pieces(problem.channels)
    for q0, q1 in dict.fromkeys([pieces, (256, 0), (128, 64), (128, 0), (64, 32), (64, 0)]):
        if q0 + q1 > 256 or q0 > 2 * pieces[0]:
            continue
        for p, r, warps in ((128, 64, 8), (128, 32, 8), (128, 64, 4), (64, 64, 4)):
            for stages in (2, 3, 4):
                blocks = {"BLOCK_P": p, "BLOCK_Q0": q0, "BLOCK_Q1": q1, "BLOCK_R": r}
                yield config.Config(blocks, num_warps=warps, num_stages=stages)


def _norm_candidates(problem: config.Problem) -> Iterator[config.Config]:
    if problem.dtype.itemsize == 4:
        return
    for m, k, warps in ((128, 64, 8), (64, 64, 8), (64, 64, 4), (64, 32, 8), (128, 32, 8)):
        for stages in (2, 3, 4):
            yield config.Config({"BLOCK_M": m, "BLOCK_K": k}, num_warps=warps, num_stages=stages)


def _input_candidates(problem: config.Problem) -> Iterator[config.Config]:
    if problem.dtype.itemsize == 4:
        return
    for m, n, k, warps in ((128, 256, 64, 8), (128, 128, 64, 8), (128, 128, 64, 4), (128, 64, 64, 4), (64, 128, 64, 4)):
        for stages in (3, 4):
            blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP": 8}
            yield config.Config(blocks, num_warps=warps, num_stages=stages)


def _workspace_default(problem: config.Problem) -> config.Config:
    return config.Config({"MIB": WORKSPACE_BYTES >> 20})


def _workspace_candidates(problem: config.Problem) -> Iterator[config.Config]:
    # A chunk whose g and dh stay in the L2 (50 MB on H100, 126 MB on B200) reads them from there; it is more launches.
    for mib in (32, 64, 128, WORKSPACE_BYTES >> 20):
        yield config.Config({"MIB": mib})


config.declare("mlp_backward_workspace", default=_workspace_default, candidates=_workspace_candidates)
config.declare("mlp_backward_hidden", default=_hidden_default, candidates=_hidden_candidates)
# An epilogue that loads h, and GRN's but on sm_90, need registers that a wide tile's sums would take.
for _form, _default in (
    ("grn", lambda problem: _hidden_default(problem, 128 if problem.chip == 90 else 64, grn=True)),
    ("kept", lambda problem: _hidden_default(problem, 64)),
):
    config.declare(f"mlp_backward_hidden_{_form}", default=_default, candidates=_hidden_candidates)
config.declare("mlp_backward_weight", default=_weight_default, candidates=_weight_candidates)
config.declare("mlp_backward_norm", default=_norm_default, candidates=_norm_candidates)
config.declare("mlp_backward_form", default=_form_default, candidates=_form_candidates)
config.declare("mlp_backward_rows", default=_rows_default, candidates=_rows_candidates)
config.declare("mlp_backward_input", default=_input_default, candidates=_input_candidates)


def weight_splits(
    tiles: int, tile_operations: int, tile_bytes: int, rows: int, block_rows: int, multiprocessors: int
) -> int:
    """Over how many programs the rows of a weight's gradient are split: the least estimate of its time.

    Programs go in waves of one for each multiprocessor; a split costs the traffic of its parts. A multiprocessor does
    about 1.5 operations in the time the chip's memory takes for a byte (of H100 and A100 the datasheets' ratio). The
    same choice for the same chip and number of rows: the sums keep their order.
    """
    best, least = 1, None
    for splits in range(1, max(1, min(8 * multiprocessors // tiles, rows // (4 * block_rows))) + 1):
        waves = launch.tiles_of(tiles * splits, multiprocessors)
        time = waves * launch.tiles_of(rows, splits) * tile_operations + 1.5 * tiles * splits * tile_bytes
        if least is None or time < least:
            best, least = splits, time
    return best
