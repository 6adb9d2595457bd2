// Version 2 of the gradients of the weights and of the bias of a 7 x 7 depthwise convolution of stride 1: on the tensor
// cores, for 16-bit elements. Products are exact, sums are in fp32.
//
// The same patches and planes as the convolution's (kernels_tensor_convolution.cuh), of the input, X, and of the
// output's gradient, G. What was a column of the right matrix there, a segment, is now what is summed over:
//
//   D[2 rows x 8 columns of G][8 columns of X] += G[2 rows x 8 columns][16 segments] X[16 segments][8 columns]
//
// for the eight rows of X that two rows of G meet and for two blocks of its columns: the one in which the window of the
// first column of G begins, and the next. In D each column of G has a row of its own, in which it meets 16 columns of
// X, seven of which are its window. All patches add to the same 16 D, 64 registers; only at the end do the diagonals,
// one for each weight, become sums. "16 segments" are the patch's eight in two places: other columns, or other rows.
//
// For a patch of 28 x 28 pixels and 16 channels, per 128 elements of G:
//
//   11 mma      16 for 256 places, and one in 17 with a matrix of ones for the bias; 28 of 32 columns, 7 of 8 segments
//   31 x 128 bytes to or from shared memory, free of bank conflicts: 4.5 for the copies, 4.5 and 6 to transpose them,
//               16 for the matrices (ldmatrix.trans)
//
// That is 18 to 22 cycles of tensor cores (sm_90), 31 of shared memory and, on an H200, 25 of memory. The sums of a
// channel stay with one warp, so that a block is 16 warps and alone on its multiprocessor: its phases, transposing and
// multiplying, do not overlap; only the copies for the next patch do. Some 50 cycles are to be expected, against 61 of
// FMA in version 1. Not measured yet.
#pragma once
#include "depthwise_conv/kernels_tensor.cuh"
#include "depthwise_conv/launch_tensor.h"

namespace convnext_kernels::depthwise_conv {

// How a patch's segments become 16: two blocks of columns, 2 apart of four or neighbours, or rows that are 4 apart.
template <int kBlocks>
struct Halves {
  static constexpr int kSegmentRows = 2 * pairs_of(kBlocks);
  static constexpr int kTiles = kBlocks == 4 ? 2 : 1;                        // left matrices side by side
  static constexpr int kSteps = pairs_of(kBlocks) / (kBlocks == 1 ? 2 : 1);  // below each other
  static constexpr int kRows = 2 * kSteps + kHaloRows;                       // of the input
  static constexpr int kApartRows = 4;

  // From the first half to the second, in units, in planes with this pitch.
  static constexpr int apart(int pitch) { return kBlocks == 4 ? 2 : kBlocks == 2 ? 1 : kApartRows * pitch; }
};

// [row of the input that meets two rows of the gradient][block of its columns][fragment of mma].
using WeightSums = float[kSize + 1][2][4];

// A channel's planes of a patch, as a lane of the warp reads them.
template <class T, int kBlocks>
struct PlanePair {
  using H = Halves<kBlocks>;
  static constexpr int kPitch = kBlocks + 1;
  const uint4 *grad, *x;  // where this lane's row of the first matrices begins
  int second;             // 1 in the lanes that give the second halves' addresses of x
  uint32_t exists;        // a mask for the two segments that this lane has elements of: others would be counted twice

  __device__ __forceinline__ PlanePair(const TensorPlan& plan, const uint4* grad_plane, const uint4* x_plane, int lane)
      : grad(grad_plane + segment_units<kBlocks, H::kSegmentRows>(plan, lane % 8, plan.grad_image_units) +
             lane / 8 % 2 * kBlocks + lane / 16 * H::apart(kBlocks)),
        x(x_plane + segment_units<kPitch, H::kSegmentRows>(plan, lane % 8, plan.image_units) +
          lane / 8 % 2 * H::apart(kPitch) + lane / 16),
        second(lane / 8 % 2) {
    const int pair = lane % 4 * 2, segments = plan.images * plan.segments;
    exists = (pair < segments ? 0xffffu : 0) | (pair + 1 < segments ? 0xffff0000u : 0);
  }

  // The left matrix of two rows of the gradient.
  __device__ __forceinline__ void load_gradient(uint32_t (&matrix)[4], int step) const {
    load_matrices<true>(matrix, grad + row_units(2 * step, kBlocks, H::kSegmentRows));
#pragma unroll
    for (int i = 0; i < 4; ++i) matrix[i] &= exists;
  }
  // The right matrices of a row of the input: the block of columns where the windows begin, and the next.
  __device__ __forceinline__ void load_input(uint32_t (&matrices)[4], int row) const {
    // Rows that are apart may have a segment's end between them.
    const bool apart = kBlocks == 1 && row / H::kSegmentRows != (row + H::kApartRows) / H::kSegmentRows;
    load_matrices<true>(matrices, x + row_units(row, kPitch, H::kSegmentRows) + (apart ? second : 0));
  }
};

template <class T, int kBlocks>
__device__ __forceinline__ void correlate_planes(WeightSums& sums, float (&bias)[4], PlanePair<T, kBlocks> planes) {
  using H = Halves<kBlocks>;
  const uint32_t one = pack_pair<T>(1.0f, 1.0f), ones[2] = {one, one};
#pragma unroll 1  // a wall for the scheduler, which otherwise loads so much ahead that registers spill
  for (int tile = 0; tile < H::kTiles; ++tile) {
    uint32_t gradient[H::kSteps][4], coming[4];
    planes.load_input(coming, 0);
#pragma unroll
    for (int row = 0; row < 2 * H::kSteps + kHaloRows; ++row) {
      if (row % 2 == 0 && row / 2 < H::kSteps) {
        planes.load_gradient(gradient[row / 2], row / 2);
        multiply_add<T>(bias, gradient[row / 2], ones);
      }
      const uint32_t first[2] = {coming[0], coming[1]}, next[2] = {coming[2], coming[3]};
      if (row + 1 < 2 * H::kSteps + kHaloRows) planes.load_input(coming, row + 1);
#pragma unroll
      for (int step = 0; step < H::kSteps; ++step) {
        const int q = row - 2 * step;
        if (q < 0 || q > kSize) continue;
        multiply_add<T>(sums[q][0], gradient[step], first);
        multiply_add<T>(sums[q][1], gradient[step], next);
      }
    }
    ++planes.grad;
    ++planes.x;
  }
}

// Adds up the diagonals and writes a channel's row of partial sums. `scratch`: kSumUnits of the warp's own.
__device__ __forceinline__ void write_partials(float* partials, int64_t channels, float* scratch,
                                               const WeightSums& sums, const float (&bias)[4], int lane) {
  constexpr int kRow = 2 * kBlockColumns + 1;  // 16 columns of the input, and one against bank conflicts
#pragma unroll
  for (int ky = 0; ky < kSize; ++ky) {
    // Row q of the input is ky = q of the first row of the gradient and ky = q - 1 of the second.
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scratch[lane / 4 * kRow + i / 2 * kBlockColumns + lane % 4 * 2 + i % 2] =
          sums[ky][i / 2][i % 2] + sums[ky + 1][i / 2][2 + i % 2];
    __syncwarp();
    if (lane < kSize) {
      float sum = 0;
#pragma unroll
      for (int column = 0; column < kBlockColumns; ++column) sum += scratch[column * kRow + column + lane];
      partials[(ky * kSize + lane) * channels] = sum;
    }
    __syncwarp();
  }
  // Every column of these products is the same; lanes 0, 4, ... have the sums of the eight columns of the gradient.
  float sum = bias[0] + bias[2];
#pragma unroll
  for (int step = 4; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(kFullWarp, sum, step);
  if (lane == 0) partials[kTaps * channels] = sum;
}

// What a block does in a turn. In shared memory, as registers are short.
struct Work {
  Patch patch;
  unsigned live;
  int left;  // patches of the block, with this one
};
static_assert(sizeof(Work) == kWorkBytes);

template <class T, int kBlocks>
__global__ void __launch_bounds__(kTensorGradientWarps* kWarpSize, 1)
    tensor_weight_gradient_kernel(const __grid_constant__ TensorWeightGradientParams<T> params) {
  constexpr int kSegmentRows = 2 * pairs_of(kBlocks), kPitch = kBlocks + 1;
  constexpr int kCopyLanes = kBlocks == 1 ? 16 : 32;  // a row of 8 columns is 16 copies
  const TensorPlan& plan = params.plan;
  const Images& shape = params.shape;

  SharedMemory shared;
  uint4* const planes = shared.take<uint4>(plan.plane_set_units());
  uint4* const copied = shared.take<uint4>(plan.copied_units());
  uint4* const grad_planes = shared.take<uint4>(plan.grad_plane_set_units());
  uint4* const copied_grad = shared.take<uint4>(plan.copied_grad_units());
  Work* const work = shared.take<Work>(2);  // this patch's and the next one's
  const int first_channel = static_cast<int>(blockIdx.x) * kTensorChunk;
  const int halves = min((shape.channels - first_channel) / 8, kPixelUnits);

  const auto begin = [&](const Patch& patch, int left, int turn) {
    const unsigned live = live_images(shape, params.sample_scale, plan, patch.sample);
    if (threadIdx.x == 0) work[turn] = {patch, live, left};
    copy_window<kCopyLanes>(copied, params.x, shape, PatchWindow(patch, plan, shape, kPadding), patch.sample, live,
                            plan.images, plan.copied_rows, plan.copied_pairs);
    copy_window<kCopyLanes>(copied_grad, params.grad, shape, PatchWindow(patch, plan, shape, 0), patch.sample, live,
                            plan.images, plan.grad_rows, plan.grad_pairs);
    copy_async_commit();
  };
  const int64_t first_patch = plan.first_patch(blockIdx.y);
  begin(Patch(plan, first_patch), static_cast<int>(plan.first_patch(blockIdx.y + 1) - first_patch), 0);

  WeightSums sums;
  float bias[4] = {};
#pragma unroll
  for (int i = 0; i < (kSize + 1) * 8; ++i) sums[i / 8][i / 4 % 2][i % 4] = 0;
  for (int turn = 0;; turn ^= 1) {
    copy_async_wait<0>();
    __syncthreads();  // the copies are here, and nobody reads the planes any more
    const Work& now = work[turn];
    if (now.live) {
      transpose_window<kPitch, kSegmentRows>(planes, plan.plane_units, plan.image_units, copied,
                                             PatchWindow(now.patch, plan, shape, kPadding), now.patch.row - kPadding,
                                             plan.rows + kHaloRows, now.patch.column - kPadding, now.live, plan.images,
                                             plan.copied_rows, plan.copied_pairs, halves);
      transpose_window<kBlocks, kSegmentRows>(grad_planes, plan.grad_plane_units, plan.grad_image_units, copied_grad,
                                              PatchWindow(now.patch, plan, shape, 0), now.patch.row, plan.rows,
                                              now.patch.column, now.live, plan.images, plan.grad_rows, plan.grad_pairs,
                                              halves);
    }
    __syncthreads();  // the planes are here, and nobody reads the copies any more
    if (now.left > 1) {
      Patch next = now.patch;
      next.advance(plan, shape);
      begin(next, now.left - 1, turn ^ 1);
    }
    const int lane = reread_thread_index() & (kWarpSize - 1), channel = reread_thread_index() >> kWarpBits;
    if (now.live && channel < halves * 8) {
      correlate_planes(sums, bias,
                       PlanePair<T, kBlocks>(plan, grad_planes + plane_of(channel, plan.grad_plane_units),
                                             planes + plane_of(channel, plan.plane_units), lane));
    }
    if (now.left == 1) break;
  }

  // A warp's own plane is read by nobody else: its memory is free.
  const int lane = reread_thread_index() & (kWarpSize - 1), channel = reread_thread_index() >> kWarpBits;
  if (channel >= halves * 8) return;
  __syncwarp();
  write_partials(
      params.partials + static_cast<int64_t>(blockIdx.y) * (kTaps + 1) * shape.channels + first_channel + channel,
      shape.channels, reinterpret_cast<float*>(planes + plane_of(channel, plan.plane_units)), sums, bias, lane);
}

template <class T>
void launch_tensor_weight_gradient(const char* op, const TensorWeightGradientParams<T>& params, cudaStream_t stream) {
  const TensorPlan& plan = params.plan;
  if (plan.row_blocks == 0) return;
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.row_blocks)),
                          dim3(kTensorGradientWarps * kWarpSize), static_cast<size_t>(plan.shared_bytes), stream};
  if (plan.blocks == 4) return launch(op, tensor_weight_gradient_kernel<T, 4>, shape, params);
  if (plan.blocks == 2) return launch(op, tensor_weight_gradient_kernel<T, 2>, shape, params);
  launch(op, tensor_weight_gradient_kernel<T, 1>, shape, params);
}

}  // namespace convnext_kernels::depthwise_conv
