// How layer_norm and its backward are spread over a GPU: plain C++, without CUDA's types.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "common/chip.h"

namespace convnext_kernels {

constexpr int kLayerNormThreads = 256;             // the most a block has
constexpr int kLayerNormMostVectors = 16;          // of a thread
constexpr int kLayerNormLongBlocks = 4;            // of a multiprocessor, for long rows
constexpr int64_t kLayerNormBlockOverhead = 1024;  // shared memory the system takes of each block

// A row is held in registers from its statistics to its result: by a few lanes of a warp, or by whole warps, each
// thread with `vectors` vectors, row_threads apart. Rows that are too long for that are read again, by a block each.
struct LayerNormPlan {
  int vector_size = 1;  // neighbouring elements a thread reads at once
  int vectors = 0;      // of a thread; 0: a long row
  int row_threads = 0;  // a power of two up to a warp, or whole warps
  int block_rows = 0;   // rows of a block at a time
  int blocks = 0;       // 0: nothing to do
  int sum_blocks = 0;   // of the backward: blocks along the rows that sum the gradients of weight and bias
  int64_t shared_bytes = 0;

  // Rows of each workspace for partial sums.
  constexpr int64_t partial_rows() const { return sum_blocks; }
  constexpr int threads() const { return row_threads * block_rows; }
};

// Vectors of a thread there are kernels for. 8 elements of 16 bits and 4 of 32 are 16 bytes; of two types the wider one
// has 16 bytes a vector. Rows that are not a multiple of that (or memory that is not aligned) go by 4, then by single
// elements. 3 divides ConvNeXt's widths (96 = 12 vectors: 4 lanes, 8 rows a warp, none idle), 5 those of its small
// ones.
constexpr bool layer_norm_has_kernel(bool backward, int vector_size, int vectors) {
  if (vector_size == 1) return vectors == 4 || vectors == 16;
  // The backward's sums take two registers an element: 24 elements fit twice 256 threads, 32 would spill.
  if (vector_size == 8 && backward) return vectors == 2 || vectors == 3;
  return vectors >= 2 && vectors <= 5;
}

// Blocks of kLayerNormThreads that fit on a multiprocessor by their registers, for kernels that hold so many elements
// of a row a thread: what __launch_bounds__ asks for.
constexpr int layer_norm_blocks_per_sm(bool backward, int vector_size, int elements, int accumulation_bytes) {
  if (accumulation_bytes == 8) return backward ? 1 : 2;  // fp64 is there to check the others against
  if (vector_size == 1 && elements > 4) return backward ? 1 : 3;
  if (backward) return elements > 12 ? 2 : 3;  // 128 registers a thread, or 80
  return elements > 24 ? 2 : 4;                // 128, or 64
}

// The widest vector that both types and the row allow. `aligned`: every tensor begins at a multiple of 16 bytes.
constexpr int layer_norm_vector_size(int64_t channels, size_t bytes, size_t other_bytes, bool aligned) {
  const size_t widest = std::max(bytes, other_bytes);
  if (!aligned || widest == 8) return 1;
  if (widest == 2 && channels % 8 == 0) return 8;
  return channels % 4 == 0 ? 4 : 1;
}

// Threads that hold a row with `vectors` of its `row_vectors` each.
constexpr int64_t layer_norm_row_threads(int64_t row_vectors, int vectors) {
  constexpr int64_t kWarp = 32;
  const int64_t needed = (row_vectors + vectors - 1) / vectors;
  if (needed > kWarp) return (needed + kWarp - 1) / kWarp * kWarp;
  int64_t threads = 1;
  while (threads < needed) threads *= 2;
  return threads;
}

// Shared memory of a block: the parameters of all slots in the accumulation type, what warps of the same row tell each
// other, and in the backward the sums of every row of threads.
constexpr int64_t layer_norm_shared_bytes(bool backward, int64_t slots, int64_t block_sums,
                                          int64_t accumulation_bytes) {
  const auto piece = [&](int64_t elements) { return (elements * accumulation_bytes + 127) / 128 * 128; };
  const int64_t warps = piece(2 * kLayerNormThreads / 32);
  return backward ? piece(slots) + 2 * warps + piece(block_sums) : 2 * piece(slots) + warps;
}

inline LayerNormPlan plan_layer_norm_of(bool backward, int64_t rows, int64_t channels, size_t bytes, size_t other_bytes,
                                        bool aligned, const Chip& chip) {
  constexpr int64_t kMostSharedBytes = 64 * 1024;
  LayerNormPlan plan;
  if (rows == 0 || channels == 0) return plan;
  const int accumulation_bytes = std::max(bytes, other_bytes) == 8 ? 8 : 4;
  plan.vector_size = layer_norm_vector_size(channels, bytes, other_bytes, aligned);
  const int64_t row_vectors = channels / plan.vector_size;

  // As few slots without a vector as can be. Among equals the most vectors a thread, as those are under way together;
  // but single elements are read a warp's width at a time.
  int64_t least_slots = 0;
  for (int vectors = 1; vectors <= kLayerNormMostVectors; ++vectors) {
    if (!layer_norm_has_kernel(backward, plan.vector_size, vectors)) continue;
    const int64_t threads = layer_norm_row_threads(row_vectors, vectors), slots = threads * vectors;
    if (threads > kLayerNormThreads) continue;
    // A lane with a row to itself would read pieces of it far apart.
    if (threads == 1 && plan.vector_size > 1 && row_vectors > 2) continue;
    const int64_t shared = layer_norm_shared_bytes(backward, slots * plan.vector_size,
                                                   kLayerNormThreads / threads * channels, accumulation_bytes);
    if (shared > kMostSharedBytes) continue;
    if (plan.vectors && (slots > least_slots || (slots == least_slots && plan.vector_size == 1))) continue;
    least_slots = slots;
    plan.vectors = vectors;
    plan.row_threads = static_cast<int>(threads);
    plan.shared_bytes = shared;
  }
  if (plan.vectors == 0) {  // a long row
    plan.vector_size = 1;
    plan.row_threads = kLayerNormThreads;
    plan.block_rows = 1;
    plan.shared_bytes = layer_norm_shared_bytes(true, 0, 0, accumulation_bytes);
    const int64_t most = std::max<int64_t>(int64_t{chip.multiprocessors} * kLayerNormLongBlocks, 1);
    plan.blocks = static_cast<int>(std::min(rows, most));
    const int64_t column_blocks = (channels + kLayerNormThreads - 1) / kLayerNormThreads;
    if (backward) plan.sum_blocks = static_cast<int>(std::min(rows, (most + column_blocks - 1) / column_blocks));
    return plan;
  }

  plan.block_rows = kLayerNormThreads / plan.row_threads;
  const int64_t fit = chip.shared_bytes_per_multiprocessor / (plan.shared_bytes + kLayerNormBlockOverhead);
  const int elements = plan.vector_size * plan.vectors;
  const int64_t resident =
      std::clamp<int64_t>(fit, 1, layer_norm_blocks_per_sm(backward, plan.vector_size, elements, accumulation_bytes));
  const int64_t steps = (rows + plan.block_rows - 1) / plan.block_rows;
  const int64_t most = std::max<int64_t>(chip.multiprocessors * resident, 1);
  // As few blocks as finish no later than the most would: fewer partial sums for the same number of steps.
  const int64_t steps_each = (steps + most - 1) / most;
  plan.blocks = static_cast<int>((steps + steps_each - 1) / steps_each);
  if (backward) plan.sum_blocks = plan.blocks;
  return plan;
}

// For x and y with elements of so many bytes; `aligned`: both begin at multiples of 16 bytes.
inline LayerNormPlan plan_layer_norm(int64_t rows, int64_t channels, size_t x_bytes, size_t y_bytes, bool aligned,
                                     const Chip& chip) {
  return plan_layer_norm_of(false, rows, channels, x_bytes, y_bytes, aligned, chip);
}

// For grad, and x and grad_x; `aligned`: all begin at multiples of 16 bytes.
inline LayerNormPlan plan_layer_norm_backward(int64_t rows, int64_t channels, size_t grad_bytes, size_t x_bytes,
                                              bool aligned, const Chip& chip) {
  return plan_layer_norm_of(true, rows, channels, grad_bytes, x_bytes, aligned, chip);
}

}  // namespace convnext_kernels
