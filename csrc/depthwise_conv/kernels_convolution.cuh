// 7 x 7 depthwise convolution of stride 1, and the gradient of its input, which is one with the filter turned around.
//
// A thread has one channel and seven columns and walks down the rows. The 49 weights stay in registers, and so do the
// sums of the seven rows of results that the row at hand takes part in: a window that turns by a row each step, so that
// after seven steps, which are one unrolled loop body, every sum is back in its register. Per step and thread:
//
//   343 FFMA    7 rows x 7 columns x 7 weights
//    13 LDS     the row's values, with three more on both sides; read once, never again
//    13 conversions to fp32 (16-bit types)
//     7 STS, 2 LDS.128, 4 conversions, 1 STG.128: a finished row of results through shared memory, so that 16 bytes go
//                out at once (two STG.128 for fp32)
//
// With barriers, predicates, addresses and the copies for the next stage, 83 % of the loop's instructions are FFMA
// (fp32: 86 %, with a residual: 77 to 80 %). No row is read twice, nor is a column of an image up to 56 wide. Window
// and weights want 128 registers; the loop is 45 KB of straight code.
#pragma once
#include "depthwise_conv/kernels.cuh"

namespace convnext_kernels::depthwise_conv {

// T: of the input. R: of the residual and of the result.
template <class T, class R>
struct ConvolutionParams {
  const T* x;                        // (samples, height, width, channels)
  Parameter weight;                  // (channels, 7, 7)
  Parameter bias;                    // (channels) or absent; a kernel with a residual has none
  const R* residual;                 // like y or null: added before the one rounding
  const float* sample_scale;         // (samples) or null: samples with 0 are not read, and y is the residual or 0 there
  R* y;                              // like x
  Images shape;                      // channels and addresses allow accesses of 16 bytes
  bool flipped;                      // the filter turned by 180 degrees
  int64_t row_pitch;                 // width * channels
  int row_elements, stage_elements;  // of a buffer in shared memory
  TilePlan plan;
};

using Window = float[kSize][kStrip];

// A warp's row of results on its way to memory. The lanes, each with seven columns of one channel, turn them around
// in shared memory, so that the first 28 have eight channels of one column.
template <class R, bool kResidual>
struct RowStore {
  static constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(R)), kVectors = kStoreChannels / kVector;

  float* staging;       // of the warp, where this lane's channel begins
  const float* staged;  // where this lane's eight channels are in it
  int64_t offset;       // of those in the row at hand
  int channels;         // of the eight, those that exist

  // Starts bringing near what the row needs.
  __device__ __forceinline__ void prefetch(const R* residual) {
    if constexpr (kResidual) {
      if (channels > 0) prefetch_to_l2(residual + offset);
    }
  }
  __device__ __forceinline__ void operator()(const float (&row)[kStrip], const R* residual, R* y) {
#pragma unroll
    for (int c = 0; c < kStrip; ++c) staging[c * kChunk] = row[c];
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i * kVector >= channels) break;
      float values[kVector];
#pragma unroll
      for (int j = 0; j < kVector; j += 4) {
        const float4 sums = *reinterpret_cast<const float4*>(staged + i * kVector + j);
        values[j] = sums.x;
        values[j + 1] = sums.y;
        values[j + 2] = sums.z;
        values[j + 3] = sums.w;
      }
      if constexpr (kResidual) {
        const auto residuals = load_streaming<R, kVector>(residual + offset + i * kVector);
#pragma unroll
        for (int j = 0; j < kVector; ++j) values[j] += to_accumulation(residuals.element[j]);
      }
      store(y + offset + i * kVector, pack<R>(values));
    }
    __syncwarp();
  }
};

template <class T, class R, bool kResidual>
__global__ void __launch_bounds__(kMaxWarps* kWarpSize, kResidentWarps / kMaxWarps)
    convolution_kernel(const __grid_constant__ ConvolutionParams<T, R> params) {
  constexpr Kind kKind = Kind::kConvolution;
  const TilePlan& plan = params.plan;
  const Images& shape = params.shape;
  SharedMemory shared;
  T* const buffers = shared.take<T>(2 * params.stage_elements);
  float* const staging = shared.take<float>(plan.warps() * kStoreFloats);
  // What the two buffers hold. In shared memory, as registers are short.
  Stage* const stages = shared.take<Stage>(2);

  const int channel = static_cast<int>(blockIdx.x * kChunk + threadIdx.x % kWarpSize);
  float weight[kTaps], bias[1] = {};
  load_parameter(weight, channel < shape.channels ? params.weight : Parameter{}, static_cast<int64_t>(channel) * kTaps);
  if constexpr (!kResidual) load_parameter(bias, channel < shape.channels ? params.bias : Parameter{}, channel);
  if (params.flipped) {
#pragma unroll
    for (int i = 0; i < kTaps / 2; ++i) {
      const float other = weight[i];
      weight[i] = weight[kTaps - 1 - i];
      weight[kTaps - 1 - i] = other;
    }
  }

  const auto prepare = [&](const Stage& stage, int buffer) {
    if (threadIdx.x == 0) stages[buffer] = stage;
    copy_rows(buffers + buffer * params.stage_elements, params.x, shape, params.sample_scale, plan, stage,
              {stage.step, stage.steps, 0, shape.height}, kPadding, reread_thread_index());
    copy_async_commit();
  };
  Window sums;
  prepare(first_stage<kKind>(plan, blockIdx.y), 0);
  for (int buffer = 0;; buffer ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the stage is here, and nobody reads the other one any more
    const Stage& stage = stages[buffer];
    if (stage.steps == 0) break;
    prepare(next_stage<kKind>(plan, stage), buffer ^ 1);

    const int thread = reread_thread_index(), lane = thread & (kWarpSize - 1), warp = thread >> kWarpBits;
    const int image = divide(warp, plan.strips), strip = warp - image * plan.strips;
    const int64_t sample = stage.sample + image;
    const bool exists = sample < shape.samples, live = is_live(shape, params.sample_scale, sample);
    if (is_first_of_segment<kKind>(stage)) {
#pragma unroll
      for (int i = 0; i < kTaps; ++i) sums[i / kStrip][i % kStrip] = live ? bias[0] : 0.0f;
    }

    RowStore<R, kResidual> row_store;
    {
      const int column = stage.tile * plan.columns + strip * kStrip + lane / 4;
      const int first_channel = static_cast<int>(blockIdx.x) * kChunk + lane % 4 * kStoreChannels;
      row_store.staging = staging + warp * kStoreFloats + lane;
      row_store.staged = staging + warp * kStoreFloats + lane * kStoreChannels;
      row_store.offset = (sample * shape.height + stage.step - kPadding) * params.row_pitch +
                         static_cast<int64_t>(column) * shape.channels + first_channel;
      row_store.channels = lane < kStoreLanes && column < shape.width ? shape.channels - first_channel : 0;
    }
    // Step number i of this stage completes row i - 3 of the results from there; of those, the segment's are to be
    // written. At the end of an image three more rows are complete: steps without input.
    const int first_complete = max(stage.first - stage.step + kPadding, 0);
    const int end_complete = stage.last ? stage.end - stage.step + kPadding : stage.steps;
    // Bit i: step i reads a row; step i completes a row that is to be written.
    unsigned reads = live ? (1u << stage.steps) - 1 : 0;
    unsigned writes = exists ? (1u << end_complete) - (1u << min(first_complete, end_complete)) : 0;
    // Where this thread's 13 columns of a row begin.
    const T* from =
        buffers + buffer * params.stage_elements + (image * plan.haloed_pitch + strip * kStrip) * kChunk + lane;
    for (; reads | writes; reads >>= kStageRows, writes >>= kStageRows) {
#pragma unroll
      for (int phase = 0; phase < kStageRows; ++phase) {
        if (writes >> phase & 1) row_store.prefetch(params.residual);
        if (reads >> phase & 1) {
#pragma unroll
          for (int j = 0; j < kStrip + kSize - 1; ++j) {
            const float value = to_accumulation(from[j * kChunk]);
#pragma unroll
            for (int c = 0; c < kStrip; ++c) {
              const int kx = j - c;
              if (kx < 0 || kx >= kSize) continue;
#pragma unroll
              for (int ky = 0; ky < kSize; ++ky) {
                float& sum = sums[window_row(phase, kPadding - ky)][c];
                // A row of results begins with its first weight.
                sum = fmaf(weight[ky * kSize + kx], value, ky == 0 && kx == 0 ? bias[0] : sum);
              }
            }
          }
        }
        if (writes >> phase & 1) row_store(sums[window_row(phase, -kPadding)], params.residual, params.y);
        from += params.row_elements;
        row_store.offset += params.row_pitch;
      }
    }
  }
}

// Fills in what follows from the rest of `params`.
template <class T, class R>
void launch_tuned_convolution(const char* op, ConvolutionParams<T, R> params, cudaStream_t stream) {
  const TilePlan& plan = params.plan;
  if (plan.row_blocks == 0) return;
  params.row_pitch = static_cast<int64_t>(params.shape.width) * params.shape.channels;
  params.row_elements = plan.haloed_pixels * kChunk;
  params.stage_elements = static_cast<int>(plan.stage_elements(Kind::kConvolution));
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.row_blocks)),
                          dim3(static_cast<unsigned>(plan.warps() * kWarpSize)), static_cast<size_t>(plan.shared_bytes),
                          stream};
  if (params.residual) return launch(op, convolution_kernel<T, R, true>, shape, params);
  if constexpr (std::is_same_v<T, R>) launch(op, convolution_kernel<T, R, false>, shape, params);
}

}  // namespace convnext_kernels::depthwise_conv
