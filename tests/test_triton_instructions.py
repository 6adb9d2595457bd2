"""How many instructions layer_norm_mlp's Triton kernels issue for a hidden number on sm_90: counted in machine code.

GELU and what is summed beside it take longer than the matrix products up to some hundred channels, so these numbers
are times. The bounds are at most a tenth above what Triton 3.6 to 3.8 make; benchmarks/NOTES.md has what they mean.
"""

from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

import test_triton_mlp
import test_triton_mlp_backward
import triton_tools
from benchmarks import resources
from convnext_kernels.triton_kernels import launch

SIDES = {96: 56, 192: 28, 384: 14, 768: 7}


class Bound(NamedTuple):
    """At most: instructions for each hidden number of a thread, and barriers. `whole`: of the whole kernel, where a
    program makes one tile of hidden numbers, or goes round in a loop of tiles; else of the loop over hidden columns."""

    whole: bool
    instructions: float
    barriers: int


FORWARD = {
    ("fused_kernel", 96, False): Bound(False, 18, 2),
    ("squares_kernel", 96, True): Bound(False, 22, 4),
    ("fc1_kernel", 384, False): Bound(True, 20.5, 21),
    ("fc1_kernel", 384, True): Bound(True, 26, 32),
    ("fc1_kernel", 768, True): Bound(True, 26, 32),
}
BACKWARD = {
    ("row_gradients_kernel", 96, False): Bound(False, 31, 5),
    ("hidden_gradients_kernel", 192, False): Bound(True, 34, 21),
    ("hidden_gradients_kernel", 192, True): Bound(True, 44, 33),
    ("hidden_gradients_kernel", 768, True): Bound(True, 53, 69),
}


def recorded(forward, channels, grn):
    """What is launched for 128 images in pure bf16."""
    chip, side = launch.chip_of_architecture(90), SIDES[channels]
    if forward:
        options = dict(grn=grn, drop=False, shape=(128, side, side), fused=int(channels == 96))
        return test_triton_mlp.launches(chip, channels, torch.bfloat16, **options)
    given = test_triton_mlp_backward.arguments((128, side, side, channels), torch.bfloat16, grn, autocast=False)
    return test_triton_mlp_backward.launches_of(90, given)[0]


@pytest.mark.parametrize("case", [*FORWARD, *BACKWARD], ids=lambda case: f"{case[0]}-{case[1]}-v{1 + case[2]}")
def test_instructions_of_a_hidden_number(case):
    kernel, channels, grn = case
    bound = (FORWARD | BACKWARD)[case]
    one = next(each for each in recorded(case in FORWARD, channels, grn) if each.kernel.__name__ == kernel)
    text = triton_tools.compile_launch(one, 90).sass()
    (code,) = resources.parse_disassembly(text).values()
    blocks = one.constants
    columns = blocks["BLOCK_N"] if "BLOCK_N" in blocks else blocks["BLOCK_K"]
    numbers = blocks["BLOCK_M"] * columns / (32 * blocks["num_warps"])
    counted = (code["instructions"] if bound.whole else code["loop_instructions"]) / numbers
    barriers = text.count("BAR.SYNC") if bound.whole else code["loop"]["BAR"]
    assert counted <= bound.instructions and barriers <= bound.barriers, (round(counted, 1), barriers)
