// layer_norm and its backward against plain loops in double, and the plans' promises.
#include "layer_norm/launch.cuh"
#include "parameter.h"

namespace {

using namespace convnext_kernels;
using harness::Options;
using harness::Outcome;
using harness::TestParameter;

// What the cases have in common. Options: rows, channels; offset: elements by which the tensors miss 16-byte alignment;
// sample_rows: rows of a sample, of which every third is dropped (0: no drop path); first_row: of the first row;
// multiprocessors, shared (KiB) of the chip; weight, bias: types of the parameters; data: what rows are made of.
struct Problem {
  explicit Problem(const Options& options)
      : rows(options.number("rows")),
        channels(options.number("channels")),
        offset(options.number("offset")),
        sample_rows(options.number("sample_rows")),
        first_row(options.number("first_row")),
        data(options.text("data")),
        chip{static_cast<int>(options.number("multiprocessors")), options.number("shared") * 1024,
             options.number("shared") * 1024 + 1024},
        weight(options.text("weight"), static_cast<size_t>(channels), 2, "weight", 1),
        bias(options.text("bias"), static_cast<size_t>(channels), 3, "bias", 0) {}

  size_t elements() const { return static_cast<size_t>(rows * channels + offset); }
  size_t at(int64_t row, int64_t channel) const { return static_cast<size_t>(row * channels + channel + offset); }
  bool dropped(int64_t row) const { return sample_rows && (first_row + row) / sample_rows % 3 == 1; }
  size_t samples() const { return sample_rows ? static_cast<size_t>((first_row + rows) / sample_rows + 1) : 0; }
  template <class A>
  void fill_scale(emu::Buffer<A>& scale) const {
    for (size_t i = 0; i < scale.size(); ++i) scale[i] = i % 3 == 1 ? A(0) : A(1.25);
  }

  // Rows of random numbers; NaN in those that are dropped: it must not be seen anywhere.
  template <class T>
  void fill(emu::Buffer<T>& buffer, unsigned seed, bool is_x) const {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t c = 0; c < channels; ++c) {
        double value = normal(random);
        if (is_x && data == "offset") value += 1e4;              // the mean is much larger than the deviation
        if (is_x && data == "large") value = 6e4 + 1e3 * value;  // squares overflow fp16
        if (is_x && data == "large") value = std::min(value, 65504.0);
        if (is_x && data == "non_finite" && row % 3 == 1 && c == channels / 2)
          value = row % 2 ? std::nan("") : std::numeric_limits<double>::infinity();
        buffer[at(row, c)] = harness::from_double<T>(dropped(row) ? std::nan("") : value);
      }
    }
  }

  int64_t rows, channels, offset, sample_rows, first_row;
  std::string data;
  Chip chip;
  TestParameter weight, bias;
};

// Of a row in double; and what fp32 (fp64) arithmetic, well done, may be off by: sums of a thread's elements and then
// over threads, no worse than 32 roundings of the sum of magnitudes.
struct Statistics {
  double mean = 0, variance = 0, mean_error = 0;

  double rstd(double eps) const { return 1 / std::sqrt(variance + eps); }
  double rstd_error(double unit, double eps) const {  // relative
    return 40 * unit + 0.5 * mean_error * mean_error / (variance + eps);
  }
};

template <class A>
double unit() {
  return std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;
}

template <class T>
Statistics statistics_of_row(const Problem& problem, emu::Buffer<T>& x, int64_t row) {
  Statistics result;
  double magnitude = 0;
  const double count = static_cast<double>(problem.channels);
  for (int64_t c = 0; c < problem.channels; ++c) {
    const double value = harness::to_double(x[problem.at(row, c)]);
    result.mean += value / count;
    magnitude += std::fabs(value) / count;
  }
  for (int64_t c = 0; c < problem.channels; ++c) {
    const double centred = harness::to_double(x[problem.at(row, c)]) - result.mean;
    result.variance += centred * centred / count;
  }
  result.mean_error = 32 * unit<Accumulation<T>>() * magnitude;
  return result;
}

// Mean and rstd as an earlier launch would have left them, NaN for rows that are not to be read.
template <class T, class A>
void fill_statistics(const Problem& problem, emu::Buffer<T>& x, double eps, emu::Buffer<A>& mean,
                     emu::Buffer<A>& rstd) {
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (problem.dropped(row)) continue;
    const Statistics exact = statistics_of_row(problem, x, row);
    mean[row] = static_cast<A>(exact.mean);
    rstd[row] = static_cast<A>(exact.rstd(eps));
  }
}

// Further options: given (1: from given statistics). Checks y, mean and rstd.
template <class T, class R>
int forward_case(const Options& options) {
  using A = Accumulation<T>;
  constexpr double kEps = 1e-6;
  const Problem problem(options);
  const bool given = options.number("given") != 0;
  emu::Buffer<T> x(problem.elements(), "x");
  problem.fill(x, 1, true);
  emu::Buffer<A> scale(problem.samples(), "sample_scale");
  problem.fill_scale(scale);
  emu::Buffer<A> given_mean(static_cast<size_t>(problem.rows), "mean");
  emu::Buffer<A> given_rstd(static_cast<size_t>(problem.rows), "rstd");
  fill_statistics(problem, x, kEps, given_mean, given_rstd);
  return harness::run_schedules([&] {
    emu::Buffer<R> y(problem.elements(), "y");
    emu::Buffer<A> mean(static_cast<size_t>(problem.rows), "mean"), rstd(static_cast<size_t>(problem.rows), "rstd");
    LayerNormParams<T, R> params;
    params.x = x.data() + problem.offset;
    params.weight = problem.weight.parameter();
    params.bias = problem.bias.parameter();
    params.sample_scale = problem.sample_rows ? scale.data() : nullptr;
    params.first_row = problem.first_row;
    params.rows_per_sample = std::max<int64_t>(problem.sample_rows, 1);
    params.y = y.data() + problem.offset;
    params.mean = (given ? given_mean : mean).data();
    params.rstd = (given ? given_rstd : rstd).data();
    params.rows = problem.rows;
    params.channels = problem.channels;
    params.eps = static_cast<A>(kEps);
    if (given) {
      launch_layer_norm_normalise("layer_norm", params, problem.offset == 0, problem.chip, nullptr);
    } else {
      launch_layer_norm("layer_norm", params, problem.offset == 0, problem.chip, nullptr);
    }

    Outcome outcome;
    const double u = unit<A>();
    for (int64_t row = 0; row < problem.rows; ++row) {
      const bool dropped = problem.dropped(row);
      Statistics exact = statistics_of_row(problem, x, row);
      double rstd_error = exact.rstd_error(u, kEps), row_rstd = exact.rstd(kEps);
      if (given) {
        exact.mean = given_mean[row], row_rstd = given_rstd[row];
        exact.mean_error = rstd_error = 0;
      } else if (dropped) {
        outcome.check("mean", row, mean[row], 0, 0);
        outcome.check("rstd", row, rstd[row], 0, 0);
      } else {
        if (std::isfinite(exact.mean)) outcome.check("mean", row, mean[row], exact.mean, exact.mean_error);
        outcome.check("rstd", row, rstd[row], row_rstd, row_rstd * rstd_error);
      }
      for (int64_t c = 0; c < problem.channels; ++c) {
        const double w = problem.weight[c], centred = harness::to_double(x[problem.at(row, c)]) - exact.mean;
        const double expected = dropped ? 0 : centred * row_rstd * w + problem.bias[c];
        const double error = std::fabs(w) * row_rstd * (exact.mean_error + std::fabs(centred) * (rstd_error + 4 * u)) +
                             2 * u * (std::fabs(expected) + std::fabs(problem.bias[c]));
        outcome.check("y", problem.at(row, c) - problem.offset, harness::to_double(y[problem.at(row, c)]), expected,
                      dropped ? 0 : error + harness::half_ulp<R>(std::fabs(expected) + error));
      }
    }
    outcome.keep(y);
    outcome.keep(mean);
    outcome.keep(rstd);
    return outcome;
  });
}

// Further options: wanted (1: grad_x, 2: grad_weight, 4: grad_bias), chunks (launches that share a workspace).
template <class G, class T>
int backward_case(const Options& options) {
  using A = Accumulation<T>;
  const Problem problem(options);
  const int64_t wanted = options.number("wanted"), chunks = options.number("chunks"), channels = problem.channels;
  const bool aligned = problem.offset == 0;
  emu::Buffer<T> x(problem.elements(), "x");
  emu::Buffer<G> grad(problem.elements(), "grad");
  problem.fill(x, 1, true);
  problem.fill(grad, 4, false);
  emu::Buffer<A> scale(problem.samples(), "sample_scale");
  problem.fill_scale(scale);
  emu::Buffer<A> mean(static_cast<size_t>(problem.rows), "mean"), rstd(static_cast<size_t>(problem.rows), "rstd");
  fill_statistics(problem, x, 1e-6, mean, rstd);
  const auto plan = [&](int64_t rows) {
    return plan_layer_norm_backward(rows, channels, sizeof(G), sizeof(T), aligned, problem.chip);
  };
  const auto first_of = [&](int64_t chunk) { return problem.rows * chunk / chunks; };
  return harness::run_schedules([&] {
    int64_t partial_rows = 0;
    for (int64_t i = 0; i < chunks; ++i) partial_rows += plan(first_of(i + 1) - first_of(i)).partial_rows();
    const auto sums = [&](int64_t rows, bool asked) { return static_cast<size_t>(asked ? rows * channels : 0); };
    emu::Buffer<T> grad_x(wanted & 1 ? problem.elements() : 0, "grad_x");
    emu::Buffer<A> weight_partials(sums(partial_rows, wanted & 2), "weight_partials");
    emu::Buffer<A> bias_partials(sums(partial_rows, wanted & 4), "bias_partials");
    emu::Buffer<A> grad_weight(sums(problem.rows > 0, wanted & 2), "grad_weight");
    emu::Buffer<A> grad_bias(sums(problem.rows > 0, wanted & 4), "grad_bias");
    int64_t piece = 0;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t first = first_of(i);
      LayerNormBackwardParams<G, T> params;
      params.grad = &grad[problem.at(0, 0)] + first * channels;
      params.x = &x[problem.at(0, 0)] + first * channels;
      params.mean = mean.data() + first;
      params.rstd = rstd.data() + first;
      params.weight = problem.weight.parameter();
      params.sample_scale = problem.sample_rows ? scale.data() : nullptr;
      params.first_row = problem.first_row + first;
      params.rows_per_sample = std::max<int64_t>(problem.sample_rows, 1);
      if (wanted & 1) params.grad_x = grad_x.data() + problem.offset + first * channels;
      if (wanted & 2) params.weight_partials = weight_partials.data() + piece * channels;
      if (wanted & 4) params.bias_partials = bias_partials.data() + piece * channels;
      params.rows = first_of(i + 1) - first;
      params.channels = channels;
      const LayerNormPlan of_chunk = plan(params.rows);
      if (chunks == 1) {
        launch_layer_norm_backward("layer_norm_backward", of_chunk, params, grad_weight.data(), grad_bias.data(),
                                   nullptr);
      } else {
        launch_layer_norm_backward_partials("layer_norm_backward", of_chunk, params, nullptr);
      }
      piece += of_chunk.partial_rows();
    }
    if (chunks > 1 && problem.rows > 0) {
      if (wanted & 2)
        launch_column_sum("sum", weight_partials.data(), grad_weight.data(), partial_rows, channels, nullptr);
      if (wanted & 4) launch_column_sum("sum", bias_partials.data(), grad_bias.data(), partial_rows, channels, nullptr);
    }

    Outcome outcome;
    const double u = unit<A>(), count = static_cast<double>(channels);
    std::vector<double> weight_sum(channels), weight_size(channels), bias_sum(channels), bias_size(channels);
    for (int64_t row = 0; row < problem.rows; ++row) {
      const bool dropped = problem.dropped(row);
      std::vector<double> n(channels), s(channels);
      double mean_s = 0, mean_sn = 0, size_s = 0, size_sn = 0;
      for (int64_t c = 0; c < channels && !dropped; ++c) {
        const double g = harness::to_double(grad[problem.at(row, c)]);
        n[c] = (harness::to_double(x[problem.at(row, c)]) - mean[row]) * static_cast<double>(rstd[row]);
        s[c] = g * problem.weight[c];
        mean_s += s[c] / count;
        mean_sn += s[c] * n[c] / count;
        size_s += std::fabs(s[c]) / count;
        size_sn += std::fabs(s[c] * n[c]) / count;
        weight_sum[c] += g * n[c];
        weight_size[c] += std::fabs(g * n[c]);
        bias_sum[c] += g;
        bias_size[c] += std::fabs(g);
      }
      for (int64_t c = 0; c < channels && (wanted & 1); ++c) {
        const double factor = dropped ? 0 : static_cast<double>(rstd[row]);
        const double expected = factor * (s[c] - mean_s - n[c] * mean_sn);
        const double error = factor * u * 40 * (std::fabs(s[c]) + size_s + std::fabs(n[c]) * size_sn);
        outcome.check("grad_x", problem.at(row, c) - problem.offset, harness::to_double(grad_x[problem.at(row, c)]),
                      expected, dropped ? 0 : error + harness::half_ulp<T>(std::fabs(expected) + error));
      }
    }
    for (size_t c = 0; c < grad_weight.size(); ++c)
      outcome.check("grad_weight", c, grad_weight[c], weight_sum[c], 64 * u * weight_size[c]);
    for (size_t c = 0; c < grad_bias.size(); ++c)
      outcome.check("grad_bias", c, grad_bias[c], bias_sum[c], 64 * u * bias_size[c]);
    if (wanted & 1) outcome.keep(grad_x);
    outcome.keep(grad_weight);
    outcome.keep(grad_bias);
    return outcome;
  });
}

// Plans of many shapes and chips: every element in one thread, no block without work, limits kept.
int plan_case(const Options&) {
  std::mt19937_64 random(1);
  const auto number = [&](int most_bits) {  // sizes of every magnitude
    const int bits = static_cast<int>(random() % static_cast<uint64_t>(most_bits)) + 1;
    return static_cast<int64_t>(random() >> (64 - bits)) + 1;
  };
  constexpr int kArchitectures[] = {80, 86, 89, 90, 100, 120};
  constexpr std::pair<size_t, size_t> kBytes[] = {{4, 4}, {2, 2}, {2, 4}, {4, 2}, {8, 8}};
  for (int i = 0; i < 60000; ++i) {
    const bool backward = i % 2, aligned = i % 4 < 2;
    const auto [bytes, other_bytes] = kBytes[i % 5];
    const int64_t widths[] = {number(13), 4 * number(12), 8 * number(12), 96 << i % 5, number(20)};
    const int64_t rows = number(36), channels = widths[random() % 5];
    Chip chip = chip_of_architecture(kArchitectures[i % 6]);
    if (i % 3 == 0) chip.multiprocessors = static_cast<int>(number(8));
    const LayerNormPlan plan = backward ? plan_layer_norm_backward(rows, channels, bytes, other_bytes, aligned, chip)
                                        : plan_layer_norm(rows, channels, bytes, other_bytes, aligned, chip);
    const size_t wide = std::max(bytes, other_bytes), narrow = std::min(bytes, other_bytes);
    const auto accumulation_bytes = static_cast<int64_t>(wide == 8 ? 8 : 4);
    const int64_t slots = int64_t{plan.row_threads} * plan.vectors * plan.vector_size;
    const int elements = plan.vectors * plan.vector_size;
    const bool held = plan.vectors > 0;
    const char* wrong = nullptr;
    const auto expect = [&](bool right, const char* what) {
      if (!right) wrong = what;
    };
    expect(channels % plan.vector_size == 0, "vectors fit the row");
    expect(plan.vector_size == 1 || (aligned && narrow * plan.vector_size >= 8), "vectors are wide");
    expect(wide * plan.vector_size <= kVectorBytes, "vectors are no wider than an instruction");
    if (aligned && wide < 8 && channels % 8 == 0 && held)
      expect(wide * plan.vector_size == kVectorBytes, "the widest vectors where the row allows them");
    expect(plan.threads() >= 1 && plan.threads() <= kLayerNormThreads, "threads of a block");
    expect(plan.blocks >= 1 && (plan.blocks - 1) * int64_t{plan.block_rows} < rows, "no block without rows");
    expect(plan.shared_bytes <= 99 * 1024, "shared memory");
    expect(!backward || (plan.sum_blocks >= 1 && plan.sum_blocks <= std::min<int64_t>(rows, 65535)), "partial sums");
    expect(held || channels > (wide == 8 ? 2048 : 4096), "rows of up to 4096 channels are held");
    if (held) {
      const int threads = plan.row_threads;
      const int blocks_per_sm = layer_norm_blocks_per_sm(backward, plan.vector_size, elements, accumulation_bytes);
      const int64_t resident = (plan.blocks + chip.multiprocessors - 1) / chip.multiprocessors;
      expect(layer_norm_has_kernel(backward, plan.vector_size, plan.vectors), "there is such a kernel");
      expect(slots >= channels, "a slot for every element");
      expect(threads <= 32 ? (threads & (threads - 1)) == 0 : threads % 32 == 0, "warps or parts of them");
      expect(plan.threads() % 32 == 0, "warps are whole");
      expect(plan.sum_blocks == (backward ? plan.blocks : 0), "a row of partial sums a block");
      expect(resident == 1 || resident * (plan.shared_bytes + 1024) <= chip.shared_bytes_per_multiprocessor,
             "all blocks resident: shared memory");
      expect(resident <= blocks_per_sm, "all blocks resident: registers");
      expect(blocks_per_sm * kLayerNormThreads <= chip.threads_per_multiprocessor, "all blocks resident: threads");
      int64_t odd = channels;
      while (odd % 2 == 0) odd /= 2;
      if (aligned && wide < 8 && channels >= 96 && channels <= 3072 && (odd == 1 || odd == 3))
        expect(slots == channels, "no idle lanes at ConvNeXt's widths");
    }
    if (!wrong) continue;
    std::printf("wrong: %s\n%s, %lld rows of %lld, %zu and %zu bytes, %d multiprocessors: %d vectors of %d, %d x %d\n",
                wrong, backward ? "backward" : "forward", static_cast<long long>(rows),
                static_cast<long long>(channels), bytes, other_bytes, chip.multiprocessors, plan.vectors,
                plan.vector_size, plan.row_threads, plan.block_rows);
    return 1;
  }
  for (const auto [rows, channels] : {std::pair<int64_t, int64_t>{0, 8}, {8, 0}}) {
    const LayerNormPlan plan = plan_layer_norm_backward(rows, channels, 4, 4, true, chip_of_architecture(90));
    if (plan.blocks != 0 || plan.partial_rows() != 0) return 1;
  }
  return 0;
}

// Calls function(zero of type, zero of other), the types that are named.
template <class Function>
int with_elements(const Options& options, Function&& function) {
#ifdef ONLY_TYPE  // mutants are compiled for one type, to save time
  return function(ONLY_TYPE{}, ONLY_TYPE{});
#else
  return harness::with_type(options.text("type"), [&](auto element) {
    using T = decltype(element);
    return harness::with_type(options.text("other"), [&](auto other) -> int {
#ifdef FEW_TYPES  // so are sanitizers: vectors of 8 and 4 of one type, and two types
      constexpr bool kWanted =
          std::is_same_v<decltype(other), __nv_bfloat16> && sizeof(T) <= 4 && !std::is_same_v<T, __half>;
#else
      constexpr bool kWanted = kHasLayerNorm<T, decltype(other)>;
#endif
      if constexpr (kWanted) return function(T{}, other);
      throw std::runtime_error("no kernel for these types");
    });
  });
#endif
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main_of(argc, argv,
                          {{"layer_norm",
                            [](const Options& options) {
                              return with_elements(options, [&](auto x, auto y) {
                                return forward_case<decltype(x), decltype(y)>(options);
                              });
                            }},
                           {"layer_norm_backward",
                            [](const Options& options) {
                              return with_elements(options, [&](auto x, auto grad) {
                                return backward_case<decltype(grad), decltype(x)>(options);
                              });
                            }},
                           {"plan", plan_case}});
}
