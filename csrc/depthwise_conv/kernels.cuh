// What the depthwise convolution's tuned kernels share: copying rows of images into shared memory.
// Text for nvcc and for the host (common/machine.cuh).
#pragma once
#include "common/machine.cuh"
#include "depthwise_conv/launch_plan.h"

namespace convnext_kernels::depthwise_conv {

// (samples, height, width, channels) in memory.
struct Images {
  int64_t samples;
  int height, width, channels;
};

// Both kernels keep seven rows of something in registers, rows step - 3 to step + 3: where row step + offset is.
// `phase` is the step's number in its stage; a register array may only be indexed by constants.
constexpr int window_row(int phase, int offset) {
  return (phase + offset + 2 * kSize) % kSize;
}

constexpr int kWarpBits = 5;  // of a thread's index, below those of its warp

// a / b for a >= 0 and b > 0, which takes half the instructions of the signed one.
__device__ __forceinline__ int divide(int a, int b) {
  return static_cast<int>(static_cast<unsigned>(a) / static_cast<unsigned>(b));
}

template <class A>
__device__ __forceinline__ bool is_live(const Images& images, const A* sample_scale, int64_t sample) {
  return sample < images.samples && (!sample_scale || sample_scale[sample] != A(0));
}

// Rows of a stage: `rows` of them from `row`, of which those in [first, end) exist; the others read as zeros.
struct StageRows {
  int row, rows, first, end;
};

// Starts copying a stage's rows of its tile, `halo` columns more on both sides, to [row][pixel][channel] in shared
// memory. Columns outside the image become zeros; so do images that are dropped or do not exist, unread.
template <class T>
__device__ __forceinline__ void copy_rows(T* to, const T* from, const Images& shape, const float* sample_scale,
                                          const TilePlan& plan, const Stage& stage, StageRows rows, int halo,
                                          int thread) {
  constexpr int kVector = kVectorBytes / static_cast<int>(sizeof(T)), kVectors = kChunk / kVector;
  const int pixels = halo ? plan.haloed_pixels : plan.pixels, pitch = plan.columns + halo;
  const int64_t row_pitch = static_cast<int64_t>(shape.width) * shape.channels;
  for (int i = thread; i < pixels * kVectors; i += static_cast<int>(blockDim.x)) {
    const int pixel = i / kVectors, image = min(divide(pixel, pitch), plan.images - 1);
    const int column = stage.tile * plan.columns + pixel - image * pitch - halo;
    const int channel = static_cast<int>(blockIdx.x) * kChunk + i % kVectors * kVector;
    const int64_t sample = stage.sample + image;
    const bool valid =
        column >= 0 && column < shape.width && channel < shape.channels && is_live(shape, sample_scale, sample);
    const T* at = from;
    if (valid)
      at += (sample * shape.height + rows.row) * row_pitch + static_cast<int64_t>(column) * shape.channels + channel;
    T* into = to + i * kVector;
#pragma unroll 1  // it has no registers to spare
    for (int k = 0; k < rows.rows; ++k, at += row_pitch, into += pixels * kChunk) {
      const int row = rows.row + k;
      copy_async(into, at, valid && row >= rows.first && row < rows.end);
    }
  }
}

}  // namespace convnext_kernels::depthwise_conv
