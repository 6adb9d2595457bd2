// Layer scale, drop path and residual, and their backward: rows of channels. Text for nvcc and for the host
// (common/machine.cuh). Memory bound, as bias_gelu (kernels.cuh).
#pragma once
#include "mlp/launch.cuh"
#include "mlp/passes.cuh"
#include "mlp/pieces.cuh"

namespace convnext_kernels {

// y = residual + sample_scale * layer_scale * branch; where the sample is dropped, the residual alone.
template <class T, class R, class Y, int kVectorSize>
__global__ void __launch_bounds__(kRowPassThreads,
                                  row_pass_tuning(RowPass::kAddBranch, sizeof(Y) > sizeof(T), sizeof(T)).blocks_per_sm)
    add_branch_kernel(const __grid_constant__ AddBranchParams<T> params) {
  using A = Accumulation<T>;
  using Residual = Pieces<R, A, kVectorSize>;
  constexpr int kRows = row_pass_tuning(RowPass::kAddBranch, sizeof(Y) > sizeof(T), sizeof(T)).thread_rows;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kVectorSize;
  if (column >= params.channels) return;
  A layer_scale[kVectorSize];
  load_parameter(layer_scale, params.layer_scale, column);
  if (!params.layer_scale.data) {
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) layer_scale[j] = 1;
  }

  const auto compute = [&](const Vector<T, kVectorSize>& branch, const Residual& residual, A scale, int64_t offset) {
    A value[kVectorSize];
    unpack(value, branch);
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) {
      // By selection: neither the branch nor a layer scale that is not finite must reach a dropped sample.
      value[j] = scale == A(0) ? A(0) : value[j] * scale * layer_scale[j];
      if (params.residual.data) value[j] += residual[j];  // else -0 would become 0
    }
    Pieces<Y, A, kVectorSize>::store_rounded(params.y, params.y_type, offset, value);
  };
  RowWalk walk(params.rows, params.channels, column, kRows);
  int row = static_cast<int>(params.rows - walk.rows_left());
  const int rows_of_grid = static_cast<int>(gridDim.y * blockDim.y) * kRows;
  for (; walk.is_whole(); walk.next(), walk.offset += walk.step, row += rows_of_grid) {
    Vector<T, kVectorSize> branch[kRows];
    Residual residual[kRows];
    A scale[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) scale[i] = params.samples.of(row + i * static_cast<int>(blockDim.y));
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t offset = walk.offset + i * walk.row_step;
      branch[i] = load_live<T, kVectorSize>(params.branch + offset, scale[i] != A(0));
      residual[i].load(params.residual, offset, params.residual.data != nullptr);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) compute(branch[i], residual[i], scale[i], walk.offset + i * walk.row_step);
  }
#pragma unroll 1
  for (; walk.has_row(); walk.next_row(), walk.offset += walk.row_step, row += blockDim.y) {
    const A scale = params.samples.of(row);
    Residual residual;
    residual.load(params.residual, walk.offset, params.residual.data != nullptr);
    compute(load_live<T, kVectorSize>(params.branch + walk.offset, scale != A(0)), residual, scale, walk.offset);
  }
}

// The gradient of the branch's result; zeros where the sample is dropped.
template <class T, class G, int kVectorSize>
__global__ void __launch_bounds__(kRowPassThreads,
                                  row_pass_tuning(RowPass::kBranchGrad, false, sizeof(T)).blocks_per_sm)
    branch_grad_kernel(const __grid_constant__ BranchGradParams<T> params) {
  using A = Accumulation<T>;
  using Grad = Pieces<G, A, kVectorSize>;
  constexpr int kRows = row_pass_tuning(RowPass::kBranchGrad, false, sizeof(T)).thread_rows;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * blockDim.x * kVectorSize;
  const int64_t column = first_column + threadIdx.x * kVectorSize;
  A sum[kVectorSize] = {};
  if (column < params.channels) {
    A layer_scale[kVectorSize];
    load_parameter(layer_scale, params.layer_scale, column);
    if (!params.layer_scale.data) {
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) layer_scale[j] = 1;
    }
    const auto compute = [&](const Grad& grad, A scale, int64_t offset) {
      A value[kVectorSize];
      const bool live = scale != A(0);
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) value[j] = live ? grad[j] * scale : A(0);
      Vector<T, kVectorSize> rounded;
      if (params.unscaled) {
        rounded = pack<T>(value);
        store(params.unscaled + offset, rounded);
      }
      if (params.scaled) {
#pragma unroll
        for (int j = 0; j < kVectorSize; ++j) value[j] = live ? value[j] * layer_scale[j] : A(0);
        const Vector<T, kVectorSize> scaled = pack<T>(value);
        store(params.scaled + offset, scaled);
        if (!params.unscaled) rounded = scaled;
      }
#pragma unroll
      for (int j = 0; j < kVectorSize; ++j) sum[j] += to_accumulation(rounded.element[j]);
    };
    RowWalk walk(params.rows, params.channels, column, kRows);
    int row = static_cast<int>(params.rows - walk.rows_left());
    const int rows_of_grid = static_cast<int>(gridDim.y * blockDim.y) * kRows;
    for (; walk.is_whole(); walk.next(), walk.offset += walk.step, row += rows_of_grid) {
      Grad grad[kRows];
      A scale[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) scale[i] = params.samples.of(row + i * static_cast<int>(blockDim.y));
#pragma unroll
      for (int i = 0; i < kRows; ++i) grad[i].load(params.grad, walk.offset + i * walk.row_step, scale[i] != A(0));
#pragma unroll
      for (int i = 0; i < kRows; ++i) compute(grad[i], scale[i], walk.offset + i * walk.row_step);
    }
#pragma unroll 1
    for (; walk.has_row(); walk.next_row(), walk.offset += walk.row_step, row += blockDim.y) {
      const A scale = params.samples.of(row);
      Grad grad;
      grad.load(params.grad, walk.offset, scale != A(0));
      compute(grad, scale, walk.offset);
    }
  }
  if (!params.partials) return;
  SharedMemory shared;
  A* const sums = shared.take<A>(block_sum_elements(blockDim.x, blockDim.y, kVectorSize));
  sum_of_block(sum, sums, first_column, params.channels, params.partials + blockIdx.y * params.channels);
}

// --- launches

inline LaunchShape row_pass_shape(const RowPassPlan& plan, size_t shared_bytes, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(plan.column_blocks), static_cast<unsigned>(plan.row_blocks)), block_of(plan),
          shared_bytes, stream};
}

template <class T>
void launch_add_branch(const char* op, const RowPassPlan& plan, const AddBranchParams<T>& params, cudaStream_t stream) {
  if (plan.row_blocks == 0) return;
  const auto run = [&](auto* kernel) { launch(op, kernel, row_pass_shape(plan, 0, stream), params); };
  if constexpr (!std::is_same_v<T, double>) {
    constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));
    if (plan.vector_size == kWide) {
      if (params.y_type == element_type<T>()) return run(add_branch_kernel<T, T, T, kWide>);
      if (!params.residual.data || params.residual.type == ElementType::kFloat)
        return run(add_branch_kernel<T, float, float, kWide>);
      return run(add_branch_kernel<T, T, float, kWide>);
    }
  }
  run(add_branch_kernel<T, AnyElement, AnyElement, 1>);
}

template <class T>
void launch_branch_grad(const char* op, const RowPassPlan& plan, const BranchGradParams<T>& params,
                        cudaStream_t stream) {
  if (plan.row_blocks == 0) return;
  const size_t bytes = params.partials ? block_sum_bytes<Accumulation<T>>(plan) : 0;
  const auto run = [&](auto* kernel) { launch(op, kernel, row_pass_shape(plan, bytes, stream), params); };
  if constexpr (!std::is_same_v<T, double>) {
    constexpr int kWide = kVectorBytes / static_cast<int>(sizeof(T));
    if (plan.vector_size == kWide) {
      if (params.grad.type == element_type<T>()) return run(branch_grad_kernel<T, T, kWide>);
      return run(branch_grad_kernel<T, float, kWide>);
    }
  }
  run(branch_grad_kernel<T, AnyElement, 1>);
}

}  // namespace convnext_kernels
