// How many rows layer_norm_mlp takes through its matrix products at a time on a GPU. Plain functions of the shape.
#pragma once
#include <algorithm>
#include <cstdint>

#include "common/row_groups.h"

namespace convnext_kernels {

constexpr int64_t kMaxWorkspaceBytes = int64_t{256} << 20;

// Bytes of workspace: of a row, of an image beyond its rows (with GRN), and of the call whatever the chunk.
struct MlpWorkspace {
  int64_t row_bytes = 0, image_bytes = 0, call_bytes = 0;
};

// Matrix products like many rows, and each chunk costs launches and another sum over the gradients of the weights: as
// many rows as `most_bytes` of workspace allow, in chunks of about the same size. `unit` rows stay together: an image
// with GRN, else 1. At least one image, or kLeastRows, where even the parameters leave no room for them; at most
// `most_rows`, if that is as much as a unit.
inline int64_t mlp_cuda_chunk_rows(int64_t rows, int64_t unit, const MlpWorkspace& workspace, int64_t most_bytes,
                                   int64_t most_rows) {
  constexpr int64_t kLeastRows = 1024;
  constexpr int64_t kTile = 256;  // of the matrix products, along the rows
  const int64_t room = std::max<int64_t>(most_bytes - workspace.call_bytes, 0);
  const int64_t unit_bytes = unit * workspace.row_bytes + workspace.image_bytes;
  const int64_t wanted = std::max(room / unit_bytes, workspace.image_bytes == 0 ? kLeastRows : 1);
  const int64_t most_units = std::max<int64_t>(std::min(wanted, most_rows / unit), 1);
  const int64_t units = std::max<int64_t>(ceil_divide(rows, unit), 1);
  const int64_t chunks = ceil_divide(units, most_units);
  const int64_t units_each = ceil_divide(units, chunks);
  // Whole tiles, where the room allows.
  const int64_t in_tiles = ceil_divide(units_each, kTile) * kTile;
  return (unit == 1 && in_tiles <= most_units ? std::min(in_tiles, units) : units_each) * unit;
}

}  // namespace convnext_kernels
