// Layer normalisation with each row held in registers: forward and backward. Text for nvcc and for the host
// (common/machine.cuh).
//
// Memory bound: each tensor is read or written once, in vectors of 16 bytes. A row belongs to blockDim.x threads, of
// which each keeps its columns while the block walks down the rows; so weight and bias are in shared memory, as fp32,
// and the backward's sums over rows are in registers until the block ends. The next row is asked for as soon as this
// one is stored: the registers allow no earlier, and the multiprocessor's other warps have theirs under way meanwhile.
//
// The main loops for bf16 and 3 vectors a thread (C = 96 and its doubles), of 24 elements:
//   forward, sm_90: 510 instructions, of which about 390 run where a row has a warp or less and none is dropped, 16 an
//     element (68 FADD, 51 FFMA, 27 FMUL, 24 to unpack, 12 to pack, 12 LDS.128, 3 LDG.128, 3 STG.128; most others are
//     addresses);
//   backward, sm_100: 662, of which about 600 run, 25 an element (112 FADD, 98 FMUL, 96 FFMA, 96 to unpack, 12 to pack,
//     12 LDS.128, 6 LDG.128, 3 STG.128).
// At the speed of a copy (4.3 TB/s, as measured) an H200 issues 27 and 41 an element in that time. The kernels have not
// been timed yet.
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

// Rounded once.
__device__ __forceinline__ float fused_multiply_add(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double fused_multiply_add(double a, double b, double c) {
  return fma(a, b, c);
}

__device__ __forceinline__ int thread_of_block() {
  return static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
}
__device__ __forceinline__ int threads_of_block() {
  return static_cast<int>(blockDim.x * blockDim.y);
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

// A parameter of all channels in shared memory, with zeros up to the last slot of a thread. The halves of a vector that
// is wider than 16 bytes lie far apart, so that neighbouring lanes read neighbouring 16 bytes: no bank conflicts.
template <class A, int kVectorSize, int kVectors>
class SharedParameter {
 public:
  static constexpr int kPart = sizeof(A) * kVectorSize > kVectorBytes ? kVectorBytes / sizeof(A) : kVectorSize;

  __device__ __forceinline__ explicit SharedParameter(SharedMemory& shared)
      : data_(shared.take<A>(static_cast<size_t>(blockDim.x) * kVectors * kVectorSize)) {}

  // By all threads of the block; the values are there after a barrier.
  __device__ __forceinline__ void fill(Parameter parameter, A absent, int channels) {
    const int slots = static_cast<int>(blockDim.x) * kVectors;
    for (int c = thread_of_block(); c < slots * kVectorSize; c += threads_of_block()) {
      A value[1] = {c < channels ? absent : A(0)};
      if (parameter.data && c < channels) load_parameter(value, parameter, c);
      data_[(c % kVectorSize / kPart * slots + c / kVectorSize) * kPart + c % kPart] = value[0];
    }
  }
  // For the thread's vector j.
  __device__ __forceinline__ void load(A (&values)[kVectorSize], int j) const {
#pragma unroll
    for (int part = 0; part < kVectorSize / kPart; ++part) {
      const int slot = (part * kVectors + j) * static_cast<int>(blockDim.x) + static_cast<int>(threadIdx.x);
      const auto piece = *reinterpret_cast<const Vector<A, kPart>*>(data_ + slot * kPart);
#pragma unroll
      for (int i = 0; i < kPart; ++i) values[part * kPart + i] = piece.element[i];
    }
  }

 private:
  A* data_;
};

// A thread's vectors of a row: number threadIdx.x, and every blockDim.x'th after it, as far as the row has them.
template <int kVectorSize, int kVectors>
struct RowSlots {
  int left;   // vectors of the row from the thread's first one on
  int pitch;  // elements between its vectors

  __device__ __forceinline__ explicit RowSlots(int channels)
      : left(channels / kVectorSize - static_cast<int>(threadIdx.x)),
        pitch(static_cast<int>(blockDim.x) * kVectorSize) {}

  __device__ __forceinline__ bool has(int j) const { return j * static_cast<int>(blockDim.x) < left; }
  // Of its first element.
  __device__ __forceinline__ int64_t offset(int64_t row, int64_t channels) const {
    return row * channels + static_cast<int>(threadIdx.x) * kVectorSize;
  }
  // Zeros for the vectors that the row has not, and for rows that are not to be read.
  template <class T>
  __device__ __forceinline__ void load(Vector<T, kVectorSize> (&vectors)[kVectors], const T* from, bool read) const {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) vectors[j] = load_streaming<T, kVectorSize>(from + j * pitch, read && has(j));
  }
};

// The channels of a row as a number, for kernels to read where they need it: no division, no register.
template <class A>
struct RowLength {
  A channels, inverse;

  // As good as sum / channels, by a step of Newton's method.
  __device__ __forceinline__ A divide(A sum) const {
    const A quotient = sum * inverse;
    return fused_multiply_add(fused_multiply_add(-quotient, channels, sum), inverse, quotient);
  }
};

template <bool kBackward, class T, int kVectorSize, int kVectors>
constexpr int kLayerNormBlocksPerSm =
    layer_norm_blocks_per_sm(kBackward, kVectorSize, kVectorSize* kVectors, sizeof(Accumulation<T>));

// `given`: mean and rstd are read, not computed.
template <class T, class R, int kVectorSize, int kVectors>
__global__ void __launch_bounds__(kLayerNormThreads, kLayerNormBlocksPerSm<false, T, kVectorSize, kVectors>)
    layer_norm_kernel(const __grid_constant__ LayerNormParams<T, R> params,
                      const __grid_constant__ SampleRows<Accumulation<T>> samples,
                      const __grid_constant__ RowLength<Accumulation<T>> length, bool given) {
  using A = Accumulation<T>;
  SharedMemory shared;
  SharedParameter<A, kVectorSize, kVectors> weight(shared), bias(shared);
  A* const sums = shared.take<A>(2 * kLayerNormWarps);
  const RowSlots<kVectorSize, kVectors> slots(static_cast<int>(params.channels));

  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;  // of the block's rows
  Vector<T, kVectorSize> x[kVectors];
  bool live;
  const auto load = [&] {
    const int64_t row = first + threadIdx.y;
    live = row < params.rows && samples.has(static_cast<int>(row));
    slots.load(x, params.x + slots.offset(row, params.channels), live);
  };
  load();
  weight.fill(params.weight, A(1), static_cast<int>(params.channels));
  bias.fill(params.bias, A(0), static_cast<int>(params.channels));
  __syncthreads();
  while (first < params.rows) {
    const int64_t row = first + threadIdx.y;
    A mean = 0, rstd = 0;
    if (given && live) mean = params.mean[row], rstd = params.rstd[row];
    A value[kVectors][kVectorSize];
    A sum[1] = {}, squares[1] = {};
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      unpack(value[j], x[j]);
      A part = 0;
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) part += value[j][i];
      sum[0] += part;
    }
    if (!given) {
      row_sums(sum, sums);
      mean = length.divide(sum[0]);
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const A origin = slots.has(j) ? mean : A(0);
      A part = 0;
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) {
        value[j][i] -= origin;
        part += value[j][i] * value[j][i];
      }
      squares[0] += part;
    }
    if (!given) {
      row_sums(squares, sums + kLayerNormWarps);
      rstd = live ? reciprocal_square_root(squares[0] * length.inverse + params.eps) : A(0);
      if (threadIdx.x == 0 && row < params.rows) params.mean[row] = mean, params.rstd[row] = rstd;
    }
    R* const y = params.y + slots.offset(row, params.channels);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      A scale[kVectorSize], shift[kVectorSize];
      weight.load(scale, j);
      bias.load(shift, j);
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) value[j][i] = value[j][i] * rstd * scale[i] + shift[i];
      if (live && slots.has(j)) store(y + j * slots.pitch, pack<R>(value[j]));
    }
    if (!live && row < params.rows) {  // dropped
#pragma unroll
      for (int j = 0; j < kVectors; ++j)
        if (slots.has(j)) store(y + j * slots.pitch, Vector<R, kVectorSize>{});
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
                               const __grid_constant__ SampleRows<Accumulation<T>> samples,
                               const __grid_constant__ RowLength<Accumulation<T>> length) {
  using A = Accumulation<T>;
  // n and s are kept for the second pass over the row or, for want of registers, computed again.
  constexpr bool kKeeps = kVectors * kVectorSize <= 16;
  const int channels = static_cast<int>(params.channels);
  SharedMemory shared;
  SharedParameter<A, kVectorSize, kVectors> weight(shared);
  A* sums_now = shared.take<A>(2 * kLayerNormWarps);
  A* sums_next = shared.take<A>(2 * kLayerNormWarps);
  A* const block_sums = shared.take<A>(blockDim.y * static_cast<size_t>(channels));
  const RowSlots<kVectorSize, kVectors> slots(channels);

  int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.y;  // of the block's rows
  Vector<T, kVectorSize> x[kVectors];
  Vector<G, kVectorSize> grad[kVectors];
  A mean, rstd;
  const auto load = [&] {
    const int64_t row = first + threadIdx.y;
    const bool live = row < params.rows && samples.has(static_cast<int>(row));
    mean = 0, rstd = 0;  // all that is computed of a row without these, x and grad is 0
    if (live) mean = params.mean[row], rstd = params.rstd[row];
    const int64_t offset = slots.offset(row, params.channels);
    slots.load(x, params.x + offset, live);
    slots.load(grad, params.grad + offset, live);
  };
  load();
  weight.fill(params.weight, A(1), channels);
  __syncthreads();

  A weight_sum[kVectors][kVectorSize] = {}, bias_sum[kVectors][kVectorSize] = {};
  while (first < params.rows) {
    A all_n[kKeeps ? kVectors : 1][kVectorSize], all_s[kKeeps ? kVectors : 1][kVectorSize];
    A sums[2] = {};  // of s, and of s * n
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      A scale[kVectorSize];
      A(&n)[kVectorSize] = all_n[kKeeps ? j : 0], (&s)[kVectorSize] = all_s[kKeeps ? j : 0];
      weight.load(scale, j);
      unpack(n, x[j]);
      unpack(s, grad[j]);
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) {
        n[i] = (n[i] - mean) * rstd;
        weight_sum[j][i] += s[i] * n[i];
        bias_sum[j][i] += s[i];
        s[i] *= scale[i];
        sums[0] += s[i];
        sums[1] += s[i] * n[i];
      }
    }
    if (params.grad_x) {
      row_sums(sums, sums_now);
      std::swap(sums_now, sums_next);
      const A mean_s = sums[0] * length.inverse, mean_sn = sums[1] * length.inverse;
      const int64_t row = first + threadIdx.y;
      T* const grad_x = params.grad_x + slots.offset(row, params.channels);
#pragma unroll
      for (int j = 0; j < kVectors; ++j) {
        A(&n)[kVectorSize] = all_n[kKeeps ? j : 0], (&s)[kVectorSize] = all_s[kKeeps ? j : 0];
        if constexpr (!kKeeps) {
          A scale[kVectorSize];
          weight.load(scale, j);
          forget(x[j]);
          unpack(n, x[j]);
          unpack(s, grad[j]);
#pragma unroll
          for (int i = 0; i < kVectorSize; ++i) {
            n[i] = (n[i] - mean) * rstd;
            s[i] *= scale[i];
          }
        }
#pragma unroll
        for (int i = 0; i < kVectorSize; ++i) s[i] = (s[i] - mean_s - n[i] * mean_sn) * rstd;
        if (row < params.rows && slots.has(j)) store(grad_x + j * slots.pitch, pack<T>(s));
      }
    }
    first += static_cast<int64_t>(gridDim.x) * blockDim.y;
    load();
  }

  // The block's rows of threads, added up from first to last.
  const auto write = [&](A* partials, const A(&sum)[kVectors][kVectorSize]) {
    if (!partials) return;
    __syncthreads();  // what was here before has been read
    A* const of_row = block_sums + slots.offset(threadIdx.y, channels);
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      if (!slots.has(j)) continue;
#pragma unroll
      for (int i = 0; i < kVectorSize; ++i) of_row[j * slots.pitch + i] = sum[j][i];
    }
    __syncthreads();
    for (int c = thread_of_block(); c < channels; c += threads_of_block()) {
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
