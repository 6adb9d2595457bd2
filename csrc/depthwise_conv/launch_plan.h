// How the depthwise convolution and its gradients are spread over a GPU: plain C++, without CUDA's types, from shapes
// and the chip's limits alone. Kernels walk with the same functions that the tests check.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/chip.h"

namespace convnext_kernels::depthwise_conv {

// --- the tuned kernels: 7 x 7, stride 1, computed in fp32 --------------------------------------------------------

constexpr int kSize = 7, kPadding = kSize / 2, kTaps = kSize * kSize;
constexpr int kChunk = 32;          // channels of a block, one a lane
constexpr int kStrip = 7;           // columns of a thread: ConvNeXt's maps are 56, 28, 14 and 7 wide
constexpr int kStageRows = kSize;   // rows a stage of shared memory holds: one turn of the register window
constexpr int kMaxWarps = 8;        // of a block
constexpr int kResidentWarps = 16;  // of a multiprocessor: 128 registers a thread
constexpr int kStoreLanes = 28;     // lanes that write a row of results: 7 columns, 4 times 8 channels
constexpr int kStoreChannels = 8;   // channels of such a lane
constexpr int64_t kStoreFloats = kStrip * kChunk;  // shared memory of a warp for a row of results
constexpr int64_t kStageBytes = 40;                // of a Stage
constexpr int64_t kBlockOverhead = 1024;           // shared memory the system takes of each block

enum class Kind { kConvolution, kWeightGradient };

// A block has `chunk` of 32 channels and `images` images side by side. A warp has 7 columns, a strip, of one of them;
// it walks down the rows with every sum in registers, so that a row is copied to shared memory once and read once by
// each warp. Wide images are cut into `tiles` of `strips` strips. All rows of a chunk, tile after tile, image group
// after image group, form one sequence, and each of row_blocks blocks takes an equal piece of it, wherever that begins.
struct TilePlan {
  int strips = 0;  // of a tile
  int images = 0;
  int tiles = 0;
  int row_blocks = 0;  // 0: nothing to do
  int64_t chunks = 0;
  int64_t rows = 0;  // of the sequence
  int height = 0;
  int64_t shared_bytes = 0;
  // What follows from these, as data: a kernel reads it where it needs it and keeps no register for it.
  int columns = 0;  // of a tile
  int pixels = 0;   // of all images in a row
  // Pixels of a stage's row. The zeros right of an image are those left of the next one.
  int haloed_pitch = 0, haloed_pixels = 0;

  constexpr int warps() const { return strips * images; }
  // Elements of one of the two stages: rows of the input, and for the weight gradient rows of the output's gradient.
  constexpr int64_t stage_elements(Kind kind) const {
    return int64_t{kStageRows} * kChunk * (haloed_pixels + (kind == Kind::kWeightGradient ? pixels : 0));
  }
  constexpr int64_t first_row(int64_t block) const { return rows * block / row_blocks; }
};

constexpr int64_t divide_up(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// By value: std::min takes references, and device code has no address of a constant of the host's.
constexpr int smaller(int a, int b) {
  return a < b ? a : b;
}

constexpr int larger(int a, int b) {
  return a > b ? a : b;
}

constexpr int64_t padded_to_piece(int64_t bytes) {
  return divide_up(bytes, 128) * 128;
}

// Blocks along the sequence of rows. Each costs a few rows extra where it starts, and the last wave should be full.
constexpr int choose_row_blocks(int64_t rows, int64_t chunks, int64_t resident_blocks) {
  constexpr int64_t kExtraRows = 4, kMostWaves = 4, kMostBlocks = 65535;
  int64_t best = 1, best_cost = -1;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t most = std::min(divide_up(rows, kStageRows), kMostBlocks);
    const int64_t blocks = std::clamp<int64_t>(resident_blocks * waves / chunks, 1, most);
    const int64_t cost = divide_up(blocks * chunks, resident_blocks) * (divide_up(rows, blocks) + kExtraRows);
    if (best_cost < 0 || cost < best_cost) {
      best = blocks;
      best_cost = cost;
    }
  }
  return static_cast<int>(best);
}

// The tile that lets the most warps be resident; among equals the widest, which reads the fewest columns twice.
constexpr TilePlan plan_tiles(Kind kind, int64_t samples, int64_t channels, int height, int width,
                              int64_t element_bytes, const Chip& chip) {
  TilePlan best;
  if (samples == 0) return best;
  int64_t best_warps = 0;
  int64_t best_blocks = 0;
  for (int most_warps = kMaxWarps; most_warps >= 1; most_warps /= 2) {
    TilePlan plan;
    const int64_t strips = divide_up(width, kStrip);
    const int64_t tiles = divide_up(strips, most_warps);
    plan.tiles = static_cast<int>(tiles);
    plan.strips = static_cast<int>(divide_up(strips, tiles));
    plan.images = static_cast<int>(tiles > 1 ? 1 : std::min<int64_t>(samples, most_warps / plan.strips));
    plan.chunks = divide_up(channels, kChunk);
    plan.height = height;
    plan.rows = divide_up(samples, plan.images) * tiles * height;
    plan.columns = plan.strips * kStrip;
    plan.pixels = plan.images * plan.columns;
    plan.haloed_pitch = plan.columns + kPadding;
    plan.haloed_pixels = plan.images * plan.haloed_pitch + kPadding;
    plan.shared_bytes = padded_to_piece(2 * plan.stage_elements(kind) * element_bytes);
    if (kind == Kind::kConvolution)
      plan.shared_bytes += padded_to_piece(plan.warps() * kStoreFloats * static_cast<int64_t>(sizeof(float)));
    plan.shared_bytes += padded_to_piece(2 * kStageBytes);
    if (plan.shared_bytes > chip.shared_bytes_per_block) continue;
    const int64_t blocks = std::min<int64_t>(
        kResidentWarps / plan.warps(), chip.shared_bytes_per_multiprocessor / (plan.shared_bytes + kBlockOverhead));
    if (blocks * plan.warps() <= best_warps) continue;
    best = plan;
    best_warps = blocks * plan.warps();
    best_blocks = blocks;
  }
  best.row_blocks = choose_row_blocks(best.rows, best.chunks, best_blocks * chip.multiprocessors);
  return best;
}

// A block's piece of the sequence falls into segments, each inside one image (or group of images) and tile, and a
// segment into stages of up to kStageRows steps. Step r takes in row r of the input. The convolution's step completes
// row r - 3 of the result; the weight gradient's brings in row r + 3 of the output's gradient and pairs row r of the
// input with rows r - 3 to r + 3: its rows are the input's, and steps before the first of them only fill the window.
struct Stage {
  int64_t sample;     // of the first image
  int64_t rows_left;  // of the block's piece after this segment
  int tile;
  int first, end;   // rows of this segment
  int step, steps;  // its steps in this stage; steps == 0: behind the block's last
  int last;         // 1: the segment ends with this stage. (Not bool: padding would be copied byte by byte.)
};
static_assert(sizeof(Stage) == kStageBytes);

template <Kind kKind>
constexpr int first_step(int first) {
  return kKind == Kind::kConvolution ? larger(first - kPadding, 0) : larger(first - 2 * kPadding, -kPadding);
}

// The stage from `step` on of a segment.
template <Kind kKind>
constexpr Stage stage_at(const TilePlan& plan, Stage segment, int step) {
  const int end = kKind == Kind::kConvolution ? smaller(segment.end + kPadding, plan.height) : segment.end;
  segment.step = step;
  segment.steps = smaller(kStageRows, end - step);
  segment.last = step + segment.steps == end ? 1 : 0;
  return segment;
}

// The first stage of the segment that begins at row `first` of an image, where `rows` rows are left.
template <Kind kKind>
constexpr Stage begin_segment(const TilePlan& plan, int64_t sample, int tile, int first, int64_t rows) {
  const int length = static_cast<int>(std::min<int64_t>(rows, plan.height - first));
  const Stage segment{sample, rows - length, tile, first, first + length, 0, 0, 0};
  return length == 0 ? segment : stage_at<kKind>(plan, segment, first_step<kKind>(first));
}

template <Kind kKind>
constexpr Stage first_stage(const TilePlan& plan, int64_t block) {
  const int64_t begin = plan.first_row(block), tile = begin / plan.height;
  return begin_segment<kKind>(plan, tile / plan.tiles * plan.images, static_cast<int>(tile % plan.tiles),
                              static_cast<int>(begin % plan.height), plan.first_row(block + 1) - begin);
}

template <Kind kKind>
constexpr Stage next_stage(const TilePlan& plan, const Stage& stage) {
  if (!stage.last) return stage_at<kKind>(plan, stage, stage.step + kStageRows);
  const bool same_images = stage.tile + 1 < plan.tiles;
  return begin_segment<kKind>(plan, same_images ? stage.sample : stage.sample + plan.images,
                              same_images ? stage.tile + 1 : 0, 0, stage.rows_left);
}

template <Kind kKind>
constexpr bool is_first_of_segment(const Stage& stage) {
  return stage.step == first_step<kKind>(stage.first);
}

// --- the simple kernels: every kernel size and stride, every type ------------------------------------------------

constexpr int kSimpleWarps = 8;  // of a block: of 32 channels, warps take every eighth column, or weight

struct SimplePlan {
  int64_t chunks = 0;
  int64_t rows = 0;    // of the result, or of the output's gradient, in all images
  int row_blocks = 0;  // 0: nothing to do
  int64_t block_rows = 0;

  // No division: on the device a 64-bit one is a call.
  constexpr int64_t first_row(int64_t block) const { return block < row_blocks ? block * block_rows : rows; }
};

constexpr SimplePlan plan_simple(int64_t samples, int64_t channels, int height, const Chip& chip) {
  SimplePlan plan;
  plan.chunks = divide_up(channels, kChunk);
  plan.rows = samples * height;
  if (plan.rows == 0) return plan;
  constexpr int64_t kBlocks = 16;  // for each multiprocessor: of 2048 threads, twice what is resident
  const int64_t most = std::min<int64_t>(plan.rows, 65535);
  const int64_t wanted = std::clamp<int64_t>(chip.multiprocessors * kBlocks / plan.chunks, 1, most);
  plan.block_rows = divide_up(plan.rows, wanted);
  plan.row_blocks = static_cast<int>(divide_up(plan.rows, plan.block_rows));
  return plan;
}

// Whether the tuned kernels take this. `element_bytes` of the narrowest tensor, `aligned`: every tensor's memory begins
// at a multiple of 16 bytes.
constexpr bool is_tuned(int kernel_size, int stride, int64_t channels, int64_t element_bytes, bool aligned) {
  return kernel_size == kSize && stride == 1 && element_bytes < 8 && aligned && channels * element_bytes % 16 == 0;
}

}  // namespace convnext_kernels::depthwise_conv
