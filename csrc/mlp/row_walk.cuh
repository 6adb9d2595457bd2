// How threads go through a matrix of rows: each keeps its columns and walks down the rows, so that what belongs to a
// column (a bias, a scale, the sums of a gradient) stays in registers.
#pragma once
#include "common/machine.cuh"

namespace convnext_kernels {

// The walk of a thread: steps of several rows, blockDim.y apart, the blocks of a group sharing its rows; and single
// rows where a whole step would reach over the end.
struct RowWalk {
  int64_t offset;    // of its first element
  int64_t row_step;  // elements between its rows of one step
  int64_t step;      // elements between steps

  // Block `block` of `blocks` for rows `first` to `end` of a matrix.
  __device__ __forceinline__ RowWalk(int64_t first, int64_t end, unsigned block, unsigned blocks, int64_t columns,
                                     int64_t column, int rows_a_step) {
    const int64_t row = first + static_cast<int64_t>(block) * blockDim.y * rows_a_step + threadIdx.y;
    offset = row * columns + column;
    row_step = blockDim.y * columns;
    step = blocks * rows_a_step * row_step;
    rows_left_ = end - row;
    last_of_step_ = static_cast<int>(blockDim.y) * (rows_a_step - 1);
    rows_of_blocks_ = static_cast<int>(blocks * blockDim.y) * rows_a_step;
  }
  // All rows, over blockIdx.y.
  __device__ __forceinline__ RowWalk(int64_t rows, int64_t columns, int64_t column, int rows_a_step)
      : RowWalk(0, rows, blockIdx.y, gridDim.y, columns, column, rows_a_step) {}

  __device__ __forceinline__ bool is_whole() const { return rows_left_ > last_of_step_; }
  __device__ __forceinline__ void next() { rows_left_ -= rows_of_blocks_; }
  // After the last whole step: fewer rows than one step has are left.
  __device__ __forceinline__ bool has_row() const { return rows_left_ > 0; }
  __device__ __forceinline__ void next_row() { rows_left_ -= blockDim.y; }
  __device__ __forceinline__ int64_t rows_left() const { return rows_left_; }  // from its next row to the end

 private:
  int64_t rows_left_;
  int last_of_step_, rows_of_blocks_;
};

// A row's vector, or zeros in place of a dropped sample's.
template <class T, int kVectorSize>
__device__ __forceinline__ Vector<T, kVectorSize> load_live(const T* from, bool live) {
  Vector<T, kVectorSize> vector;
  if (live) {
    vector = load_streaming<T, kVectorSize>(from);
  } else {
    std::memset(static_cast<void*>(&vector), 0, sizeof(vector));
  }
  return vector;
}

// Elements of shared memory that sum_of_block takes.
constexpr size_t block_sum_elements(int block_columns, int block_rows, int vector_size) {
  return static_cast<size_t>(block_columns) * block_rows * vector_size;
}

// to[c] = the sums of the block's threads that keep column c, added up from the first row of threads to the last. Every
// thread of the block calls it; `first_column` is the block's.
template <int kVectorSize, class A>
__device__ __forceinline__ void sum_of_block(const A (&sum)[kVectorSize], A* shared, int64_t first_column,
                                             int64_t columns, A* to) {
  const int width = blockDim.x * kVectorSize;
#pragma unroll
  for (int j = 0; j < kVectorSize; ++j) shared[threadIdx.y * width + threadIdx.x * kVectorSize + j] = sum[j];
  __syncthreads();
  for (int c = threadIdx.y * blockDim.x + threadIdx.x; c < width; c += blockDim.x * blockDim.y) {
    if (first_column + c >= columns) break;
    A total = 0;
    for (unsigned r = 0; r < blockDim.y; ++r) total += shared[r * width + c];
    to[first_column + c] = total;
  }
}

}  // namespace convnext_kernels
