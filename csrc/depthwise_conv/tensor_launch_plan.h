// How version 2 of the 7 x 7 depthwise convolution, on the tensor cores, is spread over a GPU, and when it is the one
// to take. Plain C++, without CUDA's types, from shapes and the chip's limits alone.
#pragma once
#include "depthwise_conv/launch_plan.h"

namespace convnext_kernels::depthwise_conv {

constexpr int kTensorChunk = 16;                    // channels of a block: 32 bytes of a pixel, a sector of memory
constexpr int kSegments = 8;                        // of a patch's rows: the columns of a matrix in a tensor core
constexpr int kBlockColumns = 8;                    // pixels of a row in one 16-byte row of a matrix
constexpr int kUnitBytes = 16;                      // shared memory is counted in these
constexpr int kHaloRows = 2 * kPadding;             // of a patch
constexpr int kTensorConvolutionWarps = 8;          // of a block, two of which are resident: 128 registers a thread
constexpr int kTensorGradientWarps = kTensorChunk;  // a warp keeps the sums of one channel from first to last
constexpr int64_t kWorkBytes = 24;                  // of a Work
constexpr int kSumUnits = 34;                       // at least, of a plane: 8 x 17 sums take its place at the end
constexpr int kTableWords = 8;                      // of a row of weights: pairs (-1, 0), (0, 1), ..., (6, 7)

// A patch is what a block works on at a time: rows x columns results of 16 channels in each of `images` images. Its
// rows are cut into segments, at most eight over all its images, and the same row of all segments is worked on at once.
// A segment has 2 * pairs rows; a row has `blocks` times 8 columns. Both are the kernels' template parameters.
constexpr int pairs_of(int blocks) {
  return blocks == 4 ? 2 : 4;
}

struct TensorPlan {
  int blocks = 0;  // 4, 2 or 1; 0: no plan, the chip has not enough shared memory
  int images = 0, segments = 0;
  int rows = 0, columns = 0;  // of a patch in an image; the last ones may be cut short
  int row_patches = 0, column_patches = 0;
  int64_t patches = 0;
  int64_t chunks = 0;
  int row_blocks = 0;    // that share the patches of a chunk; 0: nothing to do
  int copied_rows = 0;   // most rows of an image that a patch copies, with its halo
  int copied_pairs = 0;  // the same of columns, in pairs
  int copied_parts = 1;  // 2 where pixels are copied in fp32
  int image_units = 0;   // from one image to the next in a channel's plane
  int plane_units = 0;   // from one channel to the next
  int grad_rows = 0, grad_pairs = 0, grad_image_units = 0, grad_plane_units = 0;  // the same of the output's gradient
  int64_t shared_bytes = 0;
  int resident_blocks = 0;  // of a multiprocessor

  constexpr bool exists() const { return blocks > 0; }
  constexpr int segment_rows() const { return 2 * pairs_of(blocks); }
  constexpr int64_t first_patch(int64_t block) const { return patches * block / row_blocks; }
  // The shared memory's pieces, in units.
  constexpr int64_t plane_set_units() const { return kTensorChunk * plane_units + 4; }
  constexpr int64_t copied_units() const { return int64_t{4} * copied_parts * images * copied_rows * copied_pairs; }
  constexpr int64_t grad_plane_set_units() const { return kTensorChunk * grad_plane_units + 4; }
  constexpr int64_t copied_grad_units() const { return int64_t{4} * images * grad_rows * grad_pairs; }
};

// Where a row of a plane begins, in units from its image's first: every segment begins an odd number of units behind
// the one before it, so that the eight rows of a matrix lie in different banks.
constexpr int row_units(int row, int row_pitch, int segment_rows) {
  return row * row_pitch + row / segment_rows;
}

// From one image to the next in a plane: the distance that lets the eight rows of a matrix share the fewest banks.
constexpr int choose_image_units(int least, int images, int segments, int segment_units) {
  if (images == 1) return least;
  int best = least, best_conflicts = kSegments + 1;
  for (int units = least; units < least + kSegments; ++units) {
    int used[kSegments] = {}, conflicts = 0;
    for (int image = 0; image < images; ++image)
      for (int segment = 0; segment < segments; ++segment)
        conflicts = larger(conflicts, ++used[(image * units + segment * segment_units) % kSegments]);
    if (conflicts < best_conflicts) {
      best = units;
      best_conflicts = conflicts;
    }
  }
  return best;
}

// Columns or rows of an image that a patch of `size` can meet, of `patches` side by side.
constexpr int copied_size(int size, int patches, int image_size) {
  return patches == 1 ? image_size : smaller(image_size, size + (patches == 2 ? kPadding : kHaloRows));
}

// Blocks that share a chunk's patches. Each costs about a patch extra, for what its first one waits and its last one
// (the weight gradient: its sums) takes; the last wave should be full.
constexpr int choose_patch_blocks(int64_t patches, int64_t chunks, int64_t resident_blocks) {
  constexpr int64_t kMostWaves = 4, kMostBlocks = 65535;
  int64_t best = 1, best_cost = -1;
  for (int64_t waves = 1; waves <= kMostWaves; ++waves) {
    const int64_t most = std::min(patches, kMostBlocks);
    const int64_t blocks = std::clamp<int64_t>(resident_blocks * waves / chunks, 1, most);
    const int64_t cost = divide_up(blocks * chunks, resident_blocks) * (divide_up(patches, blocks) + 1);
    if (best_cost < 0 || cost < best_cost) {
      best = blocks;
      best_cost = cost;
    }
  }
  return static_cast<int>(best);
}

// Patches of at most so many segments, and the shared memory they take.
constexpr TensorPlan plan_patches(Kind kind, int64_t samples, int height, int width, int staged_bytes,
                                  int most_segments, int input_bytes) {
  TensorPlan plan;
  plan.copied_parts = input_bytes / 2;
  plan.blocks = width <= kBlockColumns ? 1 : width <= 2 * kBlockColumns ? 2 : 4;
  const int blocks = plan.blocks, segment_rows = plan.segment_rows();
  plan.column_patches = static_cast<int>(divide_up(width, blocks * kBlockColumns));
  plan.columns = static_cast<int>(divide_up(width, plan.column_patches));
  plan.row_patches = static_cast<int>(divide_up(height, most_segments * segment_rows));
  plan.segments = static_cast<int>(divide_up(divide_up(height, plan.row_patches), segment_rows));
  plan.rows = plan.segments * segment_rows;
  plan.row_patches = static_cast<int>(divide_up(height, plan.rows));
  plan.images = static_cast<int>(
      plan.row_patches > 1 ? 1 : std::clamp<int64_t>(most_segments / plan.segments, 1, std::max<int64_t>(samples, 1)));
  plan.patches = divide_up(samples, plan.images) * plan.row_patches * plan.column_patches;

  const int pitch = blocks + 1, stored_rows = plan.rows + kHaloRows;
  plan.copied_rows = copied_size(plan.rows, plan.row_patches, height);
  plan.copied_pairs = static_cast<int>(divide_up(copied_size(plan.columns, plan.column_patches, width), 2));
  plan.image_units = choose_image_units(row_units(stored_rows - 1, pitch, segment_rows) + pitch, plan.images,
                                        plan.segments, segment_rows * pitch + 1);
  plan.plane_units = plan.images * plan.image_units;
  if (kind == Kind::kConvolution) {
    const int result_units = plan.images * plan.segments * (segment_rows * blocks * staged_bytes / 2 + 1);
    plan.plane_units = larger(plan.plane_units, result_units);
    plan.shared_bytes = padded_to_piece(int64_t{4} * kTensorChunk * kSize * kTableWords);
  } else {
    plan.plane_units = larger(plan.plane_units, kSumUnits);
    plan.grad_rows = smaller(plan.rows, height);
    plan.grad_pairs = static_cast<int>(divide_up(plan.columns, 2));
    plan.grad_image_units = choose_image_units(row_units(plan.rows - 1, blocks, segment_rows) + blocks, plan.images,
                                               plan.segments, segment_rows * blocks + 1);
    plan.grad_plane_units = plan.images * plan.grad_image_units;
    plan.shared_bytes = padded_to_piece(plan.grad_plane_set_units() * kUnitBytes) +
                        padded_to_piece(plan.copied_grad_units() * kUnitBytes) + padded_to_piece(2 * kWorkBytes);
  }
  plan.shared_bytes +=
      padded_to_piece(plan.plane_set_units() * kUnitBytes) + padded_to_piece(plan.copied_units() * kUnitBytes);
  return plan;
}

// `staged_bytes` of an element of the results, which take the place of the input in shared memory: 2, or 4 where a
// residual is to be added before the one rounding. `input_bytes` of one of the input: 2, or 4 where it is to be rounded
// on the way, in a convolution.
constexpr TensorPlan plan_tensor(Kind kind, int64_t samples, int64_t channels, int height, int width, int staged_bytes,
                                 const Chip& chip, int input_bytes = 2) {
  for (int most_segments = kSegments; most_segments >= 1; --most_segments) {
    TensorPlan plan = plan_patches(kind, samples, height, width, staged_bytes, most_segments, input_bytes);
    if (plan.shared_bytes > chip.shared_bytes_per_block) continue;
    plan.chunks = divide_up(channels, kTensorChunk);
    const int64_t by_memory = chip.shared_bytes_per_multiprocessor / (plan.shared_bytes + kBlockOverhead);
    plan.resident_blocks = static_cast<int>(std::clamp<int64_t>(by_memory, 1, kind == Kind::kConvolution ? 2 : 1));
    if (samples > 0)
      plan.row_blocks = choose_patch_blocks(plan.patches, plan.chunks,
                                            int64_t{plan.resident_blocks} * larger(chip.multiprocessors, 1));
    return plan;
  }
  return {};
}

// --- which version

// Whose choice: the plan's, or a test's or benchmark's.
enum class Version { kChosen, kFma, kTensor };

// Cycles of a multiprocessor for 128 elements of the result, or of the output's gradient, that each version takes
// besides reading and writing memory, as the kernels' files count them. Not measured.
struct VersionCosts {
  double fma, tensor;
};

constexpr VersionCosts count_costs(Kind kind, const TensorPlan& plan, int height, int width, const Chip& chip) {
  // Version 1: 49 FMA an element, of seven columns at a time; four instructions in five are FMA. A multiprocessor has
  // 128 lanes for them, 64 on sm_80, whose 164 KiB of shared memory tell it from the others.
  const double lanes = chip.shared_bytes_per_multiprocessor == 164 * 1024 ? 64 : 128;
  const double fma = 49 * 128 / lanes / 0.8 * static_cast<double>(divide_up(width, kStrip) * kStrip) / width;
  // Version 2, for 128 places of a patch: those outside the image are in vain. Convolution: 22 of starting
  // instructions, more than the 16 of 8 mma of up to 2 cycles or the 17 of shared memory. The gradient: 17 of 8.5 mma
  // and 24 of shared memory, one after the other.
  const double places =
      1.0 * plan.row_patches * plan.column_patches * kSegments * plan.segment_rows() * plan.blocks * kBlockColumns;
  const double used = static_cast<double>(plan.images) * height * width / places;
  return {fma, (kind == Kind::kConvolution ? 22 : 41) / used};
}

// Version 2 pays where arithmetic, and not memory, is what version 1 waits for: on the chips with HBM (sm_80, 90, 100;
// 164 KiB of shared memory and more tell them from the others), which deliver 10 (A100) to 24 (B200) bytes a cycle to a
// multiprocessor; a result takes 4 (pure 16-bit modes), so 128 of them 21 to 51 cycles, and version 1 61 (sm_80: 122).
// With GDDR they take 200 cycles and more, which version 1 hides, and its weights stay in fp32.
constexpr bool prefers_tensor(Kind kind, const TensorPlan& plan, int height, int width, const Chip& chip) {
  if (!plan.exists() || chip.shared_bytes_per_multiprocessor < 164 * 1024) return false;
  const VersionCosts costs = count_costs(kind, plan, height, width, chip);
  return costs.tensor < costs.fma;
}

}  // namespace convnext_kernels::depthwise_conv
