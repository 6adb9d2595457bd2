// bias_gelu and its backward, against plain loops in double, and the proof of the cheap GELU's error bounds.
#include "gelu_in_double.h"
#include "mlp/kernels.cuh"
#include "parameter.h"

namespace {

using namespace convnext_kernels;
using harness::Options;
using harness::Outcome;
using harness::TestParameter;

// Options of both: type, gelu, bias, rows, columns; offset: elements by which the tensors miss 16-byte alignment.
template <class T>
int bias_gelu_case(const Options& options) {
  const int64_t rows = options.number("rows"), columns = options.number("columns"), offset = options.number("offset");
  const Gelu kind = gelu_kind(options);
  const size_t count = static_cast<size_t>(rows * columns);
  emu::Buffer<T> x(count + offset, "x");
  harness::fill_normal(x, 1, 2.0);
  const TestParameter bias(options.text("bias"), columns, 2, "bias");
  return harness::run_schedules([&] {
    emu::Buffer<T> y(count + offset, "y");
    const RowPassPlan plan = plan_bias_gelu(false, rows, columns, sizeof(T), offset == 0, 1);
    launch_bias_gelu<T>(plan, {x.data() + offset, bias.parameter(), y.data() + offset, rows, columns}, kind, nullptr);
    Outcome outcome;
    for (size_t i = 0; i < count; ++i) {
      const double input = harness::to_double(x[i + offset]);
      const double expected = gelu_in_double(input + bias[i % columns], kind);
      outcome.check(
          "y", i, harness::to_double(y[i + offset]), expected,
          harness::half_ulp<T>(expected) + forward_error<T>(std::fabs(input) + std::fabs(bias[i % columns]), expected));
    }
    outcome.keep(y);
    return outcome;
  });
}

template <class T>
int bias_gelu_backward_case(const Options& options) {
  using A = Accumulation<T>;
  const int64_t rows = options.number("rows"), columns = options.number("columns"), offset = options.number("offset");
  const Gelu kind = gelu_kind(options);
  const size_t count = static_cast<size_t>(rows * columns);
  emu::Buffer<T> x(count + offset, "x"), grad(count + offset, "grad");
  harness::fill_normal(x, 1, 2.0);
  harness::fill_normal(grad, 3, 1.0);
  const TestParameter bias(options.text("bias"), columns, 2, "bias");
  const bool has_bias = options.text("bias") != "none";
  return harness::run_schedules([&] {
    const RowPassPlan plan = plan_bias_gelu(true, rows, columns, sizeof(T), offset == 0, 1);
    emu::Buffer<T> grad_x(count + offset, "grad_x");
    emu::Buffer<A> partials(has_bias ? plan.row_blocks * columns : 0, "partials");
    emu::Buffer<A> grad_bias(has_bias && rows > 0 ? columns : 0, "grad_bias");
    launch_bias_gelu_backward<T>(plan,
                                 {grad.data() + offset, x.data() + offset, bias.parameter(), grad_x.data() + offset,
                                  has_bias ? partials.data() : nullptr, rows, columns},
                                 grad_bias.data(), kind, nullptr);
    Outcome outcome;
    std::vector<double> sum(columns), allowed(columns);
    for (size_t i = 0; i < count; ++i) {
      const double g = harness::to_double(grad[i + offset]);
      const double input = harness::to_double(x[i + offset]);
      const double expected = g * gelu_derivative_in_double(input + bias[i % columns], kind);
      const double error = derivative_error<T>(std::fabs(input) + std::fabs(bias[i % columns])) * std::fabs(g);
      outcome.check("grad_x", i, harness::to_double(grad_x[i + offset]), expected,
                    harness::half_ulp<T>(expected) + error);
      sum[i % columns] += expected;
      allowed[i % columns] += error + std::fabs(expected) * (std::is_same_v<T, double> ? 1e-15 : 1e-6);
    }
    for (size_t c = 0; c < grad_bias.size(); ++c) outcome.check("grad_bias", c, grad_bias[c], sum[c], allowed[c]);
    outcome.keep(grad_x);
    outcome.keep(grad_bias);
    return outcome;
  });
}

// Plans of many shapes and chips: every element in one block, no block without work, limits kept.
template <class T>
int bias_gelu_plan_case(const Options&) {
  std::mt19937_64 random(1);
  const auto number = [&](int most_bits) {  // sizes of every magnitude
    const int bits = static_cast<int>(random() % static_cast<uint64_t>(most_bits)) + 1;
    return static_cast<int64_t>(random() >> (64 - bits)) + 1;
  };
  for (int i = 0; i < 50000; ++i) {
    const bool backward = i % 2, aligned = i % 4 < 2;
    const int64_t rows = number(36), columns = i % 3 ? number(13) : 8 * number(18);
    const int multiprocessors = static_cast<int>(number(8));
    const RowPassPlan plan = plan_bias_gelu(backward, rows, columns, sizeof(T), aligned, multiprocessors);
    const int64_t threads = static_cast<int64_t>(plan.block_columns) * plan.block_rows;
    const int64_t covered = static_cast<int64_t>(plan.column_blocks) * plan.block_columns * plan.vector_size;
    const int64_t block_width = static_cast<int64_t>(plan.block_columns) * plan.vector_size;
    const int64_t rows_a_step = plan.block_rows * bias_gelu_tuning(backward, sizeof(T)).thread_rows;
    const bool vectors_fit = plan.vector_size == 1 || (aligned && columns % plan.vector_size == 0 &&
                                                       plan.vector_size * sizeof(T) == kVectorBytes);
    const bool right = vectors_fit && threads >= 1 && threads <= kRowPassThreads && covered >= columns &&
                       covered - block_width < columns && plan.row_blocks >= 1 && plan.row_blocks <= 65535 &&
                       (plan.row_blocks - 1) * rows_a_step < rows && block_width * plan.block_rows * 8 <= 48 * 1024;
    if (right) continue;
    std::printf("%lld rows of %lld, %d multiprocessors: vectors of %d, grid %d x %d of blocks %d x %d\n",
                static_cast<long long>(rows), static_cast<long long>(columns), multiprocessors, plan.vector_size,
                plan.column_blocks, plan.row_blocks, plan.block_columns, plan.block_rows);
    return 1;
  }
  for (const auto [rows, columns] : {std::pair<int64_t, int64_t>{0, 8}, {8, 0}})
    if (plan_bias_gelu(false, rows, columns, sizeof(T), true, 1).row_blocks != 0) return 1;
  return 0;
}

// Over every finite value of a 16-bit type, with the approximate instructions at their best and at their worst: prints
// the worst errors, as name=value.
//   relative: of gelu(x) before rounding, where |gelu(x)| is at least `least`
//   ulp: after rounding, in units of the last place of the correctly rounded result, for the same
//   misrounded: the share of those results that are not the correctly rounded one
//   tiny: absolute, where |gelu(x)| is below `least`
//   derivative: absolute, before rounding
template <class T>
void print_bounds(Gelu kind) {
  // Below, fp16 is subnormal; and the approximate exponential flushes what is subnormal in fp32.
  const double least = std::is_same_v<T, __half> ? 0x1p-14 : 0x1p-120;
  double relative = 0, ulp = 0, tiny = 0, derivative = 0;
  int64_t misrounded = 0, results = 0;
  // Unlike std::max, keeps a NaN.
  const auto worst = [](double a, double b) { return b <= a ? a : b; };
  for (const auto mode :
       {emu::Approximation::kExact, emu::Approximation::kLow, emu::Approximation::kHigh, emu::Approximation::kMixed}) {
    emu::config().approximation = mode;
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const auto narrow = static_cast<uint16_t>(bits);
      T element;
      std::memcpy(static_cast<void*>(&element), &narrow, sizeof(narrow));
      const float x = to_accumulation(element);
      if (!std::isfinite(x)) continue;
      const bool erf = kind == Gelu::kErf;
      const double expected = gelu_in_double(x, kind);
      const double got = erf ? gelu<T, Gelu::kErf>(x) : gelu<T, Gelu::kTanh>(x);
      if (std::fabs(expected) >= least) {
        const double rounded = harness::to_double(harness::from_double<T>(got));
        const double best = harness::to_double(harness::from_double<T>(expected));
        relative = worst(relative, std::fabs(got - expected) / std::fabs(expected));
        ulp = worst(ulp, std::fabs(rounded - best) / (2 * harness::half_ulp<T>(best)));
        misrounded += rounded != best;
        ++results;
      } else {
        tiny = worst(tiny, std::fabs(got - expected));
      }
      // The square of larger numbers overflows in fp32; PyTorch's derivative is NaN there too.
      if (erf || std::fabs(x) < 1e19) {
        const double slope = erf ? gelu_derivative<T, Gelu::kErf>(x) : gelu_derivative<T, Gelu::kTanh>(x);
        derivative = worst(derivative, std::fabs(slope - gelu_derivative_in_double(x, kind)));
      }
    }
  }
  emu::config().approximation = emu::Approximation::kExact;
  std::printf("relative=%.9g\nulp=%.9g\nmisrounded=%.9g\ntiny=%.9g\nderivative=%.9g\n", relative, ulp,
              static_cast<double>(misrounded) / static_cast<double>(results), tiny, derivative);
}

int gelu_bounds_case(const Options& options) {
  if (options.text("type") == "half") {
    print_bounds<__half>(gelu_kind(options));
  } else {
    print_bounds<__nv_bfloat16>(gelu_kind(options));
  }
  return 0;
}

// Prints what becomes of infinities and NaN, in fp32 arithmetic: y and the derivative at -inf, inf, NaN.
int gelu_special_case(const Options& options) {
  const Gelu kind = gelu_kind(options);
  harness::with_type(options.text("type"), [&](auto element) {
    using T = decltype(element);
    using A = Accumulation<T>;
    constexpr A kInfinity = std::numeric_limits<A>::infinity();
    for (A x : {-kInfinity, kInfinity, std::numeric_limits<A>::quiet_NaN()}) {
      const A y = kind == Gelu::kErf ? gelu<T, Gelu::kErf>(x) : gelu<T, Gelu::kTanh>(x);
      const A slope = kind == Gelu::kErf ? gelu_derivative<T, Gelu::kErf>(x) : gelu_derivative<T, Gelu::kTanh>(x);
      std::printf("%g %g\n", std::fabs(static_cast<double>(y)), std::fabs(static_cast<double>(slope)));
    }
  });
  return 0;
}

template <class Function>
int with_element(const Options& options, Function&& function) {
#ifdef ONLY_TYPE  // mutants are compiled for one type, to save time
  return function(ONLY_TYPE{});
#else
  return harness::with_type(options.text("type"), function);
#endif
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main_of(
      argc, argv,
      {{"bias_gelu",
        [](const Options& options) {
          return with_element(options, [&](auto element) { return bias_gelu_case<decltype(element)>(options); });
        }},
       {"bias_gelu_backward",
        [](const Options& options) {
          return with_element(options,
                              [&](auto element) { return bias_gelu_backward_case<decltype(element)>(options); });
        }},
       {"bias_gelu_plan",
        [](const Options& options) {
          return with_element(options, [&](auto element) { return bias_gelu_plan_case<decltype(element)>(options); });
        }},
       {"gelu_bounds", gelu_bounds_case},
       {"gelu_special", gelu_special_case}});
}
