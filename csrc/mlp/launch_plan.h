// How the passes over rows of the MLP are spread over a GPU: plain C++, without CUDA's types.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace convnext_kernels {

// A block covers block_columns vectors of a row, and block_rows rows at a time; its threads keep their columns, whose
// biases and gradient sums stay in registers, and walk down the rows.
struct RowPassPlan {
  int vector_size = 1;    // neighbouring elements a thread reads at once
  int block_columns = 0;  // threads along a row
  int block_rows = 0;     // rows of threads
  int column_blocks = 0;  // the grid along a row; the last block may reach over its end
  int row_blocks = 0;     // the grid along the rows of a group; 0: nothing to do
};

constexpr int kRowPassThreads = 256;  // the most a block has

// What a kernel was tuned to.
struct RowPassTuning {
  int thread_rows;    // rows of a thread whose loads are under way together
  int blocks_per_sm;  // blocks of kRowPassThreads that fit on a multiprocessor: 3 leave a thread 80 registers
  int waves;          // blocks started for each that fits: more of them even out the end
};

// A multiprocessor then has 36 KiB of loads under way in the forward, and 48 KiB in the backward, which loads two
// tensors and writes a row of partial sums a block. One more row a thread spills registers on sm_100 and sm_120.
constexpr RowPassTuning bias_gelu_tuning(bool backward, size_t element_bytes) {
  const int blocks_per_sm = element_bytes == 8 ? 2 : 3;
  return backward ? RowPassTuning{2, blocks_per_sm, 1} : RowPassTuning{3, blocks_per_sm, 4};
}

// The passes of layer_norm_mlp around its matrix products.
enum class RowPass { kActivation, kActivationBackward, kGrnSums, kGrnBackwardSums, kAddBranch, kBranchGrad };

// Loads under way as above. `heavy`: with GRN, whose factors take registers, or with a residual that is wider than the
// branch. A third block would then leave a thread too few registers; and where there are three sums a column.
constexpr RowPassTuning row_pass_tuning(RowPass pass, bool heavy, size_t element_bytes) {
  const int blocks_per_sm = heavy || element_bytes == 8 ? 2 : 3;
  switch (pass) {
    case RowPass::kActivation:
      return {3, blocks_per_sm, 4};
    case RowPass::kGrnSums:
      return {3, element_bytes == 8 ? 2 : 3, 1};
    case RowPass::kAddBranch:
      return {2, blocks_per_sm, 4};
    case RowPass::kGrnBackwardSums:
      return {2, 2, 1};
    default:
      return {2, blocks_per_sm, 1};
  }
}

// Several rows of threads where a row is short; as many as leave the fewest lanes of the block's warps without work.
inline int row_pass_block_rows(int block_columns) {
  constexpr int kWarp = 32;
  int best = 1;
  double best_use = 0;
  for (int rows = 1; rows * block_columns <= kRowPassThreads; ++rows) {
    const int threads = rows * block_columns;
    const double use = static_cast<double>(threads) / ((threads + kWarp - 1) / kWarp * kWarp);
    // A warp's worth of rows less is no loss, but blocks of a warp or two are too small to fill a multiprocessor.
    if (use >= best_use || 2 * best * block_columns < kRowPassThreads) {
      best = rows;
      best_use = use;
    }
  }
  return best;
}

// `groups` stretches of `rows` rows each: images, where something belongs to an image, else one for all rows.
inline RowPassPlan plan_row_pass(const RowPassTuning& tuning, int64_t groups, int64_t rows, int64_t columns,
                                 int vector_size, int multiprocessors) {
  RowPassPlan plan;
  if (groups == 0 || rows == 0 || columns == 0) return plan;
  plan.vector_size = vector_size;
  const int64_t vectors = columns / vector_size;
  const int64_t column_blocks = (vectors + kRowPassThreads - 1) / kRowPassThreads;
  plan.column_blocks = static_cast<int>(column_blocks);
  plan.block_columns = static_cast<int>((vectors + column_blocks - 1) / column_blocks);
  plan.block_rows = row_pass_block_rows(plan.block_columns);
  const int threads = plan.block_columns * plan.block_rows;
  const int64_t resident = static_cast<int64_t>(multiprocessors) * (tuning.blocks_per_sm * kRowPassThreads / threads);
  const int64_t rows_a_step = static_cast<int64_t>(plan.block_rows) * tuning.thread_rows;
  const int64_t steps = (rows + rows_a_step - 1) / rows_a_step;
  const int64_t most = std::clamp<int64_t>(resident * tuning.waves / column_blocks / groups, 1, 65535);
  // As few blocks as finish no later than the most would: fewer partial sums for the same number of steps.
  const int64_t steps_each = (steps + most - 1) / most;
  plan.row_blocks = static_cast<int>((steps + steps_each - 1) / steps_each);
  return plan;
}

// `aligned`: every tensor's memory starts at a multiple of 16 bytes. fp64 is there to check the others against:
// elements one by one are enough.
inline int row_pass_vector_size(int64_t columns, size_t element_bytes, bool aligned) {
  const int64_t vector_size = static_cast<int64_t>(16 / element_bytes);
  return aligned && element_bytes < 8 && columns % vector_size == 0 ? static_cast<int>(vector_size) : 1;
}

inline RowPassPlan plan_bias_gelu(bool backward, int64_t rows, int64_t columns, size_t element_bytes, bool aligned,
                                  int multiprocessors) {
  return plan_row_pass(bias_gelu_tuning(backward, element_bytes), 1, rows, columns,
                       row_pass_vector_size(columns, element_bytes, aligned), multiprocessors);
}

}  // namespace convnext_kernels
