// The gradients of the weights and of the bias of a 7 x 7 depthwise convolution of stride 1.
//
// The convolution's kernel turned inside out: a thread has one channel and seven columns and walks down the rows; its
// 49 sums, one a weight, stay in registers, and so do seven rows of the output's gradient: those that meet the row of
// the input at hand, a window that turns by a row each step. Per step and thread:
//
//   343 FFMA    7 weights x 7 rows x 7 columns
//    20 LDS     13 of the input's row, 7 of the next row of the output's gradient, each read once
//    20 conversions to fp32 (16-bit types)
//     7 FADD    the bias's gradient
//
// A block's threads add their sums up at its end, in a fixed order, to one row of a workspace; a second kernel adds the
// rows up, also in a fixed order: the same bits on every run.
#pragma once
#include "depthwise_conv/kernels.cuh"

namespace convnext_kernels::depthwise_conv {

template <class T>
struct WeightGradientParams {
  const T* grad;              // (samples, height, width, channels)
  const T* x;                 // like grad
  const float* sample_scale;  // (samples) or null: samples with 0 are not read
  float* partials;            // (row_blocks, 7 * 7 + 1, channels): sums for the weights, then the bias
  Images shape;               // channels and addresses allow accesses of 16 bytes
  TilePlan plan;
};

template <class T>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kResidentWarps / kMaxWarps)
    weight_gradient_kernel(const __grid_constant__ WeightGradientParams<T> params) {
  constexpr Kind kKind = Kind::kWeightGradient;
  const TilePlan& plan = params.plan;
  const Images& shape = params.shape;
  const int input_row = plan.haloed_pixels * kChunk, grad_row = plan.pixels * kChunk;
  const int buffer_elements = kStageRows * (input_row + grad_row);

  SharedMemory shared;
  T* const buffers = shared.take<T>(2 * buffer_elements);
  Stage* const stages = shared.take<Stage>(2);  // what the two buffers hold

  const auto prepare = [&](const Stage& stage, int buffer) {
    if (threadIdx.x == 0) stages[buffer] = stage;
    const int thread = reread_thread_index();
    T* const to = buffers + buffer * buffer_elements;
    copy_rows(to, params.x, shape, params.sample_scale, plan, stage,
              {stage.step, stage.steps, max(stage.first, 0), shape.height}, kPadding, thread);
    copy_rows(to + kStageRows * input_row, params.grad, shape, params.sample_scale, plan, stage,
              {stage.step + kPadding, stage.steps, 0, shape.height}, 0, thread);
    copy_async_commit();
  };
  float sums[kTaps + 1] = {};
  float window[kSize][kStrip];
  prepare(first_stage<kKind>(plan, blockIdx.y), 0);
  for (int buffer = 0;; buffer ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the stage is here, and nobody reads the other one any more
    const Stage& stage = stages[buffer];
    if (stage.steps == 0) break;
    prepare(next_stage<kKind>(plan, stage), buffer ^ 1);

    const int thread = reread_thread_index(), lane = thread & (kWarpSize - 1), warp = thread >> kWarpBits;
    const int image = divide(warp, plan.strips), strip = warp - image * plan.strips;
    if (!is_live(shape, params.sample_scale, stage.sample + image)) continue;
    if (is_first_of_segment<kKind>(stage)) {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) window[i / kStrip][i % kStrip] = 0;
    }
    const int first_pair = stage.first - stage.step;  // the first step that has a row of the input
    const int steps = stage.steps;
    const T* x = buffers + buffer * buffer_elements + (image * plan.haloed_pitch + strip * kStrip) * kChunk + lane;
    const T* grad = buffers + buffer * buffer_elements + kStageRows * input_row +
                    (image * plan.columns + strip * kStrip) * kChunk + lane;
#pragma unroll
    for (int phase = 0; phase < kStageRows; ++phase) {
      if (phase >= steps) break;
      float (&newest)[kStrip] = window[window_row(phase, kPadding)];
#pragma unroll
      for (int c = 0; c < kStrip; ++c) newest[c] = to_accumulation(grad[c * kChunk]);
      if (phase >= first_pair) {
#pragma unroll
        for (int j = 0; j < kStrip + kSize - 1; ++j) {
          const float value = to_accumulation(x[j * kChunk]);
#pragma unroll
          for (int c = 0; c < kStrip; ++c) {
            const int kx = j - c;
            if (kx < 0 || kx >= kSize) continue;
#pragma unroll
            for (int ky = 0; ky < kSize; ++ky)
              sums[ky * kSize + kx] = fmaf(window[window_row(phase, kPadding - ky)][c], value, sums[ky * kSize + kx]);
          }
        }
#pragma unroll
        for (int c = 0; c < kStrip; ++c) sums[kTaps] += window[window_row(phase, 0)][c];
      }
      x += input_row;
      grad += grad_row;
    }
  }

  // The stages' memory is free now: [sum][warp][lane].
  float* const all = reinterpret_cast<float*>(buffers);
  const int warps = plan.warps(), lane = static_cast<int>(threadIdx.x) % kWarpSize;
#pragma unroll
  for (int i = 0; i <= kTaps; ++i) all[i * warps * kChunk + static_cast<int>(threadIdx.x)] = sums[i];
  __syncthreads();
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * kChunk + lane;
  if (channel >= shape.channels) return;
  for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i <= kTaps; i += warps) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += all[(i * warps + w) * kChunk + lane];
    params.partials[(static_cast<int64_t>(blockIdx.y) * (kTaps + 1) + i) * shape.channels + channel] = sum;
  }
}

template <class T>
void launch_tuned_weight_gradient(const char* op, const WeightGradientParams<T>& params, cudaStream_t stream) {
  const TilePlan& plan = params.plan;
  if (plan.row_blocks == 0) return;
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.row_blocks)),
                          dim3(static_cast<unsigned>(plan.warps() * kWarpSize)), static_cast<size_t>(plan.shared_bytes),
                          stream};
  launch(op, weight_gradient_kernel<T>, shape, params);
}

// --- the second half, for the simple kernel too

constexpr int kSumRows = 8;  // rows of threads of a block, which has 32 columns

// The sums over the rows of partials (rows, taps + 1, channels), in an order that depends on `rows` only, to
// grad_weight (channels, taps) and grad_bias (channels). Grid: (taps + 1) * channels / 32.
template <class A>
__global__ void __launch_bounds__(kWarpSize* kSumRows)
    sum_partials_kernel(const A* __restrict__ partials, A* __restrict__ grad_weight, A* __restrict__ grad_bias,
                        int64_t rows, int taps, int channels) {
  SharedMemory shared;
  A* const sums = shared.take<A>(kSumRows * kWarpSize);
  const int64_t columns = static_cast<int64_t>(taps + 1) * channels;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kWarpSize + threadIdx.x;
  A sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int64_t row = threadIdx.y; row < rows; row += kSumRows) sum += partials[row * columns + column];
  }
  sums[threadIdx.y * kWarpSize + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || column >= columns) return;
#pragma unroll
  for (int i = 1; i < kSumRows; ++i) sum += sums[i * kWarpSize + threadIdx.x];
  const int64_t tap = column / channels, channel = column % channels;
  if (tap < taps) {
    grad_weight[channel * taps + tap] = sum;
  } else {
    grad_bias[channel] = sum;
  }
}

template <class A>
void launch_sum_partials(const char* op, const A* partials, A* grad_weight, A* grad_bias, int64_t rows, int taps,
                         int channels, cudaStream_t stream) {
  const int64_t blocks = divide_up(static_cast<int64_t>(taps + 1) * channels, kWarpSize);
  const LaunchShape shape{dim3(static_cast<unsigned>(blocks)), dim3(kWarpSize, kSumRows),
                          shared_piece(sizeof(A) * kSumRows * kWarpSize), stream};
  launch(op, sum_partials_kernel<A>, shape, partials, grad_weight, grad_bias, rows, taps, channels);
}

}  // namespace convnext_kernels::depthwise_conv
