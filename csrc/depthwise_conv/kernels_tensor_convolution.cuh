// Version 2 of the 7 x 7 depthwise convolution of stride 1, and of the gradient of its input: on the tensor cores, for
// 16-bit elements. Weights are rounded to the elements' type, as autocast does; products are exact, sums are in fp32.
//
// A product of matrices for one channel: the right one, X, is two rows of the input of 8 columns each, in eight
// segments of the image at once; the rows of the left one, A, are two rows of results of 8 columns each, and in each of
// them stands the filter, shifted to where the result's window begins (Toeplitz):
//
//   D[2 rows x 8 columns][8 segments] += A[2 rows x 8 columns][2 rows x 8 columns] X[2 rows x 8 columns][8 segments]
//
// Two rows of results meet eight rows of the input and, of the 16 columns of two blocks, 14: 8 mma.m16n8k16 for 128
// results. The quarters of an A are Toeplitz matrices, of which there are two for a row of the filter: for the block of
// the result itself, and for the next. A thread's part of at least one of these is zero, so that a channel's filter is
// seven registers, of which the eight A are put together, once a channel and patch. As the columns of X are segments
// and not neighbouring rows, X is loaded once and serves every row of results that its rows take part in.
//
// For a patch of 28 x 28 pixels and 16 channels (maps of 56 and 28 pixels), per 128 results that are kept:
//
//   10.4 mma     8 for 128 slots; 28 of 32 columns and 7 of 8 segments are used
//   22   x 128 bytes to or from shared memory, free of bank conflicts: 2.5 for the copies, 2.5 and 3.5 to transpose
//                them (with halo and zeros), 8.2 for X (ldmatrix), 2.5 and 2 for results, 1 for the filter
//    1.2 x 256 bytes read from L2 (halos), 1 x 256 bytes written
//  110 instructions of a warp, of which four can start in a cycle: 48 to multiply, stage and check, 21 and 19 to
//                transpose and to start copies, 21 to write results
//
// Counted in cycles of a multiprocessor of sm_90, an mma being 1.6 to 2 (mma.sync reaches about 60 % of the tensor
// cores' rate there): 17 to 21 of tensor cores, 22 of shared memory, 28 of instructions; on an H200 25 of memory (4
// bytes a result, 20.7 bytes a cycle). Version 1: 61 of FMA. So the bound is near that of memory as long as the units
// overlap, for which there are two resident blocks, and copies for the next patch under way while a block works on this
// one. Not measured yet.
#pragma once
#include "depthwise_conv/kernels_tensor.cuh"
#include "depthwise_conv/launch_tensor.h"

namespace convnext_kernels::depthwise_conv {

constexpr int kFilterSteps = (kSize + 1) / 2;  // pairs of rows of the input that a pair of rows of results meets

// The filters of the block's channels, rounded to T, as pairs: word d + 1 of a row is (w[d], w[d + 1]) for d = -1, ...,
// 6, zero where there is no weight.
template <class T>
__device__ __forceinline__ void build_weight_table(uint32_t* table, Parameter weight, int channels, bool flipped) {
  for (int i = static_cast<int>(threadIdx.x); i < kTensorChunk * kSize * kTableWords;
       i += static_cast<int>(blockDim.x)) {
    const int first = i % kTableWords - 1, of_all = i / kTableWords, ky = of_all % kSize;
    const int64_t channel = static_cast<int64_t>(blockIdx.x) * kTensorChunk + of_all / kSize;
    float pair[2] = {};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int kx = first + j, tap = ky * kSize + kx;
      float value[1] = {};
      if (kx >= 0 && kx < kSize && channel < channels)
        load_parameter(value, weight, channel * kTaps + (flipped ? kTaps - 1 - tap : tap));
      pair[j] = value[0];
    }
    table[i] = pack_pair<T>(pair[0], pair[1]);
  }
}

// A channel's left matrices, for two rows of the input each: A_i holds w in its left quarters for the first row and in
// its right ones for the second, its upper quarters for the first row of results, its lower ones for the second. Row m
// and column k of a quarter: w[ky][k - m], or of the matrices for the next block of columns, w[ky][k + 8 - m].
struct FilterMatrices {
  uint32_t near[kFilterSteps][4], next[kFilterSteps][4];

  __device__ __forceinline__ FilterMatrices(const uint32_t* rows, int lane) {
    // This thread's pair begins at weight k - m or, eight on, in the other block: one of the two does not exist.
    const auto first_of = [](int of_lane) { return of_lane % 4 * 2 - of_lane / 4; };
    const int first = first_of(lane);
    uint32_t pair[kSize + 2] = {};  // of rows -1 to 7
#pragma unroll
    for (int ky = 0; ky < kSize; ++ky) pair[ky + 1] = rows[ky * kTableWords + (first >= -1 ? first + 1 : first + 9)];
    // An mma wants its four registers side by side, and every pair stands in two of them. So that the compiler makes
    // two of it here, and does not copy it whenever it is wanted, the second comes about in a way it cannot see
    // through.
    const uint32_t near_mask[2] = {first >= -1 ? ~0u : 0u,
                                   first_of(reread_thread_index() % kWarpSize) >= -1 ? ~0u : 0u};
#pragma unroll
    for (int step = 0; step < kFilterSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int ky = 2 * step + i / 2 - i % 2;
        near[step][i] = pair[ky + 1] & near_mask[i / 2];
        next[step][i] = pair[ky + 1] & ~near_mask[i / 2];
      }
    }
  }
};

// Two rows of a patch's input in eight segments: of each block of eight columns, the right matrix of 16 x 8.
template <int kBlocks>
struct RowPair {
  uint32_t block[kBlocks + 1][2];

  // Where this lane's row of a matrix begins, in units from its segment: two blocks of two rows in one load.
  static __device__ __forceinline__ int lane_units(int lane) { return lane / 8 % 2 * (kBlocks + 1) + lane / 16; }

  __device__ __forceinline__ void load(const uint4* from) {
#pragma unroll
    for (int i = 0; i < kBlocks; i += 2) {
      uint32_t fragments[4];
      load_matrices(fragments, from + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) block[i + j / 2][j % 2] = fragments[j];
    }
    if constexpr (kBlocks > 1) load_matrices(block[kBlocks], from + kBlocks);
  }
};

// The results of a plane in a warp's registers: [pair of rows][block of columns][fragment of mma].
template <int kBlocks>
using PlaneSums = float[pairs_of(kBlocks)][kBlocks][4];

// `plane`: where this lane's row of the first matrix begins.
template <class T, int kBlocks>
__device__ __forceinline__ void convolve_plane(PlaneSums<kBlocks>& sums, const uint32_t* filter, const uint4* plane,
                                               float bias, int lane) {
  constexpr int kPairs = pairs_of(kBlocks), kSteps = kPairs + kPadding;
  const FilterMatrices matrices(filter, lane);
#pragma unroll
  for (int i = 0; i < kPairs * kBlocks * 4; ++i) sums[i / 4 / kBlocks][i / 4 % kBlocks][i % 4] = bias;
  RowPair<kBlocks> coming;
  coming.load(plane);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const RowPair<kBlocks> rows = coming;
    if (step + 1 < kSteps) coming.load(plane + row_units(2 * (step + 1), kBlocks + 1, 2 * kPairs));
#pragma unroll
    for (int other = 0; other < 2; ++other) {
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        if (step < pair || step - pair >= kFilterSteps) continue;
        const auto& matrix = other ? matrices.next[step - pair] : matrices.near[step - pair];
#pragma unroll
        for (int block = 0; block < kBlocks; ++block)
          multiply_add<T>(sums[pair][block], matrix, rows.block[block + other]);
      }
    }
  }
}

// The same without tensor cores, for a plane that holds an infinity or a NaN: multiplied by the zeros of A it reaches
// results that it is no part of. Rolled up, as it is hardly ever run.
template <class T, int kBlocks>
__device__ __forceinline__ void convolve_exactly(PlaneSums<kBlocks>& sums, const uint32_t* filter, const uint4* plane,
                                                 const TensorPlan& plan, float bias, int lane) {
  constexpr int kSegmentRows = 2 * pairs_of(kBlocks), kPitch = kBlocks + 1, kSums = kSegmentRows * kBlocks * 2;
#pragma unroll 1
  for (int i = 0; i < kSums; ++i) {
    const int row = i / 4 / kBlocks * 2 + i % 4 / 2, block = i / 4 % kBlocks;
    const uint4* const segment =
        plane + segment_units<kPitch, kSegmentRows>(plan, lane % 4 * 2 + i % 2, plan.image_units) + block;
    float sum = bias;
#pragma unroll 1
    for (int tap = 0; tap < kTaps; ++tap) {
      const int ky = tap / kSize, kx = tap % kSize;
      const auto* weight = reinterpret_cast<const T*>(filter + ky * kTableWords + kx + 1);
      const auto* values = reinterpret_cast<const T*>(segment + row_units(row + ky, kPitch, kSegmentRows));
      sum = fmaf(to_accumulation(*weight), to_accumulation(values[lane / 4 + kx]), sum);
    }
#pragma unroll
    for (int j = 0; j < kSums; ++j) {
      float& kept = sums[j / 4 / kBlocks][j / 4 % kBlocks][j % 4];
      kept = i == j ? sum : kept;
    }
  }
}

// How results lie in the place of their plane: segment after segment, each in rows of kBlocks * 8 columns; in the type
// of the result, or in fp32 where a residual comes on top.
template <class T, bool kResidual, int kBlocks>
struct StagedResults {
  using Element = std::conditional_t<kResidual, float, T>;
  static constexpr int kSegmentRows = 2 * pairs_of(kBlocks);
  static constexpr int kBlockUnits = static_cast<int>(sizeof(Element)) / 2, kRowUnits = kBlocks * kBlockUnits;
  static constexpr int kUnits = kSegmentRows * kRowUnits + 1;  // of a segment: odd, against bank conflicts
};

template <class T, bool kResidual, int kBlocks>
__device__ __forceinline__ void stage_results(uint4* plane, const PlaneSums<kBlocks>& sums, int segments, int lane) {
  using Results = StagedResults<T, kResidual, kBlocks>;
#pragma unroll
  for (int row = 0; row < Results::kSegmentRows; ++row) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      // A thread has the same column of two segments.
      const float first = sums[row / 2][block][row % 2 * 2], second = sums[row / 2][block][row % 2 * 2 + 1];
      uint4* const to = plane + row * Results::kRowUnits + block * Results::kBlockUnits;
      if constexpr (kResidual) {
        const int segment = lane % 4 * 2;
        float* const column = reinterpret_cast<float*>(to + segment * Results::kUnits) + lane / 4;
        if (segment < segments) column[0] = first;
        if (segment + 1 < segments) column[Results::kUnits * 4] = second;
      } else {
        // Transposed, it has two columns of one.
        const uint32_t columns = transpose_matrix(pack_pair<T>(first, second));
        const int segment = lane / 4;
        if (segment < segments) reinterpret_cast<uint32_t*>(to + segment * Results::kUnits)[lane % 4] = columns;
      }
    }
  }
}

// From the planes of results to memory, 16 bytes at a time: eight channels of two neighbouring columns, or of one where
// there is a residual. A group of kLanes threads has a row.
template <class T, class R, bool kResidual, int kBlocks, class X>
__device__ __forceinline__ void store_results(const uint4* planes, const TensorConvolutionParams<T, R, X>& params,
                                              const Patch& patch, unsigned live, int halves) {
  using Results = StagedResults<T, kResidual, kBlocks>;
  constexpr int kColumns = kResidual ? 1 : 2, kRowItems = kBlocks * kBlockColumns / kColumns * kPixelUnits;
  constexpr int kLanes = smaller(kRowItems, kWarpSize), kVector = kUnitBytes / static_cast<int>(sizeof(R));
  const TensorPlan& plan = params.plan;
  const Images& shape = params.shape;
  const int thread = reread_thread_index(), half = thread % kPixelUnits, place = thread % kLanes / kPixelUnits;
  if (half >= halves) return;
  const int rows = min(plan.rows, shape.height - patch.row), columns = min(plan.columns, shape.width - patch.column);
  const int channel = plan.plane_units * 4;
  planes += plane_of(half * 8, plan.plane_units);
  const int64_t first =
      ((patch.sample * shape.height + patch.row) * shape.width + patch.column + place * kColumns) * shape.channels +
      static_cast<int64_t>(blockIdx.x) * kTensorChunk + half * 8;
  for (int i = thread / kLanes; i < plan.images * rows; i += static_cast<int>(blockDim.x) / kLanes) {
    const int image = plan.images == 1 ? 0 : divide(i, rows), row = i - image * rows;
    if (patch.sample + image >= shape.samples) break;
    const bool is_zero = !(live >> image & 1);
    const int segment = image * plan.segments + row / Results::kSegmentRows;
    const auto* words = reinterpret_cast<const uint32_t*>(planes + segment * Results::kUnits +
                                                          row % Results::kSegmentRows * Results::kRowUnits) +
                        place;
    int64_t at = first + static_cast<int64_t>(image * shape.height + row) * shape.width * shape.channels;
#pragma unroll
    for (int j = 0; j < kRowItems; j += kLanes) {
      const int column = (place + j / kPixelUnits) * kColumns;
      if (column >= columns) break;
      uint32_t word[8];
#pragma unroll
      for (int k = 0; k < 8; ++k) word[k] = is_zero ? 0 : words[k * channel + j / kPixelUnits];
      if constexpr (kResidual) {
#pragma unroll
        for (int k = 0; k < 8; k += kVector) {
          const auto residuals = load_streaming<R, kVector>(params.residual + at + k);
          float values[kVector];
#pragma unroll
          for (int l = 0; l < kVector; ++l)
            values[l] = __uint_as_float(word[k + l]) + to_accumulation(residuals.element[l]);
          store(params.y + at + k, pack<R>(values));
        }
      } else {
        const auto store_column = [&](R* to, const uint4& bits) {
          Vector<R, kVector> vector;
          std::memcpy(&vector, &bits, sizeof(bits));
          store(to, vector);
        };
        store_column(params.y + at, {lower_halves(word[0], word[1]), lower_halves(word[2], word[3]),
                                     lower_halves(word[4], word[5]), lower_halves(word[6], word[7])});
        if (column + 1 < columns)
          store_column(params.y + at + shape.channels,
                       {upper_halves(word[0], word[1]), upper_halves(word[2], word[3]), upper_halves(word[4], word[5]),
                        upper_halves(word[6], word[7])});
      }
      at += static_cast<int64_t>(kLanes / kPixelUnits * kColumns) * shape.channels;
    }
  }
}

template <class T, class R, bool kResidual, int kBlocks, class X>
__global__ void __launch_bounds__(kTensorConvolutionWarps* kWarpSize, 2)
    tensor_convolution_kernel(const __grid_constant__ TensorConvolutionParams<T, R, X> params) {
  constexpr bool kRounds = !std::is_same_v<X, T>;
  constexpr int kSegmentRows = 2 * pairs_of(kBlocks), kPitch = kBlocks + 1;
  constexpr int kCopyLanes = kBlocks == 1 && !kRounds ? 16 : 32;  // a row of 8 columns is 16 copies, in fp32 32
  const TensorPlan& plan = params.plan;
  const Images& shape = params.shape;
  Patch patch(plan, plan.first_patch(blockIdx.y));
  int left = static_cast<int>(plan.first_patch(blockIdx.y + 1) - plan.first_patch(blockIdx.y));

  SharedMemory shared;
  uint4* const planes = shared.take<uint4>(plan.plane_set_units());
  uint4* const copied = shared.take<uint4>(plan.copied_units());
  uint32_t* const table = shared.take<uint32_t>(kTensorChunk * kSize * kTableWords);
  const int first_channel = static_cast<int>(blockIdx.x) * kTensorChunk;
  const int halves = min((shape.channels - first_channel) / 8, kPixelUnits);

  // Also where samples are dropped, if they are to be rounded.
  const auto copy = [&](const Patch& of, unsigned live) {
    if constexpr (kRounds) live = live_images(shape, nullptr, plan, of.sample);
    copy_window<kCopyLanes>(copied, params.x, shape, PatchWindow(of, plan, shape, kPadding), of.sample, live,
                            plan.images, plan.copied_rows, plan.copied_pairs);
    copy_async_commit();
  };
  unsigned live = live_images(shape, params.sample_scale, plan, patch.sample);
  copy(patch, live);
  build_weight_table<T>(table, params.weight, shape.channels, params.flipped);

  for (;; --left) {
    copy_async_wait<0>();
    __syncthreads();  // the copies are here, and nobody reads the planes any more
    const auto transpose = [&](const auto& pixels) {
      transpose_window<kPitch, kSegmentRows>(planes, plan.plane_units, plan.image_units, copied,
                                             PatchWindow(patch, plan, shape, kPadding), patch.row - kPadding,
                                             plan.rows + kHaloRows, patch.column - kPadding, live, plan.images,
                                             plan.copied_rows, plan.copied_pairs, halves, pixels);
    };
    if constexpr (kRounds) {
      transpose(RoundedPixels<T>{params.x_copy, shape, plan, patch, live_images(shape, nullptr, plan, patch.sample)});
    } else {
      if (live) transpose(CopiedPixels{});
    }
    __syncthreads();  // the planes are here, and nobody reads the copies any more
    Patch next = patch;
    unsigned next_live = 0;
    if (left > 1) {
      next.advance(plan, shape);
      next_live = live_images(shape, params.sample_scale, plan, next.sample);
      copy(next, next_live);
    }

    const int lane = reread_thread_index() & (kWarpSize - 1), warp = reread_thread_index() >> kWarpBits;
    for (int channel = warp; live && channel < halves * 8; channel += kTensorConvolutionWarps) {
      uint4* const plane = planes + plane_of(channel, plan.plane_units);
      const uint32_t* const filter = table + channel * kSize * kTableWords;
      const uint4* const rows = plane + segment_units<kPitch, kSegmentRows>(plan, lane % 8, plan.image_units) +
                                RowPair<kBlocks>::lane_units(lane);
      float bias[1] = {};
      if constexpr (!kResidual) load_parameter(bias, params.bias, first_channel + channel);
      PlaneSums<kBlocks> sums;
      convolve_plane<T, kBlocks>(sums, filter, rows, bias[0], lane);
      float zero_or_nan = 0;
#pragma unroll
      for (int i = 0; i < kSegmentRows * kBlocks * 2; ++i)
        zero_or_nan = fmaf(sums[i / 4 / kBlocks][i / 4 % kBlocks][i % 4], 0.0f, zero_or_nan);
      if (__any_sync(kFullWarp, zero_or_nan != 0))
        convolve_exactly<T, kBlocks>(sums, filter, plane, plan, bias[0], lane);
      __syncwarp();  // nobody reads the plane any more: the results take its place
      stage_results<T, kResidual, kBlocks>(plane, sums, plan.images * plan.segments, lane);
    }
    __syncthreads();  // the results are here
    store_results<T, R, kResidual, kBlocks, X>(planes, params, patch, live, halves);
    if (left == 1) break;
    patch = next;
    live = next_live;
  }
}

template <class T, class R, class X>
void launch_tensor_convolution(const char* op, const TensorConvolutionParams<T, R, X>& params, cudaStream_t stream) {
  const TensorPlan& plan = params.plan;
  if (plan.row_blocks == 0) return;
  const LaunchShape shape{dim3(static_cast<unsigned>(plan.chunks), static_cast<unsigned>(plan.row_blocks)),
                          dim3(kTensorConvolutionWarps * kWarpSize), static_cast<size_t>(plan.shared_bytes), stream};
  const auto run = [&](auto blocks) {
    constexpr int kBlocks = decltype(blocks)::value;
    if constexpr (std::is_same_v<T, X>)
      if (params.residual) return launch(op, tensor_convolution_kernel<T, R, true, kBlocks, X>, shape, params);
    if constexpr (std::is_same_v<T, R>) launch(op, tensor_convolution_kernel<T, R, false, kBlocks, X>, shape, params);
  };
  if (plan.blocks == 4) return run(std::integral_constant<int, 4>{});
  if (plan.blocks == 2) return run(std::integral_constant<int, 2>{});
  run(std::integral_constant<int, 1>{});
}

}  // namespace convnext_kernels::depthwise_conv
