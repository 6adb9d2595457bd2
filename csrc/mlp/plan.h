// How many rows the MLP takes through its matrix products at a time on the CPU. Plain functions of the shape.
#pragma once
#include <algorithm>
#include <cstdint>

#include "mlp/chunk_plan.h"

namespace convnext_kernels {

// A chunk's hidden values should stay in the last-level cache between the passes over them, but matrix products with
// few rows are slow (bf16, C = 96, in GFLOP/s: 200 at 128 rows, 480 at 512, 690 at 2048), and every chunk adds its
// gradients of the weights to the total.
constexpr int64_t kChunkBytes = int64_t{4} << 20;
constexpr int64_t kMinChunkRows = 1024;

// `unit` rows stay together: an image with GRN, else 1. A chunk is never less than a unit. `row_bytes` of workspace and
// `hidden_bytes` of one hidden tensor are those of one row.
inline int64_t mlp_chunk_rows(int64_t rows, int64_t unit, int64_t hidden_bytes, int64_t row_bytes) {
  const int64_t wanted = std::min(std::max(kChunkBytes / hidden_bytes, kMinChunkRows), kMaxWorkspaceBytes / row_bytes);
  const int64_t units = std::max<int64_t>(ceil_divide(rows, unit), 1);
  const int64_t chunks = ceil_divide(units, std::max<int64_t>(wanted / unit, 1));
  return ceil_divide(units, chunks) * unit;  // of about the same size
}

}  // namespace convnext_kernels
