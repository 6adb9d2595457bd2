// Depthwise convolution on the CPU, a vector of channels at a time. Compiled once per capability.
//
// The rows of the source that a row of results needs are kept in a ring in scratch memory, converted to the
// accumulation type and zero-padded, so that the inner loops know neither element types nor borders of the image. They
// hold a row's weights and a few result pixels in registers and stream over the source: each value loaded is used for
// every weight. Weights that fall outside the image are skipped by whole rows, and by columns where register blocks
// fill a row of the image exactly; elsewhere they multiply the zero padding.
//
// Every sum has one order, which depends on the shape alone.
#include "depthwise_conv/cpu_kernels.h"

#include "common/cpu_vector.h"
#include "depthwise_conv/cpu_ring.h"

namespace convnext_kernels::CPU_CAPABILITY {
namespace {

using namespace depthwise_conv;

// --- one row of results
// rows: where in scratch the first source of the first result lies, for each of row_count rows of weights.
template <class A>
using CorrelateRow = void (*)(const A* const* rows, int64_t row_count, const A* weights, const A* bias, int64_t blocks,
                              A* to, int64_t to_step);

// sums += taps * source, a row of the kernel over kPixels pixels. kLeft, kRight: the pixels are at that border of the
// image, whose padding is left out.
template <class A, int kTaps, int kStep, int kPixels, bool kLeft, bool kRight>
CK_INLINE void add_row(const A* from, const A* weights, Vector<A> (&sums)[kPixels]) {
  constexpr int kSources = (kPixels - 1) * kStep + kTaps;
  constexpr int kBegin = kLeft ? kTaps / 2 : 0, kEnd = kSources - (kRight ? kTaps / 2 : 0);
  Vector<A> taps[kTaps];
#pragma GCC unroll 16
  for (int t = 0; t < kTaps; ++t) taps[t] = load(weights + t * kLanes<A>);
#pragma GCC unroll 64
  for (int i = kBegin; i < kEnd; ++i) {
    const Vector<A> source = load(from + i * kLanes<A>);
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t)
      if (i >= t && (i - t) % kStep == 0 && (i - t) / kStep < kPixels) sums[(i - t) / kStep] += taps[t] * source;
  }
}

template <class A, int kTaps, int kStep, int kPixels, bool kLeft, bool kRight>
CK_INLINE void correlate_block(const A* const* rows, int64_t row_count, const A* weights, const A* bias, int64_t block,
                               A* to, int64_t to_step) {
  constexpr int kN = kLanes<A>;
  const int64_t first = block * (kPixels * kStep * kN);
  Vector<A> sums[kPixels];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) sums[p] = load(bias);
  int64_t row = 0;
#if defined(__AVX512F__)
  // Few pixels are too few sums in flight to hide the latency of an addition: every other row has sums of its own.
  if constexpr (kPixels <= 8 && 2 * (kPixels + kTaps) <= 30) {
    Vector<A> more_sums[kPixels] = {};
    for (; row + 2 <= row_count; row += 2, weights += 2 * kTaps * kN) {
      add_row<A, kTaps, kStep, kPixels, kLeft, kRight>(rows[row] + first, weights, sums);
      add_row<A, kTaps, kStep, kPixels, kLeft, kRight>(rows[row + 1] + first, weights + kTaps * kN, more_sums);
    }
#pragma GCC unroll 16
    for (int p = 0; p < kPixels; ++p) sums[p] += more_sums[p];
  }
#endif
  for (; row < row_count; ++row, weights += kTaps * kN)
    add_row<A, kTaps, kStep, kPixels, kLeft, kRight>(rows[row] + first, weights, sums);
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) store(to + (block * kPixels + p) * to_step, sums[p]);
}

// kExact: the blocks are exactly a row of an image of that width.
template <class A, int kTaps, int kStep, int kPixels, bool kExact>
void correlate_row(const A* const* rows, int64_t row_count, const A* weights, const A* bias, int64_t blocks, A* to,
                   int64_t to_step) {
  const auto run = [&]<bool kLeft, bool kRight>(int64_t block) __attribute__((always_inline)) {
    correlate_block<A, kTaps, kStep, kPixels, kLeft, kRight>(rows, row_count, weights, bias, block, to, to_step);
  };
  if constexpr (!kExact) {
    for (int64_t block = 0; block < blocks; ++block) run.template operator()<false, false>(block);
  } else if (blocks == 1) {
    run.template operator()<true, true>(0);
  } else {
    run.template operator()<true, false>(0);
    for (int64_t block = 1; block < blocks - 1; ++block) run.template operator()<false, false>(block);
    run.template operator()<false, true>(blocks - 1);
  }
}

// The numbers of pixels there is code for: as many as leave registers for the weights, and fewer for narrow images.
template <int... kPixels>
struct PixelChoices {
  // Few blocks of few surplus pixels; the constant is a block's overhead, counted in pixels.
  static int64_t best(int64_t columns) {
    int64_t best = 0, best_cost = 0;
    const auto consider = [&](int64_t pixels) {
      const int64_t cost = (columns + pixels - 1) / pixels * (pixels + 2);
      if (best == 0 || cost < best_cost) best = pixels, best_cost = cost;
    };
    (consider(kPixels), ...);
    return best;
  }

  // Null if there is no code for this number.
  template <class A, int kTaps, int kStep, bool kExact>
  static CorrelateRow<A> find(int64_t pixels) {
    CorrelateRow<A> found = nullptr;
    ((pixels == kPixels ? void(found = correlate_row<A, kTaps, kStep, kPixels, kExact>) : void()), ...);
    return found;
  }
};
#if defined(__AVX512F__)
using Pixels = PixelChoices<14, 12, 10, 8, 7, 4, 2>;
using ExactPixels = PixelChoices<14, 8, 7>;
#else
using Pixels = PixelChoices<8, 7, 6, 4, 2>;
using ExactPixels = PixelChoices<8, 7>;
#endif

template <class A>
CorrelateRow<A> find_exact_row(int64_t taps, int64_t pixels) {
  switch (taps) {
    case 3:
      return ExactPixels::find<A, 3, 1, true>(pixels);
    case 5:
      return ExactPixels::find<A, 5, 1, true>(pixels);
    case 7:
      return ExactPixels::find<A, 7, 1, true>(pixels);
    case 9:
      return ExactPixels::find<A, 9, 1, true>(pixels);
    default:
      return ExactPixels::find<A, 11, 1, true>(pixels);
  }
}

template <class A>
CorrelateRow<A> find_row(int64_t taps, int64_t step, int64_t pixels) {
  if (step == 2) {
    switch (taps) {
      case 3:
        return Pixels::find<A, 3, 2, false>(pixels);
      case 5:
        return Pixels::find<A, 5, 2, false>(pixels);
      case 7:
        return Pixels::find<A, 7, 2, false>(pixels);
      case 9:
        return Pixels::find<A, 9, 2, false>(pixels);
      default:
        return Pixels::find<A, 11, 2, false>(pixels);
    }
  }
  switch (taps) {
    case 1:
      return Pixels::find<A, 1, 1, false>(pixels);
    case 2:
      return Pixels::find<A, 2, 1, false>(pixels);
    case 3:
      return Pixels::find<A, 3, 1, false>(pixels);
    case 4:
      return Pixels::find<A, 4, 1, false>(pixels);
    case 5:
      return Pixels::find<A, 5, 1, false>(pixels);
    case 6:
      return Pixels::find<A, 6, 1, false>(pixels);
    case 7:
      return Pixels::find<A, 7, 1, false>(pixels);
    case 9:
      return Pixels::find<A, 9, 1, false>(pixels);
    default:
      return Pixels::find<A, 11, 1, false>(pixels);
  }
}

template <class A>
bool is_dropped(const void* sample_scale, int64_t sample) {
  return sample_scale && static_cast<const A*>(sample_scale)[sample] == 0;
}

int64_t bytes_of(Element type) {
  return type == Element::kFloat64 ? 8 : type == Element::kFloat32 ? 4 : 2;
}

// A dropped sample's part: zero, or the residual alone.
void write_dropped(const Correlation& c, int64_t offset, int64_t channels, int64_t rows, int64_t columns) {
  const int64_t bytes = bytes_of(c.result_type);
  char* to = static_cast<char*>(c.result) + offset * bytes;
  const char* from = c.residual ? static_cast<const char*>(c.residual) + offset * bytes : nullptr;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t column = 0; column < columns; ++column) {
      const int64_t at = (row * c.result_width + column) * c.channels * bytes;
      if (from) {
        std::memcpy(to + at, from + at, static_cast<size_t>(channels * bytes));
      } else {
        std::memset(to + at, 0, static_cast<size_t>(channels * bytes));
      }
    }
  }
}

template <class A>
void correlate_as(const Correlation& c, const Tile& tile, void* scratch) {
  constexpr int64_t kN = kLanes<A>;
  const int64_t step = c.source_step, phases = c.result_step, kernel = c.kernel_size;
  // A tile's first column is a multiple of result_step.
  const int64_t first_source = tile.first_column / phases * step;
  int64_t origin = c.phases[0].first;
  for (int64_t phase = 1; phase < phases; ++phase) origin = smaller(origin, c.phases[phase].first);
  const Ring<A> ring(scratch, kernel, c.scratch_columns, first_source + origin, c.source_width);
  A* results = ring.end();

  struct {
    CorrelateRow<A> run;
    int64_t blocks;
  } row_of[2] = {};
  for (int64_t phase = 0; phase < phases; ++phase) {
    const int64_t columns = (tile.columns - phase + phases - 1) / phases;
    if (columns == 0) continue;
    const int64_t pixels = Pixels::best(columns), blocks = (columns + pixels - 1) / pixels;
    CorrelateRow<A> run = nullptr;
    if (step == 1 && phases == 1 && columns == c.source_width && blocks * pixels == columns)
      run = find_exact_row<A>(c.phases[phase].taps, pixels);
    row_of[phase] = {run ? run : find_row<A>(c.phases[phase].taps, step, pixels), blocks};
  }

  for (int64_t sample = tile.first_sample; sample < tile.first_sample + tile.samples; ++sample) {
    const int64_t result_sample = sample * c.result_height * c.result_width * c.channels;
    const int64_t source_sample = sample * c.source_height * c.source_width * c.channels;
    if (is_dropped<A>(c.sample_scale, sample)) {
      const int64_t channel = tile.first_block * kN;
      write_dropped(c, result_sample + (tile.first_row * c.result_width + tile.first_column) * c.channels + channel,
                    smaller(tile.blocks * kN, c.channels - channel), tile.rows, tile.columns);
      continue;
    }
    for (int64_t block = tile.first_block; block < tile.first_block + tile.blocks; ++block) {
      const int64_t channel = block * kN, lanes = smaller(kN, c.channels - channel);
      const A* weights = static_cast<const A*>(c.weights) + block * (kernel * kernel + 1) * kN;
      const A* bias = weights + kernel * kernel * kN;
      int64_t filled = -1;  // rows of the source before this one are in the ring
      for (int64_t y = tile.first_row; y < tile.first_row + tile.rows; ++y) {
        const int64_t row_phase = y % phases, row_taps = c.phases[row_phase].taps;
        const int64_t first_row = y / phases * step + c.phases[row_phase].first;
        const int64_t skipped = larger(0, -first_row);
        const int64_t row_end = smaller(first_row + row_taps, c.source_height);
        if (filled < 0) filled = first_row + skipped;
        for (; filled < row_end; ++filled)
          ring.fill(filled, c.source_type, c.source, source_sample + filled * c.source_width * c.channels + channel,
                    c.source_width, c.channels, lanes);

        // The weights of a row's phase follow those of the phases before it.
        const A* phase_weights = weights + (row_phase ? c.phases[0].taps * kernel * kN : 0);
        for (int64_t phase = 0; phase < phases; ++phase) {
          const int64_t taps = c.phases[phase].taps;
          if (row_of[phase].run) {
            const A* rows[kMaxKernelSize];
            int64_t row_count = 0;
            A* row = ring.row(first_row + skipped);
            for (int64_t i = first_row + skipped; i < row_end; ++i, row = ring.after(row))
              rows[row_count++] = row + (c.phases[phase].first - origin) * kN;
            row_of[phase].run(rows, row_count, phase_weights + skipped * taps * kN, bias, row_of[phase].blocks,
                              results + phase * kN, phases * kN);
          }
          phase_weights += row_taps * taps * kN;
        }
        store_row(c.result_type, results, c.residual, c.result,
                  result_sample + (y * c.result_width + tile.first_column) * c.channels + channel, c.channels, lanes,
                  tile.columns);
      }
    }
  }
}

void correlate(const Correlation& correlation, const Tile& tile, void* scratch) {
  if (correlation.source_type == Element::kFloat64) {
    correlate_as<double>(correlation, tile, scratch);
  } else {
    correlate_as<float>(correlation, tile, scratch);
  }
}

// --- the gradient of the weights
// How many rows of weights are summed at once: two have enough sums in flight to hide the latency of an addition.
#if defined(__AVX512F__)
constexpr int kWeightRows = 2;
#else
constexpr int kWeightRows = 1;
#endif

// sums += grad * source for kRows rows of weights and kPixels pixels of one row of the image. kLeft, kRight: as above.
template <class A, int kTaps, int kStep, int kPixels, int kRows, bool kLeft, bool kRight>
CK_INLINE void add_pixels(const A* grad, const A* const* rows, int64_t first, Vector<A> (&sums)[kRows][kTaps]) {
  constexpr int kN = kLanes<A>;
  constexpr int kSources = (kPixels - 1) * kStep + kTaps;
  constexpr int kBegin = kLeft ? kTaps / 2 : 0, kEnd = kSources - (kRight ? kTaps / 2 : 0);
  Vector<A> grads[kPixels];
#pragma GCC unroll 16
  for (int p = 0; p < kPixels; ++p) grads[p] = load(grad + (first + p) * kN);
#pragma GCC unroll 64
  for (int i = kBegin; i < kEnd; ++i) {
#pragma GCC unroll 2
    for (int row = 0; row < kRows; ++row) {
      const Vector<A> source = load(rows[row] + (first * kStep + i) * kN);
#pragma GCC unroll 16
      for (int t = 0; t < kTaps; ++t)
        if (i >= t && (i - t) % kStep == 0 && (i - t) / kStep < kPixels)
          sums[row][t] += grads[(i - t) / kStep] * source;
    }
  }
}

template <class A, int kTaps, int kStep, int kRows, bool kExact>
CK_INLINE void add_weight_rows(const A* grad, const A* const* rows, int64_t pixels, A* sums) {
  constexpr int kN = kLanes<A>;
  Vector<A> totals[kRows][kTaps];
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) totals[row][t] = load(sums + (row * kTaps + t) * kN);
  if constexpr (kExact) {
    if (pixels == 7) {
      add_pixels<A, kTaps, kStep, 7, kRows, true, true>(grad, rows, 0, totals);
    } else {
      add_pixels<A, kTaps, kStep, 7, kRows, true, false>(grad, rows, 0, totals);
      for (int64_t p = 7; p < pixels - 7; p += 7)
        add_pixels<A, kTaps, kStep, 7, kRows, false, false>(grad, rows, p, totals);
      add_pixels<A, kTaps, kStep, 7, kRows, false, true>(grad, rows, pixels - 7, totals);
    }
  } else {
    // No surplus pixels: they would multiply real sources by zero, and 0 * Inf is not 0.
    int64_t p = 0;
    for (; p + 7 <= pixels; p += 7) add_pixels<A, kTaps, kStep, 7, kRows, false, false>(grad, rows, p, totals);
    for (; p + 3 <= pixels; p += 3) add_pixels<A, kTaps, kStep, 3, kRows, false, false>(grad, rows, p, totals);
    for (; p < pixels; ++p) add_pixels<A, kTaps, kStep, 1, kRows, false, false>(grad, rows, p, totals);
  }
#pragma GCC unroll 2
  for (int row = 0; row < kRows; ++row)
#pragma GCC unroll 16
    for (int t = 0; t < kTaps; ++t) store(sums + (row * kTaps + t) * kN, totals[row][t]);
}

// rows: where in scratch the first source of the first pixel lies, for each of row_count rows of weights.
template <class A>
using WeightGradientRow = void (*)(const A* grad, const A* const* rows, int64_t row_count, int64_t pixels, A* sums);

// kExact: the pixels are a whole row of an image whose width is a multiple of 7.
template <class A, int kTaps, int kStep, bool kExact>
void weight_gradient_row(const A* grad, const A* const* rows, int64_t row_count, int64_t pixels, A* sums) {
  constexpr int64_t kRowSums = kTaps * kLanes<A>;
  int64_t row = 0;
  for (; row + kWeightRows <= row_count; row += kWeightRows)
    add_weight_rows<A, kTaps, kStep, kWeightRows, kExact>(grad, rows + row, pixels, sums + row * kRowSums);
  if constexpr (kWeightRows > 1)
    for (; row < row_count; ++row)
      add_weight_rows<A, kTaps, kStep, 1, kExact>(grad, rows + row, pixels, sums + row * kRowSums);
}

template <class A, int kTaps>
WeightGradientRow<A> find_weight_gradient_row(int64_t stride, bool exact) {
  if (stride == 2) return weight_gradient_row<A, kTaps, 2, false>;
  return exact ? weight_gradient_row<A, kTaps, 1, true> : weight_gradient_row<A, kTaps, 1, false>;
}

template <class A>
WeightGradientRow<A> find_weight_gradient_row(int64_t kernel, int64_t stride, bool exact) {
  switch (kernel) {
    case 3:
      return find_weight_gradient_row<A, 3>(stride, exact);
    case 5:
      return find_weight_gradient_row<A, 5>(stride, exact);
    case 7:
      return find_weight_gradient_row<A, 7>(stride, exact);
    case 9:
      return find_weight_gradient_row<A, 9>(stride, exact);
    default:
      return find_weight_gradient_row<A, 11>(stride, exact);
  }
}

template <class A>
Vector<A> sum_of_row(const A* from, int64_t pixels) {
  Vector<A> sums[4] = {};
  int64_t p = 0;
  for (; p + 4 <= pixels; p += 4)
    for (int i = 0; i < 4; ++i) sums[i] += load(from + (p + i) * kLanes<A>);
  for (; p < pixels; ++p) sums[0] += load(from + p * kLanes<A>);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class A>
void add_weight_gradient_as(const WeightGradient& g, const Tile& tile, A* partials, void* scratch) {
  constexpr int64_t kN = kLanes<A>;
  const int64_t kernel = g.kernel_size, padding = kernel / 2, results = kernel * kernel + 1;
  const Ring<A> ring(scratch, kernel, g.scratch_columns, tile.first_column * g.stride - padding, g.width);
  A* grad = ring.end();
  A* sums = grad + tile.columns * kN;
  const bool exact = g.stride == 1 && tile.columns == g.width && g.width % 7 == 0;
  const auto run = find_weight_gradient_row<A>(kernel, g.stride, exact);

  for (int64_t block = tile.first_block; block < tile.first_block + tile.blocks; ++block, partials += results * kN) {
    const int64_t channel = block * kN, lanes = smaller(kN, g.channels - channel);
    // The tile is summed by itself before it joins the total: shorter sums round less.
    for (int64_t i = 0; i < results; ++i) store(sums + i * kN, Vector<A>{});
    Vector<A> bias{};
    for (int64_t sample = tile.first_sample; sample < tile.first_sample + tile.samples; ++sample) {
      if (is_dropped<A>(g.sample_scale, sample)) continue;
      int64_t filled = -1;  // rows of x before this one are in the ring
      for (int64_t y = tile.first_row; y < tile.first_row + tile.rows; ++y) {
        const int64_t first_row = y * g.stride - padding, skipped = larger(0, -first_row);
        const int64_t row_end = smaller(first_row + kernel, g.height);
        if (filled < 0) filled = first_row + skipped;
        for (; filled < row_end; ++filled)
          ring.fill(filled, g.type, g.x, (sample * g.height + filled) * g.width * g.channels + channel, g.width,
                    g.channels, lanes);
        const int64_t position = (sample * g.result_height + y) * g.result_width + tile.first_column;
        load_row(g.type, g.grad, position * g.channels + channel, g.result_width * g.channels, g.channels, lanes,
                 tile.columns, grad);
        bias += sum_of_row(grad, tile.columns);

        const A* rows[kMaxKernelSize];
        int64_t row_count = 0;
        A* row = ring.row(first_row + skipped);
        for (int64_t i = first_row + skipped; i < row_end; ++i, row = ring.after(row)) rows[row_count++] = row;
        run(grad, rows, row_count, tile.columns, sums + skipped * kernel * kN);
      }
    }
    store(sums + (results - 1) * kN, bias);
    for (int64_t i = 0; i < results; ++i) store(partials + i * kN, load(partials + i * kN) + load(sums + i * kN));
  }
}

void add_weight_gradient(const WeightGradient& gradient, const Tile& tile, void* sums, void* scratch) {
  if (gradient.type == Element::kFloat64) {
    add_weight_gradient_as(gradient, tile, static_cast<double*>(sums), scratch);
  } else {
    add_weight_gradient_as(gradient, tile, static_cast<float*>(sums), scratch);
  }
}

}  // namespace

extern const Kernels depthwise_conv_kernels = {kVectorBytes, correlate, add_weight_gradient};

}  // namespace convnext_kernels::CPU_CAPABILITY
