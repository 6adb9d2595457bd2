// What the tensor-core kernels share: patches, copying them, and turning them into planes.
//
// A patch comes into shared memory twice. Asynchronous copies bring its pixels as they lie in memory, 16 channels of 32
// bytes each, while the patch before is worked on. Then they are transposed into planes: one a channel, rows of
// neighbouring columns, with zeros for what lies outside of the image, as the tensor cores want pairs along a row.
//
// An input in fp32 (autocast) is copied as it is, in 64 bytes a pixel, and rounded on the way into the planes; what was
// rounded is also a result, which the patch that a pixel belongs to writes.
#pragma once
#include "depthwise_conv/kernels.cuh"
#include "depthwise_conv/tensor_launch_plan.h"

namespace convnext_kernels::depthwise_conv {

constexpr int kPixelUnits = kTensorChunk * 2 / kUnitBytes;  // of 16 channels: two halves

template <class T>
__device__ __forceinline__ uint32_t pack_pair(float first, float second) {
  const float values[2] = {first, second};
  const Vector<T, 2> vector = pack<T>(values);
  uint32_t bits;
  std::memcpy(&bits, &vector, sizeof(bits));
  return bits;
}

struct Patch {
  int64_t sample;   // of the first image
  int row, column;  // of the first result

  // The block's first patch, `first` of the plan's.
  __device__ __forceinline__ Patch(const TensorPlan& plan, int64_t first) {
    const int64_t of_image = static_cast<int64_t>(plan.row_patches) * plan.column_patches, group = first / of_image;
    const int rest = static_cast<int>(first - group * of_image), row_patch = divide(rest, plan.column_patches);
    sample = group * plan.images;
    row = row_patch * plan.rows;
    column = (rest - row_patch * plan.column_patches) * plan.columns;
  }
  __device__ __forceinline__ void advance(const TensorPlan& plan, const Images& shape) {
    column += plan.columns;
    if (column < shape.width) return;
    column = 0;
    row += plan.rows;
    if (row < shape.height) return;
    row = 0;
    sample += plan.images;
  }
};

// Bit i: image i of the patch exists and is not dropped.
__device__ __forceinline__ unsigned live_images(const Images& shape, const float* sample_scale, const TensorPlan& plan,
                                                int64_t sample) {
  unsigned live = 0;
#pragma unroll 1
  for (int image = 0; image < plan.images; ++image)
    live |= static_cast<unsigned>(is_live(shape, sample_scale, sample + image)) << image;
  return live;
}

// Rows and columns of an image that are copied for a patch: it and `halo` around it, as far as they exist.
struct PatchWindow {
  int top, bottom, left, right;

  __device__ __forceinline__ PatchWindow(const Patch& patch, const TensorPlan& plan, const Images& shape, int halo)
      : top(max(patch.row - halo, 0)),
        bottom(min(patch.row + plan.rows + halo, shape.height)),
        left(max(patch.column - halo, 0)),
        right(min(patch.column + plan.columns + halo, shape.width)) {}
};

// Where a unit of a copied pixel lies, from its row's first: as in memory but for one bit of its place (two in fp32,
// kParts = 2), which is exchanged so that eight threads meet eight different groups of banks both when they copy
// neighbouring units and when they read the same unit of a half of every second column.
template <int kParts>
__device__ __forceinline__ int copied_unit(int column, int unit) {
  const int at = column * kParts * kPixelUnits + unit;
  return kParts == 1 ? at ^ (at >> 2 & 2) : at ^ ((at >> 1 & 4) | (at >> 4 & 1));
}
constexpr int kSwizzledColumns = 8;  // after so many the exchanged bits are the same again

// From one copied row to the next, in units.
template <int kParts>
__device__ __forceinline__ int copied_row_units(int pairs) {
  return 2 * pairs * kParts * kPixelUnits;
}

// Starts copying a patch's window. A group of kLanes threads has a row at a time.
template <int kLanes, class T>
__device__ __forceinline__ void copy_window(uint4* to, const T* from, const Images& shape, const PatchWindow& window,
                                            int64_t sample, unsigned live, int images, int most_rows, int pairs) {
  constexpr int kParts = sizeof(T) / 2, kUnits = kParts * kPixelUnits;  // of a pixel
  constexpr int kColumns = kLanes / kUnits;                             // at a time
  static_assert(kColumns % kSwizzledColumns == 0);
  const int thread = reread_thread_index(), unit = thread % kUnits, first_column = thread % kLanes / kUnits;
  const int channel = static_cast<int>(blockIdx.x) * kTensorChunk + unit * (kTensorChunk / kUnits);
  if (channel >= shape.channels) return;
  const int rows = window.bottom - window.top, columns = window.right - window.left;
  from += ((sample * shape.height + window.top) * shape.width + window.left + first_column) * shape.channels + channel;
  to += copied_unit<kParts>(first_column, unit);
  for (int i = thread / kLanes; i < images * rows; i += static_cast<int>(blockDim.x) / kLanes) {
    const int image = images == 1 ? 0 : divide(i, rows), row = i - image * rows;
    if (!(live >> image & 1)) continue;
    const T* at = from + static_cast<int64_t>(image * shape.height + row) * shape.width * shape.channels;
    uint4* into = to + (image * most_rows + row) * copied_row_units<kParts>(pairs);
#pragma unroll 1  // the weights' gradient has no registers to spare
    for (int column = first_column; column < columns; column += kColumns) {
      copy_async(into, at, true);
      at += kColumns * shape.channels;
      into += kColumns * kUnits;
    }
  }
}

// Where a channel's plane begins, in units. The second eight begin 64 bytes further, so that threads that write or read
// the same row of both meet different banks.
__device__ __forceinline__ int plane_of(int channel, int plane_units) {
  return channel * plane_units + channel / 8 * 4;
}

// How transpose_window reads a pixel's eight channels: as they are,
struct CopiedPixels {
  static constexpr int kParts = 1;
  static constexpr bool kRounds = false;

  __device__ __forceinline__ uint4 read(const uint4* at, int /*column*/) const { return *at; }
};

// or from fp32, rounded to T. Then pixels that belong to the patch itself are stored too.
template <class T>
struct RoundedPixels {
  static constexpr int kParts = 2;
  static constexpr bool kRounds = true;
  T* result;  // (samples, height, width, channels)
  const Images& shape;
  const TensorPlan& plan;
  const Patch& patch;
  unsigned existing;  // bit i: image i of the patch exists; dropped ones are copied and rounded as well

  // `at`: the first four channels of the half; the others lie before or behind them (copied_unit).
  __device__ __forceinline__ uint4 read(const uint4* at, int column) const {
    const uint4 low = at[0], high = at[column & 4 ? -1 : 1];
    return {pack_pair<T>(__uint_as_float(low.x), __uint_as_float(low.y)),
            pack_pair<T>(__uint_as_float(low.z), __uint_as_float(low.w)),
            pack_pair<T>(__uint_as_float(high.x), __uint_as_float(high.y)),
            pack_pair<T>(__uint_as_float(high.z), __uint_as_float(high.w))};
  }
  // `row` and `column` from the window's first, which is kPadding before the patch's. Those outside of the image are
  // the caller's to leave out.
  __device__ __forceinline__ void store(int image, int row, int column, int half, const uint4& bits) const {
    row -= kPadding;
    column -= kPadding;
    if (row < 0 || row >= plan.rows || column < 0 || column >= plan.columns) return;
    const int64_t pixel =
        ((patch.sample + image) * shape.height + patch.row + row) * shape.width + patch.column + column;
    Vector<T, 8> vector;
    std::memcpy(&vector, &bits, sizeof(bits));
    convnext_kernels::store(
        result + pixel * shape.channels + static_cast<int64_t>(blockIdx.x) * kTensorChunk + half * 8, vector);
  }
};

// From the copied pixels to planes of kBlocks * 8 columns and `rows` rows an image, of which the first is
// `first_column` and `first_row`. A thread turns two pixels' eight channels into pairs of columns: two reads of 16
// bytes, eight byte permutations, eight writes of 4 bytes. It keeps its columns and goes from row to row.
template <int kBlocks, int kSegmentRows, class Pixels = CopiedPixels>
__device__ __forceinline__ void transpose_window(uint4* planes, int plane_units, int image_units, const uint4* copied,
                                                 const PatchWindow& window, int first_row, int rows, int first_column,
                                                 unsigned live, int images, int most_rows, int pairs, int halves,
                                                 const Pixels& pixels = {}) {
  constexpr int kParts = Pixels::kParts;
  constexpr int kRowItems = kBlocks * kBlockColumns / 2 * kPixelUnits;
  const int thread = reread_thread_index(), row_step = static_cast<int>(blockDim.x) / kRowItems;
  const int half = thread % kPixelUnits, pair = thread % kRowItems / kPixelUnits;
  if (thread >= row_step * kRowItems || half >= halves) return;
  const int column = first_column + 2 * pair - window.left, columns = window.right - window.left;
  const bool has_first = column >= 0 && column < columns, has_second = column >= -1 && column + 1 < columns;
  const uint4* const first_column_of = copied + copied_unit<kParts>(column, half * kParts);
  const uint4* const second_column_of = copied + copied_unit<kParts>(column + 1, half * kParts);
  const int above = window.top - first_row, copied_rows = window.bottom - window.top, channel = plane_units * 4;
  planes += plane_of(half * 8, plane_units);
  for (int image = 0; image < images; ++image, planes += image_units) {
#pragma unroll 1  // as above
    for (int row = thread / kRowItems; row < rows; row += row_step) {
      unsigned copied_images = live;
      if constexpr (Pixels::kRounds) copied_images = pixels.existing;
      const bool exists = (copied_images >> image & 1) && row >= above && row < above + copied_rows;
      const int unit = (image * most_rows + row - above) * copied_row_units<kParts>(pairs);
      uint4 first{0, 0, 0, 0}, second{0, 0, 0, 0};
      if (exists && has_first) first = pixels.read(first_column_of + unit, column);
      if (exists && has_second) second = pixels.read(second_column_of + unit, column + 1);
      if constexpr (Pixels::kRounds) {
        if (exists && has_first) pixels.store(image, row, 2 * pair, half, first);
        if (exists && has_second) pixels.store(image, row, 2 * pair + 1, half, second);
        if (!(live >> image & 1)) first = second = {0, 0, 0, 0};
      }
      uint32_t* const to = reinterpret_cast<uint32_t*>(planes + row_units(row, kBlocks, kSegmentRows)) + pair;
      to[0 * channel] = lower_halves(first.x, second.x);
      to[1 * channel] = upper_halves(first.x, second.x);
      to[2 * channel] = lower_halves(first.y, second.y);
      to[3 * channel] = upper_halves(first.y, second.y);
      to[4 * channel] = lower_halves(first.z, second.z);
      to[5 * channel] = upper_halves(first.z, second.z);
      to[6 * channel] = lower_halves(first.w, second.w);
      to[7 * channel] = upper_halves(first.w, second.w);
    }
  }
}

// Where segment number `segment` of all of a patch begins in a plane, in units; of those that do not exist, the last.
template <int kPitch, int kSegmentRows>
__device__ __forceinline__ int segment_units(const TensorPlan& plan, int segment, int image_units) {
  const int existing = min(segment, plan.images * plan.segments - 1), image = divide(existing, plan.segments);
  return image * image_units + (existing - image * plan.segments) * (kSegmentRows * kPitch + 1);
}

}  // namespace convnext_kernels::depthwise_conv
