// Which sample a row belongs to, and the drop-path scale of that sample.
#pragma once
#include <algorithm>

#include "common/machine.cuh"

namespace convnext_kernels {

constexpr int64_t kMostChunkRows = int64_t{1} << 30;  // a row's number in its chunk and the sums below stay under 2^31

// For the rows of a chunk, numbered from 0. A division by the rows of a sample would cost a row as much as the rest of
// an elementwise pass; here it is one multiplication: n / d = n * ceil(2^s / d) / 2^s for n < 2^31, with 2^(s - 31) the
// first power of two that is not below d (Granlund and Montgomery 1994, Division by invariant integers using
// multiplication, section 4).
template <class A>
struct SampleRows {
  const A* scale = nullptr;  // of the chunk's first sample and the ones after it; null: every sample has 1
  uint32_t skipped = 0;      // rows of that sample before the chunk
  uint32_t multiplier = 0;
  int shift = 0;

  __host__ __device__ __forceinline__ int sample(int row) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(row) + skipped) * multiplier >> shift);
  }
  __device__ __forceinline__ A of(int row) const { return scale ? scale[sample(row)] : A(1); }
  // Rows of dropped samples are neither read nor counted: they may hold anything.
  __device__ __forceinline__ bool has(int row) const { return !scale || scale[sample(row)] != A(0); }
};

// For a chunk of at most kMostChunkRows rows from `first_row` on.
template <class A>
SampleRows<A> sample_rows(const A* sample_scale, int64_t first_row, int64_t rows_per_sample) {
  SampleRows<A> rows;
  if (!sample_scale) return rows;
  int64_t skipped = first_row % rows_per_sample;
  rows.scale = sample_scale + first_row / rows_per_sample;
  // Of a longer sample, only where it ends can matter, if it does within the chunk.
  if (rows_per_sample > kMostChunkRows) {
    skipped = std::max<int64_t>(kMostChunkRows - (rows_per_sample - skipped), 0);
    rows_per_sample = kMostChunkRows;
  }
  int bits = 0;
  while (int64_t{1} << bits < rows_per_sample) ++bits;
  rows.shift = 31 + bits;
  rows.multiplier = static_cast<uint32_t>(((uint64_t{1} << rows.shift) + static_cast<uint64_t>(rows_per_sample) - 1) /
                                          static_cast<uint64_t>(rows_per_sample));
  rows.skipped = static_cast<uint32_t>(skipped);
  return rows;
}

}  // namespace convnext_kernels
