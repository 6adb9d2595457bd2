// Layer normalisation with each row held in registers: forward and backward. Text for nvcc and for the host
// (common/machine.cuh).
//
// Memory bound: each tensor is read or written once, in vectors of 16 bytes. A row belongs to blockDim.x threads, of
// which each keeps its columns while the block walks down the rows; so weight and bias are in shared memory, as fp32,
// and the backward's sums over rows are in registers until the block ends. Rows stay packed between the passes over
// them: unpacking an element again is one instruction, keeping it unpacked half a register.
#pragma once
#include "common/machine.cuh"
#include "common/sample_rows.cuh"
#include "layer_norm/layer_norm.cuh"

namespace convnext_kernels {

constexpr int kLayerNormWarps = kLayerNormThreads / kWarpSize;

__device__ __forceinline__ float reciprocal_square_root(float x) {
  return rsqrtf(x);
}
__device__ __forceinline__ double reciprocal_square_root(double x) {
  return rsqrt(x);
}

// The sums of kValues values over the threads of a row, in each of them, in an order that depends on blockDim.x only.
// All threads of the block come here together. `shared`, for kLayerNormWarps * kValues elements, is another one than at
// the call before.
template <int kValues, class A>
__device__ __forceinline__ void row_sums(A (&values)[kValues], A* shared) {
  const int threads = static_cast<int>(blockDim.x);
  if (threads <= kWarpSize) {
    for (int step = threads / 2; step > 0; step /= 2) {
#pragma unroll
      for (int i = 0; i < kValues; ++i) values[i] += __shfl_xor_sync(kFullWarp, values[i], step);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = warp_sum(values[i]);
  const int warps = threads / kWarpSize;
  A* const of_row = shared + threadIdx.y * warps * kValues;
  if (threadIdx.x % kWarpSize == 0) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) of_row[threadIdx.x / kWarpSize * kValues + i] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kValues; ++i) values[i] = 0;
#pragma unroll 1
  for (int warp = 0; warp < warps; ++warp) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) values[i] += of_row[warp * kValues + i];
  }
}

// A parameter of all channels in shared memory. The halves of a vector that is wider than 16 bytes lie far apart, so
// that neighbouring lanes read neighbouring 16 bytes: no bank conflicts.
template <class A, int kVectorSize>
class SharedParameter {
 public:
  static constexpr int kPart = sizeof(A) * kVectorSize > kVectorBytes ? kVectorBytes / sizeof(A) : kVectorSize;

  __device__ __forceinline__ SharedParameter(SharedMemory& shared, int row_vectors)
      : data_(shared.take<A>(static_cast<size_t>(row_vectors) * kVectorSize)), row_vectors_(row_vectors) {}

  // By all threads of the block; the values are there after a barrier.
  __device__ __forceinline__ void fill(Parameter parameter, A absent) {
    const int thread = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
    for (int c = thread; c < row_vectors_ * kVectorSize; c += threads) {
      A value[1] = {absent};
      if (parameter.data) load_parameter(value, parameter, c);
      data_[(c % kVectorSize / kPart * row_vectors_ + c / kVectorSize) * kPart + c % kPart] = value[0];
    }
  }
  __device__ __forceinline__ void load(A (&values)[kVectorSize], int vector) const {
#pragma unroll
    for (int part = 0; part < kVectorSize / kPart; ++part) {
      const auto piece = *reinterpret_cast<const Vector<A, kPart>*>(data_ + (part * row_vectors_ + vector) * kPart);
#pragma unroll
      for (int i = 0; i < kPart; ++i) values[part * kPart + i] = piece.element[i];
    }
  }

 private:
  A* data_;
  int row_vectors_;
};

// A thread's vectors of a row: number threadIdx.x, and every blockDim.x'th after it.
template <class T, int kVectorSize, int kVectors>
struct HeldRow {
  Vector<T, kVectorSize> vector[kVectors];

  // Zeros where the row has no more vectors; of a row that is not to be read, zeros.
  __device__ __forceinline__ void load(const T* from, int row_vectors, bool read) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int at = j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      vector[j] = {};
      if (read && at < row_vectors) vector[j] = load_streaming<T, kVectorSize>(from + at * kVectorSize);
    }
  }
};

// Calls function(j, number of the vector in the row) for each of the thread's vectors that the row has.
template <int kVectors, class Function>
__device__ __forceinline__ void for_each_vector(int row_vectors, Function&& function) {
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int at = j * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
    if (at < row_vectors) function(j, at);
  }
}

template <bool kBackward, class T, int kVectorSize, int kVectors>
constexpr int kLayerNormBlocksPerSm =
    layer_norm_blocks_per_sm(kBackward, kVectorSize, kVectorSize* kVectors, sizeof(Accumulation<T>));

// `given`: mean and rstd are read, not computed.
template <class T, class R, int kVectorSize, int kVectors>
__global__ void __launch_bounds__(kLayerNormThreads, kLayerNormBlocksPerSm<false, T, kVectorSize, kVectors>)
    layer_norm_kernel(const __grid_constant__ LayerNormParams<T, R> params,
                      const __grid_constant__ SampleRows<Accumulation<T>> samples, bool given) {
  using A = Accumulation<T>;
  const int row_vectors = static_cast<int>(params.channels / kVectorSize);
  SharedMemory shared;
  SharedParameter<A, kVectorSize> weight(shared, row_vectors), bias(shared, row_vectors);
  A* const sums = shared.take<A>(2 * kLayerNormWarps);

  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;  // of the block's rows
  HeldRow<T, kVectorSize, kVectors> x;
  bool live;
  const auto load = [&] {
    const int64_t row = first + threadIdx.y;
    live = row < params.rows && samples.has(static_cast<int>(row));
    x.load(params.x + row * params.channels, row_vectors, live);
  };
  load();
  weight.fill(params.weight, A(1));
  bias.fill(params.bias, A(0));
  __syncthreads();
  while (first < params.rows) {
    const int64_t row = first + threadIdx.y;
    A mean = 0, rstd = 0;
    if (given) {
      if (live) mean = params.mean[row], rstd = params.rstd[row];
    } else {
      A sum[1] = {}, squares[1] = {};
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        A value[kVectorSize];
        unpack(value, x.vector[j]);
#pragma unroll
        for (int i = 0; i < kVectorSize; ++i) sum[0] += value[i];
      }
      row_sums(sum, sums);
      mean = sum[0] / static_cast<A>(params.channels);
      for_each_vector<kVectors>(row_vectors, [&](int j, int) {
        A value[kVectorSize];
        unpack(value, x.vector[j]);
#pragma unroll
        for (int i = 0; i < kVectorSize; ++i) {
          const A centred = value[i] - mean;
          squares[0] += centred * centred;
        }
      });
      row_sums(squares, sums + kLayerNormWarps);
      rstd = live ? reciprocal_square_root(squares[0] / static_cast<A>(params.channels) + params.eps) : A(0);
      if (threadIdx.x == 0 && row < params.rows) params.mean[row] = mean, params.rstd[row] = rstd;
    }
    if (row < params.rows) {
      R* const y = params.y + row * params.channels;
      for_each_vector<kVectors>(row_vectors, [&](int j, int at) {
        A value[kVectorSize] = {};
        if (live) {
          A scale[kVectorSize], shift[kVectorSize];
          unpack(value, x.vector[j]);
          weight.load(scale, at);
          bias.load(shift, at);
#pragma unroll
          for (int i = 0; i < kVectorSize; ++i) value[i] = (value[i] - mean) * rstd * scale[i] + shift[i];
        }
        store(y + at * kVectorSize, pack<R>(value));
      });
    }
    first += static_cast<int64_t>(gridDim.x) * blockDim.y;
    load();
  }
}

// With n = (x - mean) * rstd and s = grad * weight: grad_x = rstd * (s - mean(s) - n * mean(s * n)); the gradients of
// weight and bias are the sums of grad * n and of grad over the rows.
template <class G, class T, int kVectorSize, int kVectors>
__global__ void __launch_bounds__(kLayerNormThreads, kLayerNormBlocksPerSm<true, T, kVectorSize, kVectors>)
    layer_norm_backward_kernel(const __grid_constant__ LayerNormBackwardParams<G, T> params,
                               const __grid_constant__ SampleRows<Accumulation<T>> samples) {
  using A = Accumulation<T>;
  const int row_vectors = static_cast<int>(params.channels / kVectorSize);
  SharedMemory shared;
  SharedParameter<A, kVectorSize> weight(shared, row_vectors);
  A* sums_now = shared.take<A>(2 * kLayerNormWarps);
  A* sums_next = shared.take<A>(2 * kLayerNormWarps);
  A* const block_sums = shared.take<A>(blockDim.y * static_cast<size_t>(params.channels));

  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;  // of the block's rows
  HeldRow<T, kVectorSize, kVectors> x;
  HeldRow<G, kVectorSize, kVectors> grad;
  A mean, rstd;
  const auto load = [&] {
    const int64_t row = first + threadIdx.y;
    const bool live = row < params.rows && samples.has(static_cast<int>(row));
    mean = 0, rstd = 0;  // all that is computed of a row without these, x and grad is 0
    if (live) mean = params.mean[row], rstd = params.rstd[row];
    x.load(params.x + row * params.channels, row_vectors, live);
    grad.load(params.grad + row * params.channels, row_vectors, live);
  };
  load();
  weight.fill(params.weight, A(1));
  __syncthreads();

  A weight_sum[kVectors][kVectorSize] = {}, bias_sum[kVectors][kVectorSize] = {};
  const A inverse = A(1) / static_cast<A>(params.channels);
  while (first < params.rows) {
    A sums[2] = {};  // of s, and of s * n
    for_each_vector<kVectors>(row_vectors, [&](int j, int at) {
      A n[kVectorSize], g[kVectorSize], scale[kVectorSize];
      unpack(n, x.vector[j]);
      unpack(g, grad.vector[j]);
      weight.load(scale, at);
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) {
        n[i] = (n[i] - mean) * rstd;
        weight_sum[j][i] += g[i] * n[i];
        bias_sum[j][i] += g[i];
        const A s = g[i] * scale[i];
        sums[0] += s;
        sums[1] += s * n[i];
      }
    });
    if (params.grad_x) {
      row_sums(sums, sums_now);
      std::swap(sums_now, sums_next);
      const A mean_s = sums[0] * inverse, mean_sn = sums[1] * inverse;
      const int64_t row = first + threadIdx.y;
      if (row < params.rows) {
        T* const grad_x = params.grad_x + row * params.channels;
        for_each_vector<kVectors>(row_vectors, [&](int j, int at) {
          A n[kVectorSize], s[kVectorSize], scale[kVectorSize];
          unpack(n, x.vector[j]);
          unpack(s, grad.vector[j]);
          weight.load(scale, at);
#pragma unroll
          for (int i = 0; i < kVectorSize; ++i) {
            n[i] = (n[i] - mean) * rstd;
            n[i] = (s[i] * scale[i] - mean_s - n[i] * mean_sn) * rstd;
          }
          store(grad_x + at * kVectorSize, pack<T>(n));
        });
      }
    }
    first += static_cast<int64_t>(gridDim.x) * blockDim.y;
    load();
  }

  // The block's rows of threads, added up from first to last.
  const int channels = static_cast<int>(params.channels);
  const auto write = [&](A* partials, const A(&sum)[kVectors][kVectorSize]) {
    if (!partials) return;
    __syncthreads();  // what was here before has been read
    for_each_vector<kVectors>(row_vectors, [&](int j, int at) {
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i)
        block_sums[static_cast<int>(threadIdx.y) * channels + at * kVectorSize + i] = sum[j][i];
    });
    __syncthreads();
    const int threads = static_cast<int>(blockDim.x * blockDim.y);
    for (int c = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x); c < channels; c += threads) {
      A total = 0;
#pragma unroll 8
      for (int r = 0; r < static_cast<int>(blockDim.y); ++r) total += block_sums[r * channels + c];
      partials[blockIdx.x * params.channels + c] = total;
    }
  };
  write(params.weight_partials, weight_sum);
  write(params.bias_partials, bias_sum);
}

}  // namespace convnext_kernels
