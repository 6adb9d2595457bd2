// GELU(x + bias) over rows, and its backward. Text for nvcc and for the host (common/machine.cuh).
//
// Memory bound: 16-byte accesses, several of them in flight in each thread, each tensor read or written once. A thread
// keeps its columns, so biases and the sums of the bias gradient live in registers; the sums of a block go to a
// workspace, and column_sum_kernel adds those up in a fixed order.
#pragma once
#include "common/column_sum.cuh"
#include "mlp/launch.cuh"

namespace convnext_kernels {

template <class T>
struct BiasGeluParams {
  const T* x;      // (rows, columns)
  Parameter bias;  // (columns) or absent
  T* y;            // (rows, columns)
  int64_t rows, columns;
};

template <class T>
struct BiasGeluBackwardParams {
  const T* grad;              // (rows, columns)
  const T* x;                 // (rows, columns)
  Parameter bias;             // (columns) or absent
  T* grad_x;                  // (rows, columns)
  Accumulation<T>* partials;  // (blocks along the rows, columns): sums of grad_x; null: not asked for
  int64_t rows, columns;
};

template <class T, int kVectorSize, Gelu kGelu>
__global__ void __launch_bounds__(kRowPassThreads, bias_gelu_tuning(false, sizeof(T)).blocks_per_sm)
    bias_gelu_kernel(const __grid_constant__ BiasGeluParams<T> params) {
  using A = Accumulation<T>;
  constexpr int kRows = bias_gelu_tuning(false, sizeof(T)).thread_rows;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVectorSize;
  if (column >= params.columns) return;
  A bias[kVectorSize];
  load_parameter(bias, params.bias, column);

  const auto compute = [&](const Vector<T, kVectorSize>& x, T* y) {
    A value[kVectorSize];
    unpack(value, x);
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) value[j] = gelu<T, kGelu>(value[j] + bias[j]);
    store(y, pack<T>(value));
  };
  RowWalk walk(params.rows, params.columns, column, kRows);
  const T* x_at = params.x + walk.offset;
  T* y_at = params.y + walk.offset;
  for (; walk.is_whole(); walk.next(), x_at += walk.step, y_at += walk.step) {
    Vector<T, kVectorSize> x[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) x[i] = load_streaming<T, kVectorSize>(x_at + i * walk.row_step);
#pragma unroll
    for (int i = 0; i < kRows; ++i) compute(x[i], y_at + i * walk.row_step);
  }
#pragma unroll 1
  for (; walk.has_row(); walk.next_row(), x_at += walk.row_step, y_at += walk.row_step)
    compute(load_streaming<T, kVectorSize>(x_at), y_at);
}

template <class T, int kVectorSize, Gelu kGelu>
__global__ void __launch_bounds__(kRowPassThreads, bias_gelu_tuning(true, sizeof(T)).blocks_per_sm)
    bias_gelu_backward_kernel(const __grid_constant__ BiasGeluBackwardParams<T> params) {
  using A = Accumulation<T>;
  constexpr int kRows = bias_gelu_tuning(true, sizeof(T)).thread_rows;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVectorSize;
  A sum[kVectorSize] = {};
  if (column < params.columns) {
    A bias[kVectorSize];
    load_parameter(bias, params.bias, column);
    const auto compute = [&](const Vector<T, kVectorSize>& x, const Vector<T, kVectorSize>& grad, T* grad_x) {
      A value[kVectorSize], gradient[kVectorSize];
      unpack(value, x);
      unpack(gradient, grad);
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) {
        gradient[j] *= gelu_derivative<T, kGelu>(value[j] + bias[j]);
        sum[j] += gradient[j];
      }
      store(grad_x, pack<T>(gradient));
    };
    RowWalk walk(params.rows, params.columns, column, kRows);
    const T* x_at = params.x + walk.offset;
    const T* grad_at = params.grad + walk.offset;
    T* grad_x_at = params.grad_x + walk.offset;
    for (; walk.is_whole(); walk.next(), x_at += walk.step, grad_at += walk.step, grad_x_at += walk.step) {
      Vector<T, kVectorSize> x[kRows], grad[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x[i] = load_streaming<T, kVectorSize>(x_at + i * walk.row_step);
        grad[i] = load_streaming<T, kVectorSize>(grad_at + i * walk.row_step);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) compute(x[i], grad[i], grad_x_at + i * walk.row_step);
    }
#pragma unroll 1
    for (; walk.has_row(); walk.next_row()) {
      compute(load_streaming<T, kVectorSize>(x_at), load_streaming<T, kVectorSize>(grad_at), grad_x_at);
      x_at += walk.row_step;
      grad_at += walk.row_step;
      grad_x_at += walk.row_step;
    }
  }
  if (!params.partials) return;

  SharedMemory shared;
  A* const sums = shared.take<A>(block_sum_elements(blockDim.x, blockDim.y, kVectorSize));
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * blockDim.x * kVectorSize;
  sum_of_block(sum, sums, first_column, params.columns, params.partials + blockIdx.y * params.columns);
}

// --- launches: from plan and parameters to the one kernel that fits. They do nothing where the plan is empty.

inline LaunchShape bias_gelu_shape(const RowPassPlan& plan, size_t shared_bytes, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(plan.column_blocks), static_cast<unsigned>(plan.row_blocks)), block_of(plan),
          shared_bytes, stream};
}

template <class T>
void launch_bias_gelu(const RowPassPlan& plan, const BiasGeluParams<T>& params, Gelu kind, cudaStream_t stream) {
  if (plan.row_blocks == 0) return;
  dispatch_gelu<T>(plan, kind, [&](auto size, auto gelu) {
    launch("bias_gelu", bias_gelu_kernel<T, decltype(size)::value, decltype(gelu)::value>,
           bias_gelu_shape(plan, 0, stream), params);
  });
}

// params.partials has room for plan.row_blocks rows; `grad_bias` gets their sums. Neither is used where it is null.
template <class T>
void launch_bias_gelu_backward(const RowPassPlan& plan, const BiasGeluBackwardParams<T>& params,
                               Accumulation<T>* grad_bias, Gelu kind, cudaStream_t stream) {
  using A = Accumulation<T>;
  if (plan.row_blocks == 0) return;
  dispatch_gelu<T>(plan, kind, [&](auto size, auto gelu) {
    launch("bias_gelu_backward", bias_gelu_backward_kernel<T, decltype(size)::value, decltype(gelu)::value>,
           bias_gelu_shape(plan, params.partials ? block_sum_bytes<A>(plan) : 0, stream), params);
  });
  if (params.partials)
    launch_column_sum("bias_gelu_backward", params.partials, grad_bias, plan.row_blocks, params.columns, stream);
}

}  // namespace convnext_kernels
