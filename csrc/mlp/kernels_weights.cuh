// The passes over gradients of weights: sums over chunks, and what layer scale makes of the unscaled gradient of W2.
#pragma once
#include "mlp/launch.cuh"
#include "mlp/passes.cuh"
#include "mlp/pieces.cuh"

namespace convnext_kernels {

constexpr int kWeightThreads = 256;

// sum += x, vectors of kVectorSize.
template <class A, int kVectorSize>
__global__ void __launch_bounds__(kWeightThreads) accumulate_kernel(const A* x, A* sum, int64_t vectors) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * kWeightThreads;
#pragma unroll 4
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWeightThreads + threadIdx.x; i < vectors; i += step) {
    A value[kVectorSize], total[kVectorSize];
    unpack(value, load_streaming<A, kVectorSize>(x + i * kVectorSize));
    unpack(total, load_streaming<A, kVectorSize>(sum + i * kVectorSize));
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) total[j] += value[j];
    store(sum + i * kVectorSize, pack<A>(total));
  }
}

// One block a channel; its threads keep their columns.
template <class T, int kVectorSize>
__global__ void __launch_bounds__(kWeightThreads)
    layer_scale_kernel(const __grid_constant__ LayerScaleParams<T> params) {
  using A = Accumulation<T>;
  const int64_t channel = blockIdx.x;
  const T* const weight = params.weight + channel * params.hidden;
  A* const sums = params.sums + channel * params.hidden;
  A scale[1];
  load_parameter(scale, params.layer_scale, channel);
  A dot = 0;
  const int64_t hidden = params.sums ? params.hidden : 0;
#pragma unroll 2
  for (int64_t k = threadIdx.x * kVectorSize; k < hidden; k += kWeightThreads * kVectorSize) {
    A value[kVectorSize];
    unpack(value, load_streaming<T, kVectorSize>(weight + k));
    Pieces<A, A, kVectorSize> sum;
    sum.load({sums, ElementType::kFloat}, k, true);
    A scaled[kVectorSize];
#pragma unroll
    for (int j = 0; j < kVectorSize; ++j) {
      dot += value[j] * sum[j];
      scaled[j] = scale[0] * sum[j];
    }
    if (params.wants_weight) Pieces<A, A, kVectorSize>::store_rounded(sums, ElementType::kFloat, k, scaled);
  }
  SharedMemory shared;
  A* const warps = shared.take<A>(kWeightThreads / kWarpSize);
  const A warp = warp_sum(dot);
  if (threadIdx.x % kWarpSize == 0) warps[threadIdx.x / kWarpSize] = warp;
  __syncthreads();
  if (threadIdx.x != 0) return;
  A total = 0;
  for (int w = 0; w < kWeightThreads / kWarpSize; ++w) total += warps[w];
  if (params.grad_sums) {
    A bias[1];
    load_parameter(bias, params.bias, channel);
    const A grad_sum = params.grad_sums[channel];
    if (params.bias.data) total += bias[0] * grad_sum;
    if (params.wants_bias) params.grad_sums[channel] = scale[0] * grad_sum;
  }
  if (params.grad_scale) params.grad_scale[channel] = total;
}

template <class A>
void launch_accumulate(const char* op, const A* x, A* sum, int64_t count, int multiprocessors, cudaStream_t stream) {
  dispatch_vector_size<A>(row_pass_vector_size(count, sizeof(A), true), [&](auto size) {
    constexpr int kSize = decltype(size)::value;
    const int64_t vectors = count / kSize;
    const int64_t blocks = std::min<int64_t>((vectors + kWeightThreads - 1) / kWeightThreads, multiprocessors * 8);
    launch(op, accumulate_kernel<A, kSize>,
           LaunchShape{dim3(static_cast<unsigned>(blocks)), dim3(kWeightThreads), 0, stream}, x, sum, vectors);
  });
}

template <class T>
void launch_layer_scale(const char* op, const LayerScaleParams<T>& params, int64_t channels, bool aligned,
                        cudaStream_t stream) {
  dispatch_vector_size<T>(row_pass_vector_size(params.hidden, sizeof(T), aligned), [&](auto size) {
    const LaunchShape shape{dim3(static_cast<unsigned>(channels)), dim3(kWeightThreads),
                            shared_piece(sizeof(Accumulation<T>) * kWeightThreads / kWarpSize), stream};
    launch(op, layer_scale_kernel<T, decltype(size)::value>, shape, params);
  });
}

}  // namespace convnext_kernels
