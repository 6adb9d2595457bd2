"""GRN's norms (ConvNeXt V2, arXiv:2301.00808, section 3.2): sums of squares of g over an image, and the factors.

Every row tile writes its part of the sums, one vector for each image it has rows of: a tile spans several images where
they are small. A second kernel adds an image's parts in a fixed order. No atomics: the same bits on every run.

Images are counted in the order of the rows (launch.sample_order), so that the parts of dropped samples are never read.
"""

import triton
import triton.language as tl

from . import launch

__all__ = ["images_in_tile", "launch_factors", "partials_shape", "store_squares"]


def images_in_tile(block_m: int, rows_per_sample: int, per_sample: bool) -> int:
    """Of how many images `block_m` consecutive rows can be."""
    return 1 if per_sample else (block_m + rows_per_sample - 2) // rows_per_sample + 1


def partials_shape(tiles: int, hidden: int, block_m: int, rows_per_sample: int, per_sample: bool) -> tuple[int, int]:
    """The shape of the partial sums (fp32) that `tiles` row tiles write."""
    return tiles * images_in_tile(block_m, rows_per_sample, per_sample), hidden


@triton.jit
def _store_image_squares(partials, g, mine, slot, k, K: tl.constexpr):
    squares = tl.sum(tl.where(mine[:, None], g * g, 0.0), 0)
    tl.store(partials + slot.to(tl.int64) * K + k, squares, mask=k < K)


@triton.jit
def store_squares(
    partials, g, row, inside, tile, k, rows_per_sample,
    K: tl.constexpr, BLOCK_M: tl.constexpr, IMAGES: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """The sums over a tile's rows of g^2 at hidden columns k, for each image; `row`, `inside` are tile_rows'."""
    if PER_SAMPLE:
        _store_image_squares(partials, g, inside, tile, k, K)
    else:
        first_image = tile * BLOCK_M // rows_per_sample
        image = row // rows_per_sample - first_image
        images = tl.max(image, 0) + 1
        if IMAGES <= 4:  # unrolled: the compiler does not pipeline a loop that has another inside
            for i in tl.static_range(IMAGES):
                if i < images:
                    _store_image_squares(partials, g, inside & (image == i), tile * IMAGES + i, k, K)
        else:
            for i in range(images):
                _store_image_squares(partials, g, inside & (image == i), tile * IMAGES + i, k, K)


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
        total = 0.0
        for first in range(0, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            squares = tl.zeros((COLUMNS,), tl.float32)
            for first_part in range(0, tiles, PARTS):
                part = first_part + tl.arange(0, PARTS)
                tile = first_tile + part
                slot = tile
                if not PER_SAMPLE:
                    slot = tile * IMAGES + image - tile * BLOCK_M // rows_per_sample
                mask = (part < tiles)[:, None] & (k < K)[None, :]
                pointers = partials + slot.to(tl.int64)[:, None] * K + k[None, :]
                squares += tl.sum(tl.load(pointers, mask=mask, other=0.0), 0)
            norm = tl.sqrt_rn(squares)
            tl.store(own + k, norm, mask=k < K)
            total += tl.sum(norm, 0)
        denominator = total / K + 1e-6
        tl.debug_barrier()  # what is read below was written above
        for first in range(0, K, COLUMNS):
            k = first + tl.arange(0, COLUMNS)
            norm = tl.load(own + k, mask=k < K, other=0.0)
            factor = 1.0 + tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32) * tl.div_rn(norm, denominator)
            tl.store(own + k, factor, mask=k < K)


def launch_factors(partials, weight, live_count, factors, rows_per_sample, block_m, per_sample):
    """Fills factors (images, K) fp32 from the partial sums, for the first live_count (1,) images if that is given."""
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
        num_warps=4,
    )
