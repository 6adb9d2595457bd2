// The passes over the hidden rows of layer_norm_mlp: GELU, GRN's sums, GELU with GRN applied, and the backward. Text
// for nvcc and for the host (common/machine.cuh).
//
// Memory bound, as bias_gelu (kernels.cuh). GRN needs an image's norms before it can be applied, so that its passes
// come in twos: sums of an image, which read the hidden rows and write next to nothing, and the application, which
// computes GELU again rather than read it back: three times a hidden tensor's bytes instead of four.
#pragma once
#include "mlp/launch.cuh"
#include "mlp/passes.cuh"

namespace convnext_kernels {

// A thread's place: blockIdx.x is a part of a group, of which there are `parts` a group; blockIdx.y a stretch of
// columns.
struct GroupBlock {
  unsigned group, part;

  __device__ __forceinline__ explicit GroupBlock(int parts)
      : group(blockIdx.x / static_cast<unsigned>(parts)), part(blockIdx.x - group * parts) {}
  __device__ __forceinline__ RowWalk walk(const GroupedRows& rows, int parts, int64_t column, int rows_a_step) const {
    const int64_t first = group * rows.group_rows;
    return RowWalk(first, first + rows.group_rows, part, parts, rows.columns, column, rows_a_step);
  }
  // The row that `walk` is at, in the chunk.
  __device__ __forceinline__ int row(const GroupedRows& rows, const RowWalk& walk) const {
    return static_cast<int>((group + int64_t{1}) * rows.group_rows - walk.rows_left());
  }
};

// y = GELU(x), or GRN of it; zeros where the sample is dropped.
template <class T, int kVectorSize, Gelu kGelu, bool kGrn>
__global__ void __launch_bounds__(kRowPassThreads, row_pass_tuning(RowPass::kActivation, kGrn, sizeof(T)).blocks_per_sm)
    activation_kernel(const __grid_constant__ ActivationParams<T> params, int parts) {
  const GroupBlock block(parts);
  using A = Accumulation<T>;
  constexpr int kRows = row_pass_tuning(RowPass::kActivation, kGrn, sizeof(T)).thread_rows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * blockDim.x * kVectorSize + threadIdx.x * kVectorSize;
  if (column >= params.rows.columns) return;
  A factor[kVectorSize], bias[kVectorSize];
  if constexpr (kGrn) {
    load_parameter(bias, params.grn.bias, column);
    const A* const factors = params.grn.factors + block.group * params.rows.columns + column;
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) factor[j] = factors[j];
  }

  const auto compute = [&](const Vector<T, kVectorSize>& x, bool live, int64_t offset) {
    A value[kVectorSize];
    unpack(value, x);
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) {
      value[j] = gelu<T, kGelu>(value[j]);
      if constexpr (kGrn) value[j] = live ? value[j] * factor[j] + bias[j] : A(0);
    }
    store(params.y + offset, pack<T>(value));
    if (!live && params.dropped) store(params.dropped + offset, x);
  };
  RowWalk walk = block.walk(params.rows, parts, column, kRows);
  int row = block.row(params.rows, walk);
  const int rows_of_group = parts * static_cast<int>(blockDim.y) * kRows;
  for (; walk.is_whole(); walk.next(), walk.offset += walk.step, row += rows_of_group) {
    Vector<T, kVectorSize> x[kRows];
    bool live[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) live[i] = params.samples.has(row + i * static_cast<int>(blockDim.y));
#pragma unroll
    for (int i = 0; i < kRows; ++i)
      x[i] = load_live<T, kVectorSize>(params.x + walk.offset + i * walk.row_step, live[i]);
#pragma unroll
    for (int i = 0; i < kRows; ++i) compute(x[i], live[i], walk.offset + i * walk.row_step);
  }
#pragma unroll 1
  for (; walk.has_row(); walk.next_row(), walk.offset += walk.row_step, row += blockDim.y) {
    const bool live = params.samples.has(row);
    compute(load_live<T, kVectorSize>(params.x + walk.offset, live), live, walk.offset);
  }
}

template <class T, int kVectorSize, Gelu kGelu, bool kBackward>
__global__ void __launch_bounds__(
    kRowPassThreads,
    row_pass_tuning(kBackward ? RowPass::kGrnBackwardSums : RowPass::kGrnSums, false, sizeof(T)).blocks_per_sm)
    grn_sums_kernel(const __grid_constant__ GrnSumsParams<T> params, int parts) {
  const GroupBlock block(parts);
  using A = Accumulation<T>;
  constexpr RowPass kPass = kBackward ? RowPass::kGrnBackwardSums : RowPass::kGrnSums;
  constexpr int kRows = row_pass_tuning(kPass, false, sizeof(T)).thread_rows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * blockDim.x * kVectorSize;
  const int64_t column = first_column + threadIdx.x * kVectorSize;
  A square[kVectorSize] = {}, product[kVectorSize] = {}, grad_sum[kVectorSize] = {};
  const auto add = [&](const Vector<T, kVectorSize>& x, const Vector<T, kVectorSize>& grad) {
    A value[kVectorSize], gradient[kVectorSize];
    unpack(value, x);
    if constexpr (kBackward) unpack(gradient, grad);
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) {
      const A g = gelu<T, kGelu>(value[j]);
      square[j] += g * g;
      if constexpr (kBackward) {
        product[j] += gradient[j] * g;
        grad_sum[j] += gradient[j];
      }
    }
  };
  // A dropped image adds nothing: its sums are 0. Here it is for a whole block to skip.
  RowWalk walk = block.walk(params.rows, parts, column, kRows);
  if (column < params.rows.columns && params.samples.has(static_cast<int>(block.group * params.rows.group_rows))) {
    for (; walk.is_whole(); walk.next(), walk.offset += walk.step) {
      Vector<T, kVectorSize> x[kRows], grad[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x[i] = load_streaming<T, kVectorSize>(params.x + walk.offset + i * walk.row_step);
        if constexpr (kBackward)
          grad[i] = load_streaming<T, kVectorSize>(params.grad + walk.offset + i * walk.row_step);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) add(x[i], grad[i]);
    }
#pragma unroll 1
    for (; walk.has_row(); walk.next_row(), walk.offset += walk.row_step) {
      Vector<T, kVectorSize> x = load_streaming<T, kVectorSize>(params.x + walk.offset), grad;
      if constexpr (kBackward) grad = load_streaming<T, kVectorSize>(params.grad + walk.offset);
      add(x, grad);
    }
  }
  SharedMemory shared;
  const size_t piece = block_sum_elements(blockDim.x, blockDim.y, kVectorSize);
  const int64_t part = static_cast<int64_t>(blockIdx.x) * params.rows.columns;
  sum_of_block(square, shared.take<A>(piece), first_column, params.rows.columns, params.squares + part);
  if constexpr (kBackward) {
    sum_of_block(product, shared.take<A>(piece), first_column, params.rows.columns, params.products + part);
    sum_of_block(grad_sum, shared.take<A>(piece), first_column, params.rows.columns, params.grads + part);
  }
}

// Zeros where the sample is dropped.
template <class T, int kVectorSize, Gelu kGelu, bool kGrn>
__global__ void __launch_bounds__(kRowPassThreads,
                                  row_pass_tuning(RowPass::kActivationBackward, kGrn, sizeof(T)).blocks_per_sm)
    activation_backward_kernel(const __grid_constant__ ActivationBackwardParams<T> params, int parts) {
  const GroupBlock block(parts);
  using A = Accumulation<T>;
  constexpr int kRows = row_pass_tuning(RowPass::kActivationBackward, kGrn, sizeof(T)).thread_rows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.y) * blockDim.x * kVectorSize;
  const int64_t column = first_column + threadIdx.x * kVectorSize;
  A sum[kVectorSize] = {};
  if (column < params.rows.columns) {
    A factor[kVectorSize], feedback[kVectorSize], bias[kVectorSize];
    if constexpr (kGrn) {
      load_parameter(bias, params.grn.bias, column);
      const int64_t at = block.group * params.rows.columns + column;
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) {
        factor[j] = params.grn.factors[at + j];
        feedback[j] = params.grn.feedback[at + j];
      }
    }
    const auto compute = [&](const Vector<T, kVectorSize>& x, const Vector<T, kVectorSize>& grad, bool live,
                             int64_t offset) {
      A value[kVectorSize], gradient[kVectorSize];
      unpack(value, x);
      unpack(gradient, grad);
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) {
        const A slope = gelu_derivative<T, kGelu>(value[j]);
        value[j] = gelu<T, kGelu>(value[j]);
        if constexpr (kGrn) {
          gradient[j] = gradient[j] * factor[j] + value[j] * feedback[j];
          value[j] = value[j] * factor[j] + bias[j];
        }
        // By selection: a factor that is not finite must not reach a dropped sample.
        gradient[j] = live ? gradient[j] * slope : A(0);
        if constexpr (kGrn) value[j] = live ? value[j] : A(0);
      }
      const Vector<T, kVectorSize> rounded = pack<T>(gradient);
      store(params.grad_x + offset, rounded);
      if (params.y) store(params.y + offset, pack<T>(value));
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) sum[j] += to_accumulation(rounded.element[j]);
    };
    RowWalk walk = block.walk(params.rows, parts, column, kRows);
    int row = block.row(params.rows, walk);
    const int rows_of_group = parts * static_cast<int>(blockDim.y) * kRows;
    for (; walk.is_whole(); walk.next(), walk.offset += walk.step, row += rows_of_group) {
      Vector<T, kVectorSize> x[kRows], grad[kRows];
      bool live[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) live[i] = params.samples.has(row + i * static_cast<int>(blockDim.y));
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        x[i] = load_live<T, kVectorSize>(params.x + walk.offset + i * walk.row_step, live[i]);
        grad[i] = load_live<T, kVectorSize>(params.grad + walk.offset + i * walk.row_step, live[i]);
      }
#pragma unroll
      for (int i = 0; i < kRows; ++i) compute(x[i], grad[i], live[i], walk.offset + i * walk.row_step);
    }
#pragma unroll 1
    for (; walk.has_row(); walk.next_row(), walk.offset += walk.row_step, row += blockDim.y) {
      const bool live = params.samples.has(row);
      const auto x = load_live<T, kVectorSize>(params.x + walk.offset, live);
      compute(x, load_live<T, kVectorSize>(params.grad + walk.offset, live), live, walk.offset);
    }
  }
  if (!params.partials) return;
  SharedMemory shared;
  A* const sums = shared.take<A>(block_sum_elements(blockDim.x, blockDim.y, kVectorSize));
  sum_of_block(sum, sums, first_column, params.rows.columns, params.partials + blockIdx.x * params.rows.columns);
}

// --- launches

inline LaunchShape grouped_shape(const RowPassPlan& plan, int64_t groups, size_t shared_bytes, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(plan.row_blocks * groups), static_cast<unsigned>(plan.column_blocks)),
          block_of(plan), shared_bytes, stream};
}

template <class T>
void launch_activation(const char* op, const RowPassPlan& plan, const ActivationParams<T>& params, Gelu kind,
                       cudaStream_t stream) {
  if (plan.row_blocks == 0) return;
  dispatch_gelu<T>(plan, kind, [&](auto size, auto gelu) {
    constexpr int kSize = decltype(size)::value;
    constexpr Gelu kGelu = decltype(gelu)::value;
    launch(op,
           params.grn.factors ? activation_kernel<T, kSize, kGelu, true> : activation_kernel<T, kSize, kGelu, false>,
           grouped_shape(plan, params.rows.groups, 0, stream), params, plan.row_blocks);
  });
}

template <class T>
void launch_grn_sums(const char* op, const RowPassPlan& plan, const GrnSumsParams<T>& params, Gelu kind,
                     cudaStream_t stream) {
  if (plan.row_blocks == 0) return;
  const size_t bytes = block_sum_bytes<Accumulation<T>>(plan) * (params.grad ? 3 : 1);
  dispatch_gelu<T>(plan, kind, [&](auto size, auto gelu) {
    constexpr int kSize = decltype(size)::value;
    constexpr Gelu kGelu = decltype(gelu)::value;
    launch(op, params.grad ? grn_sums_kernel<T, kSize, kGelu, true> : grn_sums_kernel<T, kSize, kGelu, false>,
           grouped_shape(plan, params.rows.groups, bytes, stream), params, plan.row_blocks);
  });
}

template <class T>
void launch_activation_backward(const char* op, const RowPassPlan& plan, const ActivationBackwardParams<T>& params,
                                Gelu kind, cudaStream_t stream) {
  if (plan.row_blocks == 0) return;
  const size_t bytes = params.partials ? block_sum_bytes<Accumulation<T>>(plan) : 0;
  dispatch_gelu<T>(plan, kind, [&](auto size, auto gelu) {
    constexpr int kSize = decltype(size)::value;
    constexpr Gelu kGelu = decltype(gelu)::value;
    launch(op,
           params.grn.factors ? activation_backward_kernel<T, kSize, kGelu, true>
                              : activation_backward_kernel<T, kSize, kGelu, false>,
           grouped_shape(plan, params.rows.groups, bytes, stream), params, plan.row_blocks);
  });
}

}  // namespace convnext_kernels
