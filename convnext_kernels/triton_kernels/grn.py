"""GRN's norms (ConvNeXt V2, arXiv:2301.00808, section 3.2): sums of squares of g over an image, and the factors.

Every row tile writes its part of the sums, one vector for each image it has rows of: a tile spans several images where
they are small. A second kernel adds an image's parts in a fixed order. No atomics: the same bits on every run.

Images are counted in the order of the rows (launch.sample_order), so that the parts of dropped samples are never read.
"""

import triton
import triton.language as tl

from . import launch
from .device import INTERPRETED

__all__ = [
    "images_at_once",
    "images_in_tile",
    "launch_factors",
    "partials_shape",
    "store_image_sums",
    "store_squares",
    "summands",
    "unbounded",
]


def images_in_tile(block_m: int, rows_per_sample: int, per_sample: bool) -> int:
    """Of how many images `block_m` consecutive rows can be."""
    return 1 if per_sample else (block_m + rows_per_sample - 2) // rows_per_sample + 1


def partials_shape(tiles: int, hidden: int, block_m: int, rows_per_sample: int, per_sample: bool) -> tuple[int, int]:
    """The shape of the partial sums (fp32) that `tiles` row tiles write."""
    return tiles * images_in_tile(block_m, rows_per_sample, per_sample), hidden


# --- sums over the rows of each image in a tile. Those of a product's result lie in different lanes and warps: to add
#     up 128 rows of 64 columns takes a thread 300 instructions and 11 barriers, and that for every image; GELU of them
#     takes 340. A product with a matrix of ones and zeros, which row is of which image, does 16 images in 100.


@triton.constexpr_function
def images_at_once(dtype):
    """Of how many images a step makes the sums: fp32 ones are not rounded for a product."""
    return 1 if dtype == tl.float32 else 16


@triton.jit
def summands(values, dtype: tl.constexpr, SIGNED: tl.constexpr):
    """fp32 `values` as the sums over rows take them, alone or times one another, in a computation in `dtype`.

    bf16: what it rounds anyway, and two at a time. fp16 has too little range for squares: fp32, which the product for
    the sums rounds to tf32 of as many digits. At most +-2^63, and that for NaN too: 0 times it is 0, and so it reaches
    no other image's sum. (A row that is not inside may have anything.) SIGNED: some may be far below 0.
    """
    if dtype != tl.float32:
        # Triton 3.6's interpreter lets NaN pass tl.minimum, which PTX's min does not. A selection would be two
        # instructions more.
        if INTERPRETED:
            values = tl.where(values < 2.0**63, values, 2.0**63)
        else:
            values = tl.minimum(values, 2.0**63)
        if SIGNED:
            values = tl.maximum(values, -(2.0**63))
    if dtype == tl.bfloat16:
        values = values.to(tl.bfloat16)
    return values


@triton.jit
def unbounded(sums, FACTORS: tl.constexpr):
    """NaN where a sum, of products of FACTORS summands, has one that was too large. (Of both signs they may cancel.)"""
    LIMIT: tl.constexpr = 2.0 ** (63 * FACTORS - 1)
    return tl.where(tl.abs(sums) < LIMIT, sums, float("nan"))


@triton.jit
def store_image_sums(
    parts, values, image, first_image, inside, part, images, k, K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """parts[part + i, k] = the sums of `values` (rows, columns) over the rows `inside` of image first_image + i, for i
    below STEP = images_at_once(dtype) and `images`; read them with `unbounded`.

    The values are `summands` or products of them.
    """
    if STEP == 1:
        of_image = inside & (image == first_image)
        sums = tl.sum(tl.where(of_image[:, None], values, 0.0), 0)
        tl.store(parts + part.to(tl.int64) * K + k, sums, mask=k < K)
    else:
        i = tl.arange(0, STEP)
        of_image = inside[None, :] & (image[None, :] == (first_image + i)[:, None])
        sums = tl.dot(of_image.to(values.dtype), values, input_precision="tf32")
        pointers = parts + (part + i).to(tl.int64)[:, None] * K + k[None, :]
        tl.store(pointers, sums, mask=(i < images)[:, None] & (k < K)[None, :])


@triton.jit
def store_squares(
    partials, g, row, inside, tile, k, rows_per_sample, dtype: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, IMAGES: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """The sums over a tile's rows of g^2 at hidden columns k, for each image; `row`, `inside` are tile_rows'."""
    STEP: tl.constexpr = images_at_once(dtype)
    g = summands(g, dtype, False)
    if PER_SAMPLE:
        image, first_image, images = tl.zeros(row.shape, tl.int32), 0, 1
    else:
        image, first_image = row // rows_per_sample, tile * BLOCK_M // rows_per_sample
        images = tl.max(image, 0) - first_image + 1
    slot = tile * IMAGES
    if IMAGES <= STEP:  # no loop: the compiler does not pipeline one that has another inside
        store_image_sums(partials, g * g, image, first_image, inside, slot, images, k, K, STEP)
    else:
        for i in range(0, images, STEP):
            store_image_sums(partials, g * g, image, first_image + i, inside, slot + i, images - i, k, K, STEP)


@triton.jit
def _slot(
    tile, image, rows_per_sample, BLOCK_M: tl.constexpr, IMAGES: tl.constexpr, PER_SAMPLE: tl.constexpr
):  # fmt: skip
    """Which of the partial sums are those of an image's rows in a tile."""
    slot = tile
    if not PER_SAMPLE:
        slot = tile * IMAGES + image - tile * BLOCK_M // rows_per_sample
    return slot


@triton.jit(do_not_specialize=["rows_per_sample"])
def _factors_kernel(
    partials, weight, live_count, factors, rows_per_sample,
    K: tl.constexpr, BLOCK_M: tl.constexpr, IMAGES: tl.constexpr, PER_SAMPLE: tl.constexpr,
    PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """factors[image] = 1 + weight * G / (mean(G) + 1e-6), G the norms of the image. A program takes an image."""
    image = tl.program_id(0)
    live = True
    if live_count is not None:
        live = image < tl.load(live_count)
    if live:
        if PER_SAMPLE:
            tiles = tl.cdiv(rows_per_sample, BLOCK_M)
            first_tile = image * tiles
        else:
            first_tile = image * rows_per_sample // BLOCK_M
            tiles = (image * rows_per_sample + rows_per_sample - 1) // BLOCK_M - first_tile + 1
        own = factors + image.to(tl.int64) * K
        # In place of the first part, which has been read by then.
        norms = partials + _slot(first_tile, image, rows_per_sample, BLOCK_M, IMAGES, PER_SAMPLE).to(tl.int64) * K
        total = 0.0
        for first in range(0, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            squares = tl.zeros((COLUMNS,), tl.float32)
            for first_part in range(0, tiles, PARTS):
                part = first_part + tl.arange(0, PARTS)
                tile = first_tile + part
                slot = _slot(tile, image, rows_per_sample, BLOCK_M, IMAGES, PER_SAMPLE)
                mask = (part < tiles)[:, None] & (k < K)[None, :]
                pointers = partials + slot.to(tl.int64)[:, None] * K + k[None, :]
                squares += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
            norm = tl.sqrt_rn(unbounded(squares, 2))
            tl.store(norms + k, norm, mask=k < K)
            total += tl.sum(norm, 0)
        denominator = total / K + 1e-6
        tl.debug_barrier()  # what is read below was written above
        for first in range(0, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            norm = tl.load(norms + k, mask=k < K, other=0.0)
            factor = 1.0 + tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32) * tl.div_rn(norm, denominator)
            tl.store(own + k, factor, mask=k < K)


def launch_factors(partials, weight, live_count, factors, rows_per_sample, block_m, per_sample):
    """Fills factors (images, K) from the partial sums, for the first live_count (1,) images if that is given. The
    partial sums are used up."""
    images, hidden = factors.shape
    # A program is alone with its image, and each turn of its loops waits for memory: few turns, of 4096 values.
    tiles = launch.tiles_of(rows_per_sample, block_m) + (not per_sample)
    parts = min(16, launch.next_power_of_2(tiles))
    columns = min(4096 // parts, launch.next_power_of_2(hidden))
    launch.run(
        _factors_kernel,
        (images,),
        partials,
        weight,
        live_count,
        factors,
        rows_per_sample,
        K=hidden,
        BLOCK_M=block_m,
        IMAGES=images_in_tile(block_m, rows_per_sample, per_sample),
        PER_SAMPLE=per_sample,
        PARTS=parts,
        COLUMNS=columns,
        num_warps=8,
    )
