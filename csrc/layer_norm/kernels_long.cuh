// Layer normalisation of rows that are too long for a block's registers: correct, not tuned. A block has a row, reads
// it once for its statistics or sums, and a second time (from the L2 cache, if it fits there) for the result.
#pragma once
#include "layer_norm/kernels.cuh"

namespace convnext_kernels {

// 1 / x for a number of elements: the compiler's own division is a call, before which registers would be saved.
__device__ __forceinline__ float reciprocal(float x) {
  return reciprocal_approximate(x);
}
__device__ __forceinline__ double reciprocal(double x) {
  double result = reciprocal_approximate(static_cast<float>(x));
  for (int step = 0; step < 2; ++step) result = fused_multiply_add(fused_multiply_add(-x, result, 1.0), result, result);
  return result;
}

// Number, mean, and sum of squared distances from the mean, of some values (Chan, Golub, LeVeque 1979, Updating
// formulae and a pairwise algorithm for computing sample variances): exact where E[x^2] - E[x]^2 would cancel.
template <class A>
struct Moments {
  A count = 0, mean = 0, squares = 0;

  __device__ __forceinline__ void add(const Moments& other) {
    const A total = count + other.count;
    if (total == A(0)) return;
    const A distance = other.mean - mean, share = other.count * reciprocal(total);
    mean += distance * share;
    squares += other.squares + distance * distance * count * share;
    count = total;
  }
};

// Of one row, by all threads of a block, the same bits in each.
template <class T>
__device__ __forceinline__ Moments<Accumulation<T>> moments_of_row(const T* row, int64_t channels,
                                                                   Moments<Accumulation<T>>* shared) {
  using A = Accumulation<T>;
  constexpr int kValues = 8;  // loads under way together
  Moments<A> moments;
  for (int64_t c = threadIdx.x; c < channels; c += kValues * kLayerNormThreads) {
    A value[kValues];
    Moments<A> part;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int64_t at = c + i * kLayerNormThreads;
      value[i] = at < channels ? to_accumulation(row[at]) : A(0);
      part.count += at < channels ? A(1) : A(0);
      part.mean += value[i];
    }
    part.mean *= reciprocal(part.count);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const A centred = c + i * kLayerNormThreads < channels ? value[i] - part.mean : A(0);
      part.squares += centred * centred;
    }
    moments.add(part);
  }
#pragma unroll
  for (int step = kWarpSize / 2; step > 0; step /= 2) {
    Moments<A> other;
    other.count = __shfl_xor_sync(kFullWarp, moments.count, step);
    other.mean = __shfl_xor_sync(kFullWarp, moments.mean, step);
    other.squares = __shfl_xor_sync(kFullWarp, moments.squares, step);
    moments.add(other);
  }
  __syncthreads();  // the row before has been read from here
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = moments;
  __syncthreads();
  moments = {};
  for (int warp = 0; warp < kLayerNormWarps; ++warp) moments.add(shared[warp]);
  return moments;
}

template <class T, class R>
__global__ void __launch_bounds__(kLayerNormThreads)
    layer_norm_long_kernel(const __grid_constant__ LayerNormParams<T, R> params,
                           const __grid_constant__ SampleRows<Accumulation<T>> samples,
                           const __grid_constant__ RowLength<Accumulation<T>> length, bool given) {
  using A = Accumulation<T>;
  SharedMemory shared;
  auto* const warps = shared.take<Moments<A>>(kLayerNormWarps);
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* const x = params.x + row * params.channels;
    R* const y = params.y + row * params.channels;
    const bool live = samples.has(static_cast<int>(row));
    A mean = 0, rstd = 0;
    if (live && given) {
      mean = params.mean[row], rstd = params.rstd[row];
    } else if (!given) {
      if (live) {
        const Moments<A> moments = moments_of_row(x, params.channels, warps);
        mean = moments.mean;
        rstd = reciprocal_square_root(moments.squares * length.inverse + params.eps);
      }
      if (threadIdx.x == 0) params.mean[row] = mean, params.rstd[row] = rstd;
    }
#pragma unroll 1
    for (int64_t c = threadIdx.x; c < params.channels; c += kLayerNormThreads) {
      A weight[1] = {A(1)}, bias[1];
      if (params.weight.data) load_parameter(weight, params.weight, c);
      load_parameter(bias, params.bias, c);
      const A value = live ? (to_accumulation(x[c]) - mean) * rstd * weight[0] + bias[0] : A(0);
      y[c] = from_accumulation<R>(value);
    }
  }
}

template <class G, class T>
__global__ void __launch_bounds__(kLayerNormThreads)
    layer_norm_long_backward_kernel(const __grid_constant__ LayerNormBackwardParams<G, T> params,
                                    const __grid_constant__ SampleRows<Accumulation<T>> samples,
                                    const __grid_constant__ RowLength<Accumulation<T>> length) {
  using A = Accumulation<T>;
  SharedMemory shared;
  A* sums_now = shared.take<A>(2 * kLayerNormWarps);
  A* sums_next = shared.take<A>(2 * kLayerNormWarps);
  for (int64_t row = blockIdx.x; row < params.rows; row += gridDim.x) {
    const T* const x = params.x + row * params.channels;
    const G* const grad = params.grad + row * params.channels;
    const bool live = samples.has(static_cast<int>(row));
    const A mean = live ? params.mean[row] : A(0), rstd = live ? params.rstd[row] : A(0);
    const auto for_each_column = [&](auto&& function) {
#pragma unroll 1
      for (int64_t c = threadIdx.x; c < params.channels; c += kLayerNormThreads) {
        A weight[1] = {A(1)};
        if (params.weight.data) load_parameter(weight, params.weight, c);
        function(c, (to_accumulation(x[c]) - mean) * rstd, to_accumulation(grad[c]) * weight[0]);
      }
    };
    A sums[2] = {};
    if (live) {
      for_each_column([&](int64_t, A n, A s) {
        sums[0] += s;
        sums[1] += s * n;
      });
    }
    row_sums(sums, sums_now);
    std::swap(sums_now, sums_next);
    T* const grad_x = params.grad_x + row * params.channels;
    const A mean_s = sums[0] * length.inverse, mean_sn = sums[1] * length.inverse;
    if (live) {
      for_each_column(
          [&](int64_t c, A n, A s) { grad_x[c] = from_accumulation<T>((s - mean_s - n * mean_sn) * rstd); });
    } else {
      for (int64_t c = threadIdx.x; c < params.channels; c += kLayerNormThreads) grad_x[c] = from_accumulation<T>(A(0));
    }
  }
}

// The partial sums of the gradients of weight and bias: a thread has a column and walks down the rows.
template <class G, class T>
__global__ void __launch_bounds__(kLayerNormThreads)
    layer_norm_long_sums_kernel(const __grid_constant__ LayerNormBackwardParams<G, T> params,
                                const __grid_constant__ SampleRows<Accumulation<T>> samples) {
  using A = Accumulation<T>;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kLayerNormThreads + threadIdx.x;
  if (column >= params.channels) return;
  A weight_sum = 0, bias_sum = 0;
#pragma unroll 4
  for (int64_t row = blockIdx.y; row < params.rows; row += gridDim.y) {
    if (!samples.has(static_cast<int>(row))) continue;
    const A g = to_accumulation(params.grad[row * params.channels + column]);
    weight_sum +=
        g * ((to_accumulation(params.x[row * params.channels + column]) - params.mean[row]) * params.rstd[row]);
    bias_sum += g;
  }
  const int64_t at = blockIdx.y * params.channels + column;
  if (params.weight_partials) params.weight_partials[at] = weight_sum;
  if (params.bias_partials) params.bias_partials[at] = bias_sum;
}

}  // namespace convnext_kernels
