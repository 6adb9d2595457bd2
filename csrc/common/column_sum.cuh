// The second half of every reduction over rows: partial sums, one row of them a block, to the sums.
#pragma once
#include "common/machine.cuh"

namespace convnext_kernels {

constexpr int kColumnSumRows = 32;  // rows of threads: each warp reads 32 neighbouring columns

template <class A>
constexpr size_t column_sum_shared_bytes() {
  return shared_piece(sizeof(A) * kColumnSumRows * (kWarpSize + 1));
}

// sums[c] = the sum over r of partials[r][c], in an order that depends on `rows` only; or added to what `sums` holds,
// where `add`. Grid: columns / 32.
template <class A>
__global__ void __launch_bounds__(kWarpSize* kColumnSumRows)
    column_sum_kernel(const A* __restrict__ partials, A* __restrict__ sums, int64_t rows, int64_t columns, bool add) {
  constexpr int kPadded = kWarpSize + 1;  // the transposed read below meets every bank once
  SharedMemory shared;
  A* const tile = shared.take<A>(kColumnSumRows * kPadded);
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kWarpSize;
  const int64_t column = first_column + threadIdx.x;
  A sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < rows; row += kColumnSumRows) sum += partials[row * columns + column];
  }
  tile[threadIdx.y * kPadded + threadIdx.x] = sum;
  __syncthreads();
  // Warp y now adds up column y.
  const A total = warp_sum(tile[threadIdx.x * kPadded + threadIdx.y]);
  if (threadIdx.x == 0 && first_column + threadIdx.y < columns) {
    A* const to = sums + first_column + threadIdx.y;
    *to = add ? *to + total : total;
  }
}

template <class A>
void launch_column_sum(const char* op, const A* partials, A* sums, int64_t rows, int64_t columns, cudaStream_t stream,
                       bool add = false) {
  const LaunchShape shape{dim3(static_cast<unsigned>((columns + kWarpSize - 1) / kWarpSize)),
                          dim3(kWarpSize, kColumnSumRows), column_sum_shared_bytes<A>(), stream};
  launch(op, column_sum_kernel<A>, shape, partials, sums, rows, columns, add);
}

}  // namespace convnext_kernels
