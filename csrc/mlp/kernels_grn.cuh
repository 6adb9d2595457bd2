// Global response normalisation, the part that is per image and hidden channel (ConvNeXt V2, arXiv:2301.00808, section
// 3.2): with G = ||g||_2 over an image's rows and N = G / (mean_k G + eps), GRN(g) = g + weight * g * N + bias.
#pragma once
#include "mlp/grn.h"
#include "mlp/passes.cuh"

namespace convnext_kernels {

constexpr int kGrnFactorsThreads = 512;

constexpr size_t kGrnFactorsSharedBytes = 2 * shared_piece(sizeof(double) * kGrnFactorsThreads / kWarpSize);

// The sum over the block's threads, in each of them; `sums` has room for an element a warp.
template <class A>
__device__ __forceinline__ A sum_over_block(A value, A* sums) {
  const A warp = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) sums[threadIdx.x / kWarpSize] = warp;
  __syncthreads();
  A total = 0;
  for (unsigned w = 0; w < blockDim.x / kWarpSize; ++w) total += sums[w];
  return total;
}

// One block an image. A thread keeps its columns in both loops, so that it finds its own values again in `factors` and
// `feedback`, where they wait for the mean over all columns.
//
// With D = sum over rows of grad * g: dN = weight * D, and through N's two uses of G
//   dG_k = dN_k / (mean + eps) - mean_j(dN_j G_j) / (mean + eps)^2;  the gradient of g gets g * dG / G: `feedback`.
// At G = 0 that is 0, as the derivative of torch.linalg.vector_norm.
template <class A, bool kBackward>
__global__ void __launch_bounds__(kGrnFactorsThreads)
    grn_factors_kernel(const __grid_constant__ GrnFactorsParams<A> params) {
  const int64_t image = blockIdx.x, columns = params.columns;
  const A* const squares = params.squares + image * params.parts * columns;
  const A* const products = kBackward ? params.products + image * params.parts * columns : nullptr;
  A* const factors = params.factors + image * columns;
  A* const feedback = kBackward ? params.feedback + image * columns : nullptr;
  SharedMemory shared;
  A* const norm_sums = shared.take<A>(kGrnFactorsThreads / kWarpSize);
  A* const gradient_sums = shared.take<A>(kGrnFactorsThreads / kWarpSize);

  A norm_sum = 0, gradient_sum = 0;
  for (int64_t k = threadIdx.x; k < columns; k += kGrnFactorsThreads) {
    A square = 0, product = 0;
#pragma unroll 8  // so many loads in flight: at batch 1 nothing else hides them
    for (int part = 0; part < params.parts; ++part) {
      square += squares[part * columns + k];
      if constexpr (kBackward) product += products[part * columns + k];
    }
    const A norm = sqrt(square);
    norm_sum += norm;
    factors[k] = norm;
    if constexpr (kBackward) {
      A weight[1];
      load_parameter(weight, params.weight, k);
      gradient_sum += weight[0] * product * norm;
      feedback[k] = product;
    }
  }
  const A denominator = sum_over_block(norm_sum, norm_sums) / static_cast<A>(columns) + static_cast<A>(kGrnEps);
  A shared_gradient = 0;
  if constexpr (kBackward)
    shared_gradient = sum_over_block(gradient_sum, gradient_sums) / static_cast<A>(columns) / denominator;
  for (int64_t k = threadIdx.x; k < columns; k += kGrnFactorsThreads) {
    A weight[1];
    load_parameter(weight, params.weight, k);
    const A norm = factors[k], response = norm / denominator;
    factors[k] = 1 + weight[0] * response;
    if constexpr (kBackward) {
      const A product = feedback[k];
      feedback[k] = norm == 0 ? A(0) : (weight[0] * product - shared_gradient) / denominator / norm;
      params.weight_partials[image * columns + k] = product * response;
    }
  }
}

template <class A>
void launch_grn_factors(const char* op, const GrnFactorsParams<A>& params, int64_t images, cudaStream_t stream) {
  if (images == 0) return;
  const LaunchShape shape{dim3(static_cast<unsigned>(images)), dim3(kGrnFactorsThreads), kGrnFactorsSharedBytes,
                          stream};
  launch(op, params.products ? grn_factors_kernel<A, true> : grn_factors_kernel<A, false>, shape, params);
}

}  // namespace convnext_kernels
