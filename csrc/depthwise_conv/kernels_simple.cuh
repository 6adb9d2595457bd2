// The depthwise convolution and its gradients for what the tuned kernels leave: other kernel sizes, stride 2, fp64, and
// channels that are no multiple of a 16-byte vector. Straight from global memory; caches do the rest.
#pragma once
#include "depthwise_conv/kernels.cuh"

namespace convnext_kernels::depthwise_conv {

// A row of all the results' rows, and where it lies. One 64-bit division, a call with registers to save, for all rows.
struct RowOfResult {
  int64_t row, sample;
  int y, height;

  __device__ __forceinline__ RowOfResult(int64_t row, int height)
      : row(row), sample(row / height), y(static_cast<int>(row - sample * height)), height(height) {}
  __device__ __forceinline__ void advance() {
    ++row;
    if (++y == height) {
      y = 0;
      ++sample;
    }
  }
};

template <class T, class R>
struct SimpleConvolutionParams {
  const T* x;                           // (samples, height, width, channels)
  Parameter weight;                     // (channels, kernel_size, kernel_size)
  Parameter bias;                       // (channels) or absent
  const R* residual;                    // like y or null: added before the one rounding
  const Accumulation<T>* sample_scale;  // (samples) or null: samples with 0 are not read; y is the residual or 0 there
  R* y;                                 // (samples, result_height, result_width, channels)
  Images shape;
  int result_height, result_width;
  int kernel_size, stride;
  bool transposed;  // the gradient of the input: x is the output's gradient, y the input's
  SimplePlan plan;
};

// Row or column of x that meets row or column `at` of y at weight k, in [0, size), or -1.
__device__ __forceinline__ int source_of(int at, int k, int padding, int stride, bool transposed, int size) {
  int source = at * stride + k - padding;
  if (transposed) {
    const int scaled = at + padding - k;
    source = scaled % stride ? -1 : scaled / stride;
  }
  return source >= 0 && source < size ? source : -1;
}

template <class T, class R>
__global__ void __launch_bounds__(kWarpSize* kSimpleWarps)
    simple_convolution_kernel(const __grid_constant__ SimpleConvolutionParams<T, R> params) {
  using A = Accumulation<T>;
  const Images& shape = params.shape;
  const int size = params.kernel_size, taps = size * size, padding = size / 2;
  const int lane = static_cast<int>(threadIdx.x), warp = static_cast<int>(threadIdx.y);
  const int channel = static_cast<int>(blockIdx.x) * kChunk + lane;
  SharedMemory shared;
  A* const weights = shared.take<A>(taps * kChunk);  // [tap][channel]
  A bias[1] = {};
  if (channel < shape.channels) {
    for (int tap = warp; tap < taps; tap += kSimpleWarps) {
      A weight[1];
      load_parameter(weight, params.weight, static_cast<int64_t>(channel) * taps + tap);
      weights[tap * kChunk + lane] = weight[0];
    }
    load_parameter(bias, params.bias, channel);
  }
  __syncthreads();
  if (channel >= shape.channels) return;

  const int64_t end = params.plan.first_row(blockIdx.y + 1);
  for (RowOfResult at(params.plan.first_row(blockIdx.y), params.result_height); at.row < end; at.advance()) {
    const int64_t row = at.row, sample = at.sample;
    const int y = at.y;
    const bool live = is_live(shape, params.sample_scale, sample);
    for (int x = warp; x < params.result_width; x += kSimpleWarps) {
      A sum = live ? bias[0] : A(0);
      for (int ky = 0; live && ky < size; ++ky) {
        const int source_y = source_of(y, ky, padding, params.stride, params.transposed, shape.height);
        if (source_y < 0) continue;
        const T* from = params.x + (sample * shape.height + source_y) * shape.width * shape.channels + channel;
        for (int kx = 0; kx < size; ++kx) {
          const int source_x = source_of(x, kx, padding, params.stride, params.transposed, shape.width);
          if (source_x < 0) continue;
          const A value = to_accumulation(from[static_cast<int64_t>(source_x) * shape.channels]);
          sum += weights[(ky * size + kx) * kChunk + lane] * value;
        }
      }
      const int64_t element = (row * params.result_width + x) * shape.channels + channel;
      if (params.residual) sum += to_accumulation(params.residual[element]);
      params.y[element] = from_accumulation<R>(sum);
    }
  }
}

template <class T, class R>
void launch_simple_convolution(const char* op, const SimpleConvolutionParams<T, R>& params, cudaStream_t stream) {
  const SimplePlan& plan = params.plan;
  if (plan.row_blocks == 0) return;
  const size_t weights = sizeof(Accumulation<T>) * params.kernel_size * params.kernel_size * kChunk;
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.row_blocks)),
                          dim3(kWarpSize, kSimpleWarps), shared_piece(weights), stream};
  launch(op, simple_convolution_kernel<T, R>, shape, params);
}

template <class T>
struct SimpleWeightGradientParams {
  const T* grad;                        // (samples, result_height, result_width, channels)
  const T* x;                           // (samples, height, width, channels)
  const Accumulation<T>* sample_scale;  // (samples) or null: samples with 0 are not read
  Accumulation<T>* partials;            // (row_blocks, kernel_size^2 + 1, channels): for the weights, then the bias
  Images shape;                         // of x
  int result_height, result_width;
  int kernel_size, stride;
  SimplePlan plan;
};

// A warp has every eighth weight, one after the other, and sums each over all the block's rows of `grad`.
template <class T>
__global__ void __launch_bounds__(kWarpSize* kSimpleWarps)
    simple_weight_gradient_kernel(const __grid_constant__ SimpleWeightGradientParams<T> params) {
  // Before anything else: a 64-bit division is a call, around which live registers would be spilled.
  const RowOfResult first(params.plan.first_row(blockIdx.y), params.result_height);
  const int64_t end = params.plan.first_row(blockIdx.y + 1);
  using A = Accumulation<T>;
  const Images& shape = params.shape;
  const int size = params.kernel_size, taps = size * size, padding = size / 2;
  const int channel = static_cast<int>(blockIdx.x) * kChunk + static_cast<int>(threadIdx.x);
  if (channel >= shape.channels) return;
  for (int tap = static_cast<int>(threadIdx.y); tap <= taps; tap += kSimpleWarps) {
    const bool bias = tap == taps;
    const int ky = tap / size, kx = tap % size;
    A sum = 0;
    for (RowOfResult at = first; at.row < end; at.advance()) {
      const int64_t row = at.row, sample = at.sample;
      const int y = at.y;
      if (!is_live(shape, params.sample_scale, sample)) continue;
      const int source_y = source_of(y, ky, padding, params.stride, false, shape.height);
      if (source_y < 0 && !bias) continue;
      const T* grad = params.grad + row * params.result_width * shape.channels + channel;
      const T* from = params.x + (sample * shape.height + source_y) * shape.width * shape.channels + channel;
      A row_sum = 0;  // shorter sums round less
      for (int x = 0; x < params.result_width; ++x, grad += shape.channels) {
        const int source_x = source_of(x, kx, padding, params.stride, false, shape.width);
        if (bias) {
          row_sum += to_accumulation(*grad);
        } else if (source_x >= 0) {
          row_sum += to_accumulation(*grad) * to_accumulation(from[static_cast<int64_t>(source_x) * shape.channels]);
        }
      }
      sum += row_sum;
    }
    params.partials[(static_cast<int64_t>(blockIdx.y) * (taps + 1) + tap) * shape.channels + channel] = sum;
  }
}

template <class T>
void launch_simple_weight_gradient(const char* op, const SimpleWeightGradientParams<T>& params, cudaStream_t stream) {
  const SimplePlan& plan = params.plan;
  if (plan.row_blocks == 0) return;
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.row_blocks)),
                          dim3(kWarpSize, kSimpleWarps), 0, stream};
  launch(op, simple_weight_gradient_kernel<T>, shape, params);
}

}  // namespace convnext_kernels::depthwise_conv
