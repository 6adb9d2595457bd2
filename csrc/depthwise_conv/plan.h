// Shapes of the depthwise convolution, and how the CPU kernels' work is split. Plain C++, from shapes alone: the same
// split, and so the same order of every sum, for any number of threads.
#pragma once
#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "depthwise_conv/cpu_kernels.h"

namespace convnext_kernels::depthwise_conv {

constexpr bool is_supported_kernel_size(int64_t size) {
  return size >= 3 && size <= kMaxKernelSize && size % 2 == 1;
}

constexpr bool is_supported_stride(int64_t stride) {
  return stride == 1 || stride == 2;
}

// With padding kernel_size / 2.
constexpr int64_t output_size(int64_t size, int64_t stride) {
  return (size - 1) / stride + 1;
}

constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

// The weights that meet an input position of this parity in the gradient of the input, in reverse order: with
// c = (phase + padding) % stride these are c, c + stride, ..., and weight c + stride * u meets the output position
// j + (phase + padding - c) / stride - u.
constexpr Phase input_gradient_phase(int64_t kernel_size, int64_t stride, int64_t phase) {
  const int64_t shifted = phase + kernel_size / 2, first_weight = shifted % stride;
  const int64_t taps = (kernel_size - first_weight + stride - 1) / stride;
  return {taps, shifted / stride - (taps - 1)};
}

// The ring of source rows should leave room in a first-level cache of 32 to 48 KiB.
constexpr int64_t kRingBytes = 32 * 1024;
// Enough tasks to balance the threads of a small machine; more only where the image is large.
constexpr int64_t kWantedTasks = 32;
// Neighbouring channels share cache lines, so a task takes at least this many: a line of 16-bit elements.
constexpr int64_t kMinTaskChannels = 32;
constexpr int64_t kMaxTaskChannels = 128;
// Elements of the result a task should not exceed, for its sources and results to stay in a second-level cache.
constexpr int64_t kTaskElements = 128 * 1024;

// A box of results cut into tiles of equal size (the last of each axis may be smaller).
struct Tiling {
  Tile whole, tile;
  int64_t sample_tiles, row_tiles, column_tiles, channel_tiles;
  int64_t scratch_columns, scratch_bytes;

  int64_t box_tiles() const { return sample_tiles * row_tiles * column_tiles; }

  // Tiles of all channels are numbered first, columns fastest.
  Tile at(int64_t box, int64_t channel_tile) const {
    Tile result;
    cut(channel_tile, tile.blocks, whole.blocks, result.first_block, result.blocks);
    cut(box % column_tiles, tile.columns, whole.columns, result.first_column, result.columns);
    cut(box / column_tiles % row_tiles, tile.rows, whole.rows, result.first_row, result.rows);
    cut(box / column_tiles / row_tiles, tile.samples, whole.samples, result.first_sample, result.samples);
    return result;
  }

 private:
  static void cut(int64_t index, int64_t size, int64_t whole, int64_t& first, int64_t& count) {
    first = index * size;
    count = std::min(size, whole - first);
  }
};

// Columns of a tile: all, or pieces that are a multiple of the kernels' register blocks and fit the ring.
inline int64_t tile_columns(int64_t columns, int64_t kernel_size, int64_t source_step, int64_t result_step,
                            int64_t vector_bytes) {
  const int64_t ring_columns = kRingBytes / (vector_bytes * kernel_size);
  const int64_t fitting = std::max<int64_t>(0, ring_columns - kernel_size) / source_step / kMaxPixels;
  const int64_t granule = kMaxPixels * result_step, most = std::max<int64_t>(1, fitting) * granule;
  if (columns <= most) return columns;
  return ceil_div(ceil_div(columns, ceil_div(columns, most)), granule) * granule;
}

inline void finish(Tiling& t) {
  t.sample_tiles = ceil_div(t.whole.samples, t.tile.samples);
  t.row_tiles = ceil_div(t.whole.rows, t.tile.rows);
  t.column_tiles = ceil_div(t.whole.columns, t.tile.columns);
  t.channel_tiles = ceil_div(t.whole.blocks, t.tile.blocks);
}

// The tiles of a Correlation: every (box, channel tile) is a task of its own.
inline Tiling correlation_tiling(int64_t samples, int64_t channels, int64_t rows, int64_t columns, int64_t kernel_size,
                                 int64_t source_step, int64_t result_step, int64_t vector_bytes, int64_t lanes) {
  Tiling t{};
  t.whole = {0, samples, 0, rows, 0, columns, 0, ceil_div(channels, lanes)};
  t.tile.samples = 1;
  t.tile.columns = tile_columns(columns, kernel_size, source_step, result_step, vector_bytes);
  const int64_t images = samples * ceil_div(columns, t.tile.columns);
  const int64_t min_blocks = std::max<int64_t>(1, kMinTaskChannels / lanes);
  const int64_t min_rows = std::min(rows, 2 * kernel_size);

  t.tile.blocks = std::min(t.whole.blocks, kMaxTaskChannels / lanes);
  const auto row_tiles = [&] {
    const int64_t most = kTaskElements / (t.tile.columns * t.tile.blocks * lanes);
    return ceil_div(rows, std::clamp(most, min_rows, rows));
  };
  const auto tasks = [&] { return images * row_tiles() * ceil_div(t.whole.blocks, t.tile.blocks); };
  while (tasks() < kWantedTasks && t.tile.blocks > min_blocks)
    t.tile.blocks = std::max(min_blocks, ceil_div(t.tile.blocks, 2));
  const int64_t wanted = row_tiles() * ceil_div(kWantedTasks, std::max<int64_t>(1, tasks()));
  t.tile.rows = std::max(min_rows, ceil_div(rows, wanted));
  finish(t);

  // The last register block of a row may stick out of the tile.
  t.scratch_columns = (ceil_div(t.tile.columns, result_step) + kMaxPixels) * source_step + kernel_size;
  const int64_t result_columns = t.tile.columns + kMaxPixels * result_step;
  t.scratch_bytes = (kernel_size * t.scratch_columns + result_columns) * vector_bytes;
  return t;
}

// The tiles of a WeightGradient: tasks are (group, channel tile), a group being `boxes_per_group` boxes one after the
// other, whose sum is a partial result.
struct WeightGradientPlan {
  Tiling tiling;
  int64_t groups, boxes_per_group;
};

inline WeightGradientPlan weight_gradient_plan(int64_t samples, int64_t channels, int64_t rows, int64_t columns,
                                               int64_t kernel_size, int64_t stride, int64_t vector_bytes,
                                               int64_t lanes) {
  WeightGradientPlan plan{};
  Tiling& t = plan.tiling;
  t.whole = {0, samples, 0, rows, 0, columns, 0, ceil_div(channels, lanes)};
  t.tile.columns = tile_columns(columns, kernel_size, stride, 1, vector_bytes);
  t.tile.blocks = std::min(t.whole.blocks, std::max<int64_t>(1, kMinTaskChannels / lanes));
  const int64_t wanted = ceil_div(kWantedTasks, ceil_div(t.whole.blocks, t.tile.blocks));
  const int64_t images = samples * ceil_div(columns, t.tile.columns);
  // Few images are cut into rows; of small ones, several make a box, so that its sums are worth their upkeep.
  constexpr int64_t kBoxPositions = 1024;
  const int64_t row_tiles = ceil_div(wanted, std::max<int64_t>(1, images));
  t.tile.rows = std::max(std::min(rows, 2 * kernel_size), ceil_div(rows, row_tiles));
  t.tile.samples = std::clamp<int64_t>(kBoxPositions / (t.tile.rows * t.tile.columns), 1,
                                       std::max<int64_t>(1, ceil_div(samples, wanted)));
  finish(t);
  t.scratch_columns = (t.tile.columns - 1) * stride + kernel_size;
  t.scratch_bytes = (kernel_size * t.scratch_columns + t.tile.columns + kernel_size * kernel_size + 1) * vector_bytes;

  plan.boxes_per_group = std::max<int64_t>(1, ceil_div(t.box_tiles(), wanted));
  plan.groups = ceil_div(t.box_tiles(), plan.boxes_per_group);
  return plan;
}

}  // namespace convnext_kernels::depthwise_conv
