// The depthwise convolution and its gradients against plain loops in double, and the plans' promises.
#include "depthwise_conv/kernels_tensor_convolution.cuh"
#include "depthwise_conv/kernels_tensor_weight_gradient.cuh"
#include "depthwise_conv/launch.cuh"
#include "harness.h"

namespace {

using namespace convnext_kernels;
using namespace convnext_kernels::depthwise_conv;
using harness::Options;
using harness::Outcome;

// A parameter of any type, or none.
class TestParameter {
 public:
  TestParameter(const std::string& type, size_t count, unsigned seed, double scale, const char* name) {
    if (type == "none") return;
    std::mt19937 random(seed);
    std::normal_distribution<double> normal(0.0, scale);
    memory_ = std::make_unique<emu::Buffer<double>>(count, name);  // room for the widest type
    harness::with_type(type, [&](auto element) {
      using T = decltype(element);
      auto* data = reinterpret_cast<T*>(memory_->data());
      for (size_t i = 0; i < count; ++i) {
        data[i] = harness::from_double<T>(normal(random));
        values_.push_back(harness::to_double(data[i]));
      }
    });
    parameter_.data = memory_->data();
    const std::map<std::string, ElementType> types = {{"float", ElementType::kFloat},
                                                      {"double", ElementType::kDouble},
                                                      {"half", ElementType::kHalf},
                                                      {"bfloat16", ElementType::kBFloat16}};
    parameter_.type = types.at(type);
  }
  Parameter parameter() const { return parameter_; }
  double operator[](size_t i) const { return values_.empty() ? 0.0 : values_[i]; }

 private:
  std::unique_ptr<emu::Buffer<double>> memory_;
  std::vector<double> values_;
  Parameter parameter_;
};

// What both cases have in common. Options: n, c, h, w, kernel, stride, drop (every third sample, from this one on; -1:
// none), aligned (0 keeps the tuned kernels away), multiprocessors, shared (KiB a block may have), version (the one
// asked for), expect (the kernel that runs: simple, fma or tensor).
struct Problem {
  explicit Problem(const Options& options)
      : shape{options.number("n"), static_cast<int>(options.number("h")), static_cast<int>(options.number("w")),
              static_cast<int>(options.number("c"))},
        kernel_size(static_cast<int>(options.number("kernel"))),
        stride(static_cast<int>(options.number("stride"))),
        drop(options.number("drop")),
        aligned(options.number("aligned") != 0),
        chip{static_cast<int>(options.number("multiprocessors")), options.number("shared") * 1024,
             options.number("shared") * 1024 + 1024} {
    const std::map<std::string, Version> versions = {
        {"chosen", Version::kChosen}, {"fma", Version::kFma}, {"tensor", Version::kTensor}};
    version = versions.at(options.text("version"));
    emu::config().most_shared_bytes = static_cast<size_t>(chip.shared_bytes_per_block);
  }

  size_t elements(int height, int width) const {
    return static_cast<size_t>(shape.samples) * height * width * shape.channels;
  }
  bool dropped(int64_t sample) const { return drop >= 0 && sample % 3 == drop % 3; }
  size_t at(int64_t sample, int y, int x, int channel, int height, int width) const {
    return ((static_cast<size_t>(sample) * height + y) * width + x) * shape.channels + channel;
  }

  // NaN in what is dropped: it must not be seen anywhere.
  template <class T>
  void fill(emu::Buffer<T>& buffer, unsigned seed) const {
    harness::fill_normal(buffer, seed, 1.0);
    if (shape.samples == 0) return;
    const size_t per_sample = buffer.size() / shape.samples;
    for (size_t i = 0; i < buffer.size(); ++i)
      if (dropped(i / per_sample)) buffer[i] = harness::from_double<T>(std::nan(""));
  }
  template <class A>
  void fill_scale(emu::Buffer<A>& scale) const {
    for (size_t i = 0; i < scale.size(); ++i) scale[i] = dropped(i) ? A(0) : A(1.25);
  }

  Images shape;
  int kernel_size, stride;
  int64_t drop;
  bool aligned;
  Chip chip;
  Version version;
};

void expect_kernel(const Options& options, const std::string& got) {
  if (options.text("expect") != got) throw std::runtime_error("this shape runs on the " + got + " kernel");
}

// Further options: type, result, weight, bias (types), residual (0, 1), transposed (0, 1), extra (output padding), nan
// (an element of the input that is one; -1: none).
template <class T, class R>
int convolution_case(const Options& options) {
  using A = Accumulation<T>;
  const Problem problem(options);
  const Images& shape = problem.shape;
  const int size = problem.kernel_size, taps = size * size, padding = size / 2, stride = problem.stride;
  const bool transposed = options.number("transposed") != 0, residual = options.number("residual") != 0;
  const int extra = static_cast<int>(options.number("extra"));
  const auto result_size = [&](int in) { return transposed ? (in - 1) * stride + 1 + extra : (in - 1) / stride + 1; };
  const int height = result_size(shape.height), width = result_size(shape.width);
  const bool on_tensor_cores =
      options.text("expect") == std::string("tensor");  // where weights have the type of the elements
  expect_kernel(options, plan_convolution<T, R>(shape, size, stride, residual, options.text("bias") != "none",
                                                problem.aligned, problem.chip, problem.version)
                             .name());

  emu::Buffer<T> x(problem.elements(shape.height, shape.width), "x");
  problem.fill(x, 1);
  if (options.number("nan") >= 0) x[options.number("nan")] = harness::from_double<T>(std::nan(""));
  emu::Buffer<R> added(residual ? problem.elements(height, width) : 0, "residual");
  harness::fill_normal(added, 2, 1.0);
  emu::Buffer<A> scale(problem.drop >= 0 ? shape.samples : 0, "sample_scale");
  problem.fill_scale(scale);
  const TestParameter weight(options.text("weight"), static_cast<size_t>(shape.channels) * taps, 3, 0.2, "weight");
  const auto used_weight = [&](size_t i) {
    return on_tensor_cores ? harness::to_double(harness::from_double<T>(weight[i])) : weight[i];
  };
  const TestParameter bias(options.text("bias"), shape.channels, 4, 0.5, "bias");

  std::vector<double> expected(problem.elements(height, width)), allowed(expected.size());
  for (int64_t n = 0; n < shape.samples; ++n)
    for (int y = 0; y < height; ++y)
      for (int column = 0; column < width; ++column)
        for (int c = 0; c < shape.channels; ++c) {
          double sum = problem.dropped(n) ? 0.0 : bias[c], magnitude = std::fabs(sum);
          for (int tap = 0; tap < taps && !problem.dropped(n); ++tap) {
            int source_y = y * stride + tap / size - padding, source_x = column * stride + tap % size - padding;
            if (transposed) {
              source_y = y + padding - tap / size;
              source_x = column + padding - tap % size;
              if (source_y % stride || source_x % stride) continue;
              source_y /= stride;
              source_x /= stride;
            }
            if (source_y < 0 || source_y >= shape.height || source_x < 0 || source_x >= shape.width) continue;
            const double term = used_weight(static_cast<size_t>(c) * taps + tap) *
                                harness::to_double(x[problem.at(n, source_y, source_x, c, shape.height, shape.width)]);
            sum += term;
            magnitude += std::fabs(term);
          }
          const size_t i = problem.at(n, y, column, c, height, width);
          const double unit = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
          if (residual) sum += harness::to_double(added[i]);
          expected[i] = sum;
          allowed[i] = harness::half_ulp<R>(sum) + 12 * unit * (magnitude + std::fabs(sum));
        }

  return harness::run_schedules([&] {
    emu::Buffer<R> result(expected.size(), "y");
    SimpleConvolutionParams<T, R> params{};
    params.x = x.data();
    params.weight = weight.parameter();
    params.bias = bias.parameter();
    params.residual = residual ? added.data() : nullptr;
    params.sample_scale = problem.drop >= 0 ? scale.data() : nullptr;
    params.y = result.data();
    params.shape = shape;
    params.result_height = height;
    params.result_width = width;
    params.kernel_size = size;
    params.stride = stride;
    params.transposed = transposed;
    launch_convolution("depthwise_conv2d", params, problem.aligned, problem.chip, nullptr, problem.version);
    Outcome outcome;
    for (size_t i = 0; i < expected.size(); ++i)
      outcome.check("y", i, harness::to_double(result[i]), expected[i], allowed[i]);
    outcome.keep(result);
    return outcome;
  });
}

// A convolution that rounds its input from fp32 has the bits of two passes: rounding all of it, then version 2. Options
// of the convolution, of which it has no result, residual, transposed, extra and expect.
template <class T>
int rounding_convolution_case(const Options& options) {
  const Problem problem(options);
  const Images& shape = problem.shape;
  const TensorPlan plan = plan_rounding_convolution<T>(shape, problem.kernel_size, options.text("bias") != "none",
                                                       problem.aligned, problem.chip, problem.version);
  if (!plan.exists()) throw std::runtime_error("this shape is rounded in a pass of its own");

  emu::Buffer<float> x(problem.elements(shape.height, shape.width), "x");
  problem.fill(x, 1);
  // The copy of a dropped sample is a result: every other element is not the NaN that unwritten memory holds as well.
  for (size_t i = 0; i < x.size(); i += 2)
    if (std::isnan(x[i])) x[i] = 0.37f * static_cast<float>(i % 101);
  if (options.number("nan") >= 0) x[options.number("nan")] = std::nanf("");
  emu::Buffer<float> scale(problem.drop >= 0 ? shape.samples : 0, "sample_scale");
  problem.fill_scale(scale);
  const TestParameter weight(options.text("weight"), static_cast<size_t>(shape.channels) * kTaps, 3, 0.2, "weight");
  const TestParameter bias(options.text("bias"), shape.channels, 4, 0.5, "bias");
  const float* const sample_scale = problem.drop >= 0 ? scale.data() : nullptr;

  emu::Buffer<T> rounded(x.size(), "rounded x");
  for (size_t i = 0; i < x.size(); ++i) rounded[i] = harness::from_double<T>(x[i]);
  emu::Buffer<T> expected(x.size(), "expected y");
  SimpleConvolutionParams<T, T> two_passes{};
  two_passes.x = rounded.data();
  two_passes.weight = weight.parameter();
  two_passes.bias = bias.parameter();
  two_passes.sample_scale = sample_scale;
  two_passes.y = expected.data();
  two_passes.shape = shape;
  two_passes.result_height = shape.height;
  two_passes.result_width = shape.width;
  two_passes.kernel_size = kSize;
  two_passes.stride = 1;
  bool ran = false;

  return harness::run_schedules([&] {
    if (!ran)
      launch_convolution("depthwise_conv2d", two_passes, problem.aligned, problem.chip, nullptr, problem.version);
    ran = true;
    emu::Buffer<T> y(x.size(), "y"), x_copy(x.size(), "x_copy");
    TensorConvolutionParams<T, T, float> params{};
    params.x = x.data();
    params.weight = weight.parameter();
    params.bias = bias.parameter();
    params.sample_scale = sample_scale;
    params.y = y.data();
    params.shape = shape;
    params.plan = plan;
    params.x_copy = x_copy.data();
    launch_tensor_convolution("depthwise_conv2d_cast", params, nullptr);
    Outcome outcome;
    for (size_t i = 0; i < x.size(); ++i) {
      outcome.check("y", i, harness::to_double(y[i]), harness::to_double(expected[i]), 0.0);
      outcome.check("x_copy", i, harness::to_double(x_copy[i]), harness::to_double(rounded[i]), 0.0);
    }
    outcome.keep(y);
    outcome.keep(x_copy);
    return outcome;
  });
}

template <class T>
int weight_gradient_case(const Options& options) {
  using A = Accumulation<T>;
  const Problem problem(options);
  const Images& shape = problem.shape;
  const int size = problem.kernel_size, taps = size * size, padding = size / 2, stride = problem.stride;
  const int height = (shape.height - 1) / stride + 1, width = (shape.width - 1) / stride + 1;
  const WeightGradientLaunch plan =
      plan_weight_gradient(shape, height, size, stride, sizeof(T), problem.aligned, problem.chip, problem.version);
  expect_kernel(options, plan.name());

  emu::Buffer<T> x(problem.elements(shape.height, shape.width), "x"), grad(problem.elements(height, width), "grad");
  problem.fill(x, 1);
  problem.fill(grad, 2);
  emu::Buffer<A> scale(problem.drop >= 0 ? shape.samples : 0, "sample_scale");
  problem.fill_scale(scale);

  std::vector<double> expected(static_cast<size_t>(shape.channels) * (taps + 1)), magnitude(expected.size());
  for (int64_t n = 0; n < shape.samples; ++n) {
    if (problem.dropped(n)) continue;
    for (int y = 0; y < height; ++y)
      for (int column = 0; column < width; ++column)
        for (int c = 0; c < shape.channels; ++c) {
          const double dz = harness::to_double(grad[problem.at(n, y, column, c, height, width)]);
          const auto add = [&](size_t i, double term) {
            expected[i] += term;
            magnitude[i] += std::fabs(term);
          };
          add(static_cast<size_t>(shape.channels) * taps + c, dz);
          for (int tap = 0; tap < taps; ++tap) {
            const int source_y = y * stride + tap / size - padding, source_x = column * stride + tap % size - padding;
            if (source_y < 0 || source_y >= shape.height || source_x < 0 || source_x >= shape.width) continue;
            add(static_cast<size_t>(c) * taps + tap,
                dz * harness::to_double(x[problem.at(n, source_y, source_x, c, shape.height, shape.width)]));
          }
        }
  }

  return harness::run_schedules([&] {
    emu::Buffer<A> partials(plan.partial_rows() * expected.size(), "partials");
    emu::Buffer<A> grad_weight(static_cast<size_t>(shape.channels) * taps, "grad_weight");
    emu::Buffer<A> grad_bias(shape.channels, "grad_bias");
    SimpleWeightGradientParams<T> params{};
    params.grad = grad.data();
    params.x = x.data();
    params.sample_scale = problem.drop >= 0 ? scale.data() : nullptr;
    params.partials = partials.data();
    params.shape = shape;
    params.result_height = height;
    params.result_width = width;
    params.kernel_size = size;
    params.stride = stride;
    launch_weight_gradient("depthwise_conv2d_weight_grad", plan, params, grad_weight.data(), grad_bias.data(), nullptr);
    Outcome outcome;
    const double unit = std::is_same_v<T, double> ? 0x1p-53 : 0x1p-24;
    // Without samples nothing is launched, and the operator returns zeros without asking.
    for (size_t i = 0; i < expected.size() && shape.samples > 0; ++i) {
      const bool is_bias = i >= grad_weight.size();
      const size_t index = is_bias ? i - grad_weight.size() : i;
      outcome.check(is_bias ? "grad_bias" : "grad_weight", index, is_bias ? grad_bias[index] : grad_weight[index],
                    expected[i], 12 * unit * magnitude[i]);
    }
    outcome.keep(grad_weight);
    outcome.keep(grad_bias);
    return outcome;
  });
}

// --- plans

void require(bool condition, const char* what) {
  if (!condition) throw std::runtime_error(what);
}

// Walks through the stages of every block, as the kernels do, and counts.
template <Kind kKind>
void check_walk(const TilePlan& plan, int64_t samples) {
  std::vector<int> rows(plan.rows);
  for (int64_t block = 0; block < plan.row_blocks; ++block) {
    Stage stage = first_stage<kKind>(plan, block);
    require(stage.steps > 0, "a block without work");
    int next = 0;
    for (bool begins = true; stage.steps > 0; stage = next_stage<kKind>(plan, stage)) {
      require(begins == is_first_of_segment<kKind>(stage), "a segment that does not know where it begins");
      if (begins) {
        require(stage.sample < samples && stage.tile < plan.tiles, "a segment outside of the images");
        next = kKind == Kind::kConvolution ? std::max(0, stage.first - 3) : std::max(-3, stage.first - 6);
        const int64_t before = (stage.sample / plan.images * plan.tiles + stage.tile) * plan.height;
        for (int row = stage.first; row < stage.end; ++row) ++rows.at(before + row);
      }
      require(stage.step == next && stage.steps <= kStageRows, "steps left out");
      next += stage.steps;
      require(stage.last || stage.steps == kStageRows, "a short stage in the middle");
      const int end = kKind == Kind::kConvolution ? std::min(plan.height, stage.end + 3) : stage.end;
      require(stage.last == (next == end ? 1 : 0), "a segment that does not know where it ends");
      begins = stage.last != 0;
    }
  }
  for (int count : rows) require(count == 1, "a row that is not computed exactly once");
}

template <Kind kKind>
void check_tile_plan(int64_t samples, int64_t channels, int height, int width, int64_t element_bytes,
                     const Chip& chip) {
  const TilePlan plan = plan_tiles(kKind, samples, channels, height, width, element_bytes, chip);
  require(plan.warps() >= 1 && plan.warps() <= kMaxWarps, "a block's warps");
  require(plan.shared_bytes <= chip.shared_bytes_per_block, "more shared memory than there is");
  require(plan.row_blocks >= 1 && plan.row_blocks <= 65535 && plan.chunks <= 0x7fffffff, "the grid's limits");
  require(plan.chunks * kChunk >= channels && (plan.chunks - 1) * kChunk < channels, "channels");
  require(int64_t{plan.tiles} * plan.columns >= width && int64_t{plan.tiles - 1} * plan.columns < width, "columns");
  require(plan.images == 1 || plan.tiles == 1, "several images of several tiles");
  require(plan.rows == divide_up(samples, plan.images) * plan.tiles * height, "rows");
  require(plan.first_row(0) == 0 && plan.first_row(plan.row_blocks) == plan.rows, "blocks");
  // A block's partial sums reuse the memory of its stages.
  if (kKind == Kind::kWeightGradient)
    require(2 * plan.stage_elements(kKind) * element_bytes >= plan.warps() * (kTaps + 1) * kChunk * 4, "partial sums");
  if (plan.rows < 5000) check_walk<kKind>(plan, samples);
}

// Walks through the patches of every block, as the kernels do, and counts.
void check_patches(const TensorPlan& plan, const Images& shape, Kind kind) {
  const int64_t pixels = shape.samples * shape.height * shape.width;
  std::vector<uint8_t> written(pixels);
  const int halo = kPadding;
  for (int64_t block = 0; block < plan.row_blocks; ++block) {
    const int64_t first = plan.first_patch(block), end = plan.first_patch(block + 1);
    require(first < end, "a block without patches");
    Patch patch(plan, first);
    for (int64_t i = first; i < end; ++i, patch.advance(plan, shape)) {
      const Patch same(plan, i);
      require(same.sample == patch.sample && same.row == patch.row && same.column == patch.column, "patches in order");
      const PatchWindow window(patch, plan, shape, halo);
      require(window.bottom - window.top <= plan.copied_rows, "rows of the copies");
      require(window.right - window.left <= 2 * plan.copied_pairs, "columns of the copies");
      const PatchWindow inner(patch, plan, shape, 0);
      require(inner.bottom > inner.top && inner.right > inner.left, "an empty patch");
      if (kind == Kind::kWeightGradient)
        require(inner.bottom - inner.top <= plan.grad_rows && inner.right - inner.left <= 2 * plan.grad_pairs,
                "the gradient's copies");
      for (int image = 0; image < plan.images && patch.sample + image < shape.samples; ++image)
        for (int y = inner.top; y < inner.bottom; ++y)
          for (int x = inner.left; x < inner.right; ++x)
            ++written.at(((patch.sample + image) * shape.height + y) * shape.width + x);
    }
  }
  for (uint8_t count : written) require(count == 1, "a pixel that is not computed exactly once");
}

// The most of the eight rows of a matrix that share banks.
int matrix_conflicts(const TensorPlan& plan, int image_units, int pitch) {
  int most = 0, used[8] = {};
  for (int n = 0; n < plan.images * plan.segments; ++n) {
    const int unit = n / plan.segments * image_units + n % plan.segments * (plan.segment_rows() * pitch + 1);
    most = std::max(most, ++used[unit % 8]);
  }
  return most;
}

void check_tensor_plan(Kind kind, const Images& shape, int staged_bytes, const Chip& chip, int input_bytes = 2) {
  const TensorPlan plan =
      plan_tensor(kind, shape.samples, shape.channels, shape.height, shape.width, staged_bytes, chip, input_bytes);
  if (!plan.exists()) {
    require(chip.shared_bytes_per_block < 160 * 1024, "no plan for a chip with enough shared memory");
    return;
  }
  require(plan.shared_bytes <= chip.shared_bytes_per_block, "more shared memory than there is");
  require(plan.row_blocks >= 1 && plan.row_blocks <= 65535 && plan.chunks <= 0x7fffffff, "the grid's limits");
  require(plan.chunks * kTensorChunk >= shape.channels && (plan.chunks - 1) * kTensorChunk < shape.channels,
          "channels");
  require(plan.images >= 1 && plan.segments >= 1 && plan.images * plan.segments <= kSegments, "segments");
  require(plan.columns <= plan.blocks * kBlockColumns && plan.rows == plan.segments * plan.segment_rows(), "patches");
  require(int64_t{plan.row_patches} * plan.rows >= shape.height, "rows");
  require(int64_t{plan.column_patches} * plan.columns >= shape.width, "columns");
  require(plan.images == 1 || plan.row_patches == 1, "several images of several patches");
  require(plan.first_patch(0) == 0 && plan.first_patch(plan.row_blocks) == plan.patches, "blocks");
  // What lies in a plane does not overlap: of rows, images and results, the last must end before the next begins.
  const int pitch = plan.blocks + 1;
  require(row_units(plan.rows + kHaloRows - 1, pitch, plan.segment_rows()) + pitch <= plan.image_units, "images");
  require(plan.images * plan.image_units <= plan.plane_units, "planes");
  require(matrix_conflicts(plan, plan.image_units, pitch) == 1, "conflicts between banks");
  if (kind == Kind::kConvolution) {
    const int result_units = plan.segment_rows() * plan.blocks * staged_bytes / 2 + 1;
    require(plan.images * plan.segments * result_units <= plan.plane_units, "results");
  } else {
    require(row_units(plan.rows - 1, plan.blocks, plan.segment_rows()) + plan.blocks <= plan.grad_image_units,
            "images of the gradient");
    require(plan.images * plan.grad_image_units <= plan.grad_plane_units, "planes of the gradient");
    require(matrix_conflicts(plan, plan.grad_image_units, plan.blocks) == 1, "the gradient's conflicts between banks");
  }
  if (shape.samples * shape.height * shape.width < 20000) check_patches(plan, shape, kind);
}

// Eight threads that copy or read 16 bytes each at once shall meet eight different groups of banks.
template <int kParts>
void check_copied_units() {
  constexpr int kUnits = kParts * kPixelUnits;
  const auto differ = [](const auto& unit_of) {
    unsigned banks = 0;
    for (int i = 0; i < 8; ++i) banks |= 1u << (unit_of(i) & 7);
    return banks == 0xff;
  };
  for (int column = 0; column < 64; ++column) {
    for (int unit = 0; unit < kUnits; ++unit) {
      const int at = copied_unit<kParts>(column, unit);
      require(at / (2 * kUnits) == column / 2, "a copied pixel beside its pair of columns");
      for (int other = 0; other < kUnits; ++other)
        require(other == unit || copied_unit<kParts>(column, other) != at, "two units in one place");
      require(copied_unit<kParts>(column ^ 1, unit) != at, "two pixels in one place");
      require(copied_unit<kParts>(column + kSwizzledColumns, unit) == at + kSwizzledColumns * kUnits, "the period");
    }
    if (column * kUnits % 8 == 0)
      require(differ([=](int i) { return copied_unit<kParts>(column + i / kUnits, i % kUnits); }), "banks of copies");
    for (int part = 0; part < kParts; ++part)
      require(differ([=](int i) { return copied_unit<kParts>(column + i / 2 * 2, i % 2 * kParts + part); }),
              "banks where copies are read");
  }
}

int tensor_plan_case(const Options&) {
  check_copied_units<1>();
  check_copied_units<2>();
  const Chip chips[] = {chip_of_architecture(80),  chip_of_architecture(86),  chip_of_architecture(90),
                        chip_of_architecture(100), chip_of_architecture(120), {1, 163 * 1024, 164 * 1024}};
  std::mt19937 random(2);
  const auto one_of = [&](std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; };
  int checked = 0;
  for (int i = 0; i < 20000; ++i) {
    const Chip& chip = chips[i % 6];
    const int64_t samples = one_of({1, 2, 3, 5, 8, 9, 17, 64, 128, 1 << 20, int64_t{1} << 33});
    const int64_t channels = one_of({8, 16, 24, 96, 104, 768, 2816, 1 << 24});
    const int height =
        static_cast<int>(one_of({1, 2, 3, 7, 8, 9, 12, 13, 14, 16, 28, 33, 48, 56, 57, 65, 224, 1 << 24}));
    const int width =
        static_cast<int>(one_of({1, 2, 6, 7, 8, 9, 14, 16, 17, 28, 32, 33, 48, 56, 57, 96, 224, 1 << 24}));
    if (std::log2(samples) + std::log2(channels) + std::log2(height) + std::log2(width) > 40) continue;  // no memory
    const Images shape{samples, height, width, static_cast<int>(channels)};
    check_tensor_plan(Kind::kConvolution, shape, 2, chip);
    check_tensor_plan(Kind::kConvolution, shape, 4, chip);
    check_tensor_plan(Kind::kConvolution, shape, 2, chip, 4);
    check_tensor_plan(Kind::kWeightGradient, shape, 2, chip);
    ++checked;
  }
  require(checked > 10000, "too few shapes");
  require(plan_tensor(Kind::kConvolution, 0, 8, 7, 7, 2, chips[0]).row_blocks == 0, "a launch for no samples");
  // The choice: every stage of a ConvNeXt on chips with HBM, none on the others; and not where most would be in vain.
  for (const int architecture : {80, 86, 89, 90, 100, 120}) {
    const Chip chip = chip_of_architecture(architecture);
    const bool has_hbm = architecture == 80 || architecture == 90 || architecture == 100;
    const auto prefers = [&](Kind kind, int64_t samples, int size, int staged_bytes) {
      return prefers_tensor(kind, plan_tensor(kind, samples, 96, size, size, staged_bytes, chip), size, size, chip);
    };
    for (const int size : {56, 28, 14, 7}) {
      require(prefers(Kind::kConvolution, 128, size, 2) == has_hbm, "the version of a stage");
      require(prefers(Kind::kConvolution, 128, size, 4) == has_hbm, "the version of a stage with a residual");
      require(prefers(Kind::kWeightGradient, 128, size, 2) == has_hbm, "the version of a stage's weights");
    }
    for (const int size : {96, 48, 24, 12})
      require(prefers(Kind::kConvolution, 128, size, 2) == has_hbm, "the version of a stage at 384 pixels");
    require(!prefers(Kind::kConvolution, 1, 1, 2), "a single pixel");
  }
  return 0;
}

int plan_case(const Options&) {
  // Multiprocessors, and shared memory of a block and of a multiprocessor, of sm_80, 86, 90 and 120, and very small
  // ones.
  const Chip chips[] = {{108, 163 * 1024, 164 * 1024}, {84, 99 * 1024, 100 * 1024}, {132, 227 * 1024, 228 * 1024},
                        {188, 99 * 1024, 100 * 1024},  {1, 48 * 1024, 64 * 1024},   {3, 40 * 1024, 41 * 1024}};
  std::mt19937 random(1);
  const auto one_of = [&](std::initializer_list<int64_t> values) { return values.begin()[random() % values.size()]; };
  int checked = 0;
  for (int i = 0; i < 20000; ++i) {
    const Chip& chip = chips[i % 6];
    // Now and then more elements than 32 bits count.
    const int64_t samples = one_of({1, 2, 3, 5, 8, 9, 17, 64, 128, 1 << 20, int64_t{1} << 33});
    const int64_t channels = one_of({1, 3, 32, 40, 96, 100, 768, 2816, 1 << 24});
    const int height = static_cast<int>(one_of({1, 2, 3, 6, 7, 8, 13, 14, 28, 56, 57, 224, 1 << 24}));
    const int width = static_cast<int>(one_of({1, 2, 6, 7, 8, 9, 14, 28, 29, 56, 57, 96, 224, 1 << 24}));
    const int64_t bytes = one_of({2, 4});
    if (std::log2(samples) + std::log2(channels) + std::log2(height) + std::log2(width) > 50) continue;  // no memory
    check_tile_plan<Kind::kConvolution>(samples, channels, height, width, bytes, chip);
    check_tile_plan<Kind::kWeightGradient>(samples, channels, height, width, bytes, chip);
    const SimplePlan simple = plan_simple(samples, channels, height, chip);
    ++checked;
    require(simple.row_blocks >= 1 && simple.row_blocks <= std::min<int64_t>(simple.rows, 65535), "the simple grid");
    require(simple.first_row(0) == 0 && simple.first_row(simple.row_blocks) == samples * height, "simple blocks");
    const int64_t last = simple.first_row(simple.row_blocks - 1);
    require(last < simple.rows && simple.rows - last <= simple.block_rows, "the last simple block");
    require(simple.chunks * kChunk >= channels, "simple channels");
  }
  require(checked > 10000, "too few shapes");
  require(plan_tiles(Kind::kConvolution, 0, 8, 7, 7, 2, chips[0]).row_blocks == 0, "a launch for no samples");
  require(plan_simple(0, 8, 7, chips[0]).row_blocks == 0, "a simple launch for no samples");
  return 0;
}

template <class Function>
int with_element(const Options& options, Function&& function) {
#ifdef ONLY_TYPE  // mutants are compiled for one type, to save time
  (void)options;
  return function(ONLY_TYPE{});
#else
  return harness::with_type(options.text("type"), function);
#endif
}

int convolution(const Options& options) {
  return with_element(options, [&](auto element) {
    using T = decltype(element);
    if (options.text("result") == options.text("type")) return convolution_case<T, T>(options);
#ifndef ONLY_TYPE
    if constexpr (!std::is_same_v<T, double>) {
      if (options.text("result") == "float") return convolution_case<T, float>(options);
      if (options.text("result") == "half") return convolution_case<T, __half>(options);
      if (options.text("result") == "bfloat16") return convolution_case<T, __nv_bfloat16>(options);
    }
#endif
    throw std::runtime_error("no such pair of types");
  });
}

int rounding_convolution(const Options& options) {
  return with_element(options, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 2) return rounding_convolution_case<T>(options);
    throw std::runtime_error("only 16-bit types are rounded to");
    return 1;
  });
}

int weight_gradient(const Options& options) {
  return with_element(options, [&](auto element) { return weight_gradient_case<decltype(element)>(options); });
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main_of(argc, argv,
                          {{"convolution", convolution},
                           {"rounding_convolution", rounding_convolution},
                           {"weight_gradient", weight_gradient},
                           {"plan", plan_case},
                           {"tensor_plan", tensor_plan_case}});
}
