// The engine's own tests: small kernels that are right, and the same ones with one defect each, which must be found.
#include "harness.h"

namespace {

using namespace convnext_kernels;
using harness::Options;
using harness::Outcome;

enum Defect {
  kNone,
  kNoWait,                 // reads an asynchronous copy that nobody waited for
  kNoBarrierAfterWait,     // reads other threads' copies without a barrier
  kNoBarrierBeforeRefill,  // refills a buffer that others may still read
  kDivergentBarrier,       // some threads come to another barrier
  kEarlyExit,              // some threads come to none
  kSharedOutOfBounds,
  kGlobalOutOfBounds,
  kUnwritten,      // reads shared memory that nobody wrote
  kMisaligned,     // an asynchronous copy from an odd address
  kTooMuchShared,  // takes more shared memory than the launch gave
  kNoSyncwarp,     // lanes read each other's shared memory without __syncwarp
  kNotInMask,      // a lane calls with a mask it is not in
  kOutsideMask,    // a shuffle reads a lane outside the mask
  kPlainAdd,       // blocks add to the same number without an atomic
  kFloatAtomic,    // blocks add floats in the order they come
};

constexpr const char* kDefectNames[] = {"none",
                                        "no_wait",
                                        "no_barrier_after_wait",
                                        "no_barrier_before_refill",
                                        "divergent_barrier",
                                        "early_exit",
                                        "shared_out_of_bounds",
                                        "global_out_of_bounds",
                                        "unwritten",
                                        "misaligned",
                                        "too_much_shared",
                                        "no_syncwarp",
                                        "not_in_mask",
                                        "outside_mask",
                                        "plain_add",
                                        "float_atomic"};

// --- a tile copied asynchronously into two buffers in turn, and written back with its rows in reverse order

constexpr int kTile = 64;  // floats a row of a tile
constexpr int kPipelineThreads = 64;
constexpr int kTileRows = 4 * kPipelineThreads / kTile;

template <Defect kDefect>
__global__ void pipeline_kernel(const float* x, float* y, int tiles) {
  constexpr int kElements = kTile * kTileRows;
  SharedMemory shared;
  float* const buffer = shared.take<float>(2 * kElements + (kDefect == kTooMuchShared ? 64 : 0));
  const int tid = static_cast<int>(threadIdx.x);
  const auto fetch = [&](int tile) {
    const int past = kDefect == kGlobalOutOfBounds && tile == tiles - 1 ? 4 : 0;
    const int odd = kDefect == kMisaligned ? 1 : 0;
    copy_async(buffer + tile % 2 * kElements + tid * 4, x + tile * kElements + tid * 4 + past + odd, tile < tiles);
    copy_async_commit();
  };
  fetch(0);
  for (int tile = 0; tile < tiles; ++tile) {
    fetch(tile + 1);
    if (kDefect != kNoWait) copy_async_wait<1>();
    if (kDefect == kDivergentBarrier) {
      if (tid < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
    } else if (kDefect != kNoBarrierAfterWait) {
      __syncthreads();
    }
    const float* const here = buffer + tile % 2 * kElements;
    for (int row = 0; row < kTileRows; ++row) {
      const int past = kDefect == kSharedOutOfBounds && tile % 2 == 1 && row == 0 && tid == kTile - 1 ? 1 : 0;
      y[tile * kElements + row * kTile + tid] = here[(kTileRows - 1 - row) * kTile + tid + past];
    }
    if (kDefect == kEarlyExit && tid == 0) return;
    if (kDefect != kNoBarrierBeforeRefill) __syncthreads();
  }
}

template <Defect kDefect>
int pipeline_case() {
  constexpr int kTiles = 5, kElements = kTile * kTileRows;
  emu::Buffer<float> x(kTiles * kElements, "x");
  harness::fill_normal(x, 1, 1.0);
  return harness::run_schedules([&] {
    emu::Buffer<float> y(x.size(), "y");
    const LaunchShape shape{dim3(1), dim3(kPipelineThreads), convnext_kernels::shared_piece(2 * kElements * 4),
                            nullptr};
    launch("pipeline", pipeline_kernel<kDefect>, shape, x.data(), y.data(), kTiles);
    Outcome outcome;
    for (size_t i = 0; i < y.size(); ++i) {
      const size_t tile = i / kElements, row = i % kElements / kTile, column = i % kTile;
      outcome.check("y", i, y[i], x[tile * kElements + (kTileRows - 1 - row) * kTile + column], 0);
    }
    outcome.keep(y);
    return outcome;
  });
}

// --- each warp reverses its 32 numbers through shared memory, and adds their sum by shuffles

template <Defect kDefect>
__global__ void warp_kernel(const float* x, float* y) {
  SharedMemory shared;
  float* const numbers = shared.take<float>(64);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32;
  if (kDefect != kUnwritten || tid != 5) numbers[tid] = x[tid];
  if (kDefect != kNoSyncwarp) __syncwarp();
  const float reversed = numbers[tid - lane + 31 - lane];
  float sum;
  if (kDefect == kNotInMask) {
    sum = __shfl_xor_sync(0x0000ffffu, reversed, 1);
  } else if (kDefect == kOutsideMask) {
    sum = lane < 16 ? __shfl_xor_sync(0x0000ffffu, reversed, 16) : 0.0f;
  } else {
    sum = warp_sum(reversed);
  }
  y[tid] = reversed + sum;
}

template <Defect kDefect>
int warp_case() {
  emu::Buffer<float> x(64, "x");
  harness::fill_normal(x, 1, 1.0);
  return harness::run_schedules([&] {
    emu::Buffer<float> y(64, "y");
    const LaunchShape shape{dim3(1), dim3(64), convnext_kernels::shared_piece(64 * 4), nullptr};
    launch("warp", warp_kernel<kDefect>, shape, x.data(), y.data());
    Outcome outcome;
    for (size_t i = 0; i < 64; ++i) {
      double sum = 0;
      for (size_t lane = 0; lane < 32; ++lane) sum += x[i / 32 * 32 + lane];
      outcome.check("y", i, y[i], x[i / 32 * 32 + 31 - i % 32] + sum, 1e-5);
    }
    outcome.keep(y);
    return outcome;
  });
}

// --- all blocks count together; with a defect in a way that depends on their order

template <Defect kDefect>
__global__ void count_kernel(const float* x, float* sum, int* count) {
  if (threadIdx.x != 0) return;
  if (kDefect == kPlainAdd) {
    *count += 1;
  } else {
    atomicAdd(count, 1);
  }
  if (kDefect == kFloatAtomic) atomicAdd(sum, x[blockIdx.x]);
}

template <Defect kDefect>
int count_case() {
  emu::Buffer<float> x(64, "x");
  harness::fill_normal(x, 1, 1.0);
  return harness::run_schedules([&] {
    emu::Buffer<float> sum(1, "sum");
    emu::Buffer<int> count(1, "count");
    sum[0] = 0;
    count[0] = 0;
    launch("count", count_kernel<kDefect>, {dim3(64), dim3(32), 0, nullptr}, x.data(), sum.data(), count.data());
    Outcome outcome;
    outcome.check("count", 0, count[0], 64, 0);
    outcome.keep(sum);
    return outcome;
  });
}

// --- y (16 x 8) = a (16 x 32) b (8 x 32)^T on the tensor cores, through ldmatrix

template <class T>
__global__ void matrix_kernel(const T* a, const T* b, float* y) {
  SharedMemory shared;
  T* const left = shared.take<T>(16 * 32);
  T* const right = shared.take<T>(8 * 32);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 16 * 32; i += 32) left[i] = a[i];
  for (int i = lane; i < 8 * 32; i += 32) right[i] = b[i];
  __syncwarp();
  float accumulator[4] = {};
  uint32_t b_fragments[4];  // both halves of the inner dimension
  load_matrices(b_fragments, right + lane % 8 * 32 + lane / 8 * 8);
  for (int half = 0; half < 2; ++half) {
    uint32_t a_fragments[4];
    load_matrices(a_fragments, left + lane % 16 * 32 + half * 16 + lane / 16 * 8);
    const uint32_t b_half[2] = {b_fragments[half * 2], b_fragments[half * 2 + 1]};
    multiply_add<T>(accumulator, a_fragments, b_half);
  }
  for (int i = 0; i < 4; ++i) y[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = accumulator[i];
}

template <class T>
int matrix_case() {
  emu::Buffer<T> a(16 * 32, "a"), b(8 * 32, "b");
  harness::fill_normal(a, 1, 1.0);
  harness::fill_normal(b, 2, 1.0);
  return harness::run_schedules([&] {
    emu::Buffer<float> y(16 * 8, "y");
    const LaunchShape shape{dim3(1), dim3(32), convnext_kernels::shared_piece(16 * 32 * 2) * 2, nullptr};
    launch("matrix", matrix_kernel<T>, shape, a.data(), b.data(), y.data());
    Outcome outcome;
    for (size_t i = 0; i < y.size(); ++i) {
      double sum = 0;
      for (size_t k = 0; k < 32; ++k)
        sum += harness::to_double(a[i / 8 * 32 + k]) * harness::to_double(b[i % 8 * 32 + k]);
      outcome.check("y", i, y[i], sum, 1e-5);
    }
    outcome.keep(y);
    return outcome;
  });
}

// --- what a lane gets of matrices: each element is its own position in shared memory

constexpr int kFragments = 4 + 4 + 2 + 2 + 4 + 2;

__global__ void fragments_kernel(uint32_t* fragments) {
  SharedMemory shared;
  uint16_t* const matrices = shared.take<uint16_t>(32 * 8);
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = lane; i < 32 * 8; i += 32) matrices[i] = static_cast<uint16_t>(i);
  __syncwarp();
  uint32_t four[4], transposed_four[4], two[2], transposed_two[2];
  load_matrices(four, matrices + lane * 8);
  load_matrices<true>(transposed_four, matrices + lane * 8);
  const uint16_t* const of_two = lane < 16 ? matrices + lane * 8 : nullptr;
  load_matrices(two, of_two);
  load_matrices<true>(transposed_two, of_two);
  uint32_t* to = fragments + lane * kFragments;
  for (int i = 0; i < 4; ++i) *to++ = four[i];
  for (int i = 0; i < 4; ++i) *to++ = transposed_four[i];
  for (int i = 0; i < 2; ++i) *to++ = two[i];
  for (int i = 0; i < 2; ++i) *to++ = transposed_two[i];
  for (int i = 0; i < 4; ++i) *to++ = transpose_matrix(four[i]);
  *to++ = lower_halves(four[0], four[1]);
  *to++ = upper_halves(four[0], four[1]);
}

int fragments_case(const Options&) {
  return harness::run_schedules([&] {
    emu::Buffer<uint32_t> fragments(32 * kFragments, "fragments");
    launch("fragments", fragments_kernel, {dim3(1), dim3(32), convnext_kernels::shared_piece(32 * 8 * 2), nullptr},
           fragments.data());
    Outcome outcome;
    const auto pair = [](int first, int second) { return first | static_cast<uint32_t>(second) << 16; };
    for (int lane = 0; lane < 32; ++lane) {
      const auto straight = [&](int i) { return i * 64 + lane / 4 * 8 + lane % 4 * 2; };
      const auto transposed = [&](int i) { return i * 64 + lane % 4 * 16 + lane / 4; };
      std::vector<uint32_t> expected;
      for (int count : {4, 2}) {
        for (int i = 0; i < count; ++i) expected.push_back(pair(straight(i), straight(i) + 1));
        for (int i = 0; i < count; ++i) expected.push_back(pair(transposed(i), transposed(i) + 8));
      }
      for (int i = 0; i < 4; ++i) expected.push_back(pair(transposed(i), transposed(i) + 8));
      expected.push_back(pair(straight(0), straight(1)));
      expected.push_back(pair(straight(0) + 1, straight(1) + 1));
      for (size_t i = 0; i < expected.size(); ++i)
        outcome.check("fragments", lane * kFragments + i, fragments[lane * kFragments + i], expected[i], 0);
    }
    outcome.keep(fragments);
    return outcome;
  });
}

// --- one case a kernel; its option `defect` chooses among those that kernel knows

template <Defect kFirst, Defect... kRest, class Function>
int with_defect(const Options& options, Function&& function) {
  if (options.text("defect") == kDefectNames[kFirst]) return function(std::integral_constant<Defect, kFirst>{});
  if constexpr (sizeof...(kRest) > 0) {
    return with_defect<kRest...>(options, function);
  } else {
    throw std::runtime_error("this kernel has no defect " + options.text("defect"));
  }
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main_of(
      argc, argv,
      {{"pipeline",
        [](const Options& options) {
          return with_defect<kNone, kNoWait, kNoBarrierAfterWait, kNoBarrierBeforeRefill, kDivergentBarrier, kEarlyExit,
                             kSharedOutOfBounds, kGlobalOutOfBounds, kMisaligned, kTooMuchShared>(
              options, [](auto defect) { return pipeline_case<decltype(defect)::value>(); });
        }},
       {"warp",
        [](const Options& options) {
          return with_defect<kNone, kNoSyncwarp, kUnwritten, kNotInMask, kOutsideMask>(
              options, [](auto defect) { return warp_case<decltype(defect)::value>(); });
        }},
       {"count",
        [](const Options& options) {
          return with_defect<kNone, kPlainAdd, kFloatAtomic>(
              options, [](auto defect) { return count_case<decltype(defect)::value>(); });
        }},
       {"fragments", fragments_case},
       {"matrix", [](const Options& options) {
          return options.text("type") == "half" ? matrix_case<__half>() : matrix_case<__nv_bfloat16>();
        }}});
}
