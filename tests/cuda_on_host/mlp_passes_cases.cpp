// The passes of layer_norm_mlp around its matrix products, against plain loops in double; and the plans' promises.
#include "gelu_in_double.h"
#include "mlp/chunk_plan.h"
#include "mlp/kernels_branch.cuh"
#include "mlp/kernels_grn.cuh"
#include "mlp/kernels_hidden.cuh"
#include "mlp/kernels_weights.cuh"
#include "parameter.h"

namespace {

using namespace convnext_kernels;
using harness::Options;
using harness::Outcome;
using harness::TestParameter;

template <class A>
constexpr double kUnit = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;

// A chunk of rows. Options: samples, sample_rows (of one); first: rows of the first sample before the chunk; columns;
// drop: every third sample from this one on, whose rows hold NaN (-1: there is no drop path); offset: elements by which
// the tensors miss 16-byte alignment; multiprocessors of the chip.
struct Rows {
  explicit Rows(const Options& options)
      : samples(options.number("samples")),
        sample_rows(options.number("sample_rows")),
        first(options.number("first")),
        columns(options.number("columns")),
        drop(options.number("drop")),
        offset(options.number("offset")),
        multiprocessors(static_cast<int>(options.number("multiprocessors"))),
        count(std::max<int64_t>(samples * sample_rows - first, 0)) {}

  size_t elements() const { return static_cast<size_t>(count * columns); }
  size_t memory() const { return elements() + static_cast<size_t>(offset); }
  double scale_of(int64_t sample) const {
    if (drop < 0) return 1;
    return sample % 3 == drop % 3 ? 0 : 1.25 + static_cast<double>(sample % 2);
  }
  double scale(size_t element) const {
    return scale_of((static_cast<int64_t>(element) / columns + first) / sample_rows);
  }
  template <class T>
  void fill(emu::Buffer<T>& buffer, unsigned seed, double size) const {
    harness::fill_normal(buffer, seed, size);
    for (size_t i = 0; i < elements(); ++i)
      if (scale(i) == 0) buffer[i + offset] = harness::from_double<T>(std::nan(""));
  }

  int64_t samples, sample_rows, first, columns, drop, offset;
  int multiprocessors;
  int64_t count;
};

// The drop-path vector as the kernels get it.
template <class A>
class Scales {
 public:
  explicit Scales(const Rows& rows) : rows_(rows), scale_(static_cast<size_t>(rows.samples), "sample_scale") {
    for (size_t i = 0; i < scale_.size(); ++i) scale_[i] = static_cast<A>(rows.scale_of(static_cast<int64_t>(i)));
  }
  SampleRows<A> rows() {
    return sample_rows<A>(rows_.drop < 0 ? nullptr : scale_.data(), rows_.first, rows_.sample_rows);
  }

 private:
  const Rows& rows_;
  emu::Buffer<A> scale_;
};

// --- hidden rows

template <class T>
RowPassPlan plan_hidden(RowPass pass, const Rows& rows, bool grn) {
  const int size = row_pass_vector_size(rows.columns, sizeof(T), rows.offset == 0);
  return plan_row_pass(row_pass_tuning(pass, grn, sizeof(T)), grn ? rows.samples : 1,
                       grn ? rows.sample_rows : rows.count, rows.columns, size, rows.multiprocessors);
}

GroupedRows grouped(const Rows& rows, bool grn) {
  return {grn ? rows.samples : 1, grn ? rows.sample_rows : rows.count, rows.columns};
}

// Factors and feedback of every image, which the kernels have from an earlier pass.
template <class A>
struct TestGrn {
  TestGrn(const Options& options, const Rows& rows)
      : given(options.number("grn") != 0),
        columns(rows.columns),
        image_elements(static_cast<size_t>(rows.sample_rows * rows.columns)),
        factors(given ? static_cast<size_t>(rows.samples * rows.columns) : 0, "factors"),
        feedback(factors.size(), "feedback"),
        bias(given ? options.text("bias") : "none", static_cast<size_t>(rows.columns), 5, "grn_bias") {
    harness::fill_normal(factors, 6, 1.0);
    harness::fill_normal(feedback, 7, 1.0);
  }
  GrnImage<A> image() {
    if (!given) return {};
    return {factors.data(), feedback.data(), bias.parameter()};
  }
  size_t at(size_t element) const { return element / image_elements * columns + element % columns; }
  double factor(size_t element) { return given ? factors[at(element)] : 1.0; }
  double fed_back(size_t element) { return given ? feedback[at(element)] : 0.0; }
  double shift(size_t element) const { return given ? bias[element % columns] : 0.0; }

  bool given;
  size_t columns, image_elements;
  emu::Buffer<A> factors, feedback;
  TestParameter bias;
};

// Also: type, gelu, grn, bias (its type), in_place, dropped: zeros are written over dropped rows of x.
template <class T>
int activation_case(const Options& options) {
  using A = Accumulation<T>;
  const Rows rows(options);
  const Gelu kind = gelu_kind(options);
  const bool in_place = options.number("in_place") != 0, dropped = options.number("dropped") != 0;
  emu::Buffer<T> given(rows.memory(), "x");
  rows.fill(given, 1, 2.0);
  Scales<A> scales(rows);
  TestGrn<A> grn(options, rows);
  return harness::run_schedules([&] {
    emu::Buffer<T> x(rows.memory(), "x"), y(in_place ? 0 : rows.memory(), "y");
    for (size_t i = 0; i < x.size(); ++i) x[i] = given[i];
    emu::Buffer<T>& result = in_place ? x : y;
    ActivationParams<T> params{};
    params.x = x.data() + rows.offset;
    params.y = result.data() + rows.offset;
    params.dropped = dropped ? x.data() + rows.offset : nullptr;
    params.grn = grn.image();
    params.samples = scales.rows();
    params.rows = grouped(rows, grn.given);
    launch_activation("test", plan_hidden<T>(RowPass::kActivation, rows, grn.given), params, kind, nullptr);
    Outcome outcome;
    for (size_t i = 0; i < rows.elements(); ++i) {
      const double input = harness::to_double(given[i + rows.offset]),
                   got = harness::to_double(result[i + rows.offset]);
      if (rows.scale(i) == 0) {
        outcome.check("y", i, got, 0, 0);
        if (dropped) outcome.check("x", i, harness::to_double(x[i + rows.offset]), 0, 0);
        continue;
      }
      const double g = gelu_in_double(input, kind), expected = g * grn.factor(i) + grn.shift(i);
      const double size = std::fabs(g * grn.factor(i)) + std::fabs(grn.shift(i));
      outcome.check("y", i, got, expected,
                    harness::half_ulp<T>(expected) + forward_error<T>(std::fabs(input), g) * std::fabs(grn.factor(i)) +
                        4 * kUnit<A> * size);
      if (!in_place) outcome.check("x", i, harness::to_double(x[i + rows.offset]), input, 0);
    }
    outcome.keep(result);
    return outcome;
  });
}

// Also: type, gelu, backward.
template <class T>
int grn_sums_case(const Options& options) {
  using A = Accumulation<T>;
  const Rows rows(options);
  const Gelu kind = gelu_kind(options);
  const bool backward = options.number("backward") != 0;
  emu::Buffer<T> x(rows.memory(), "x"), grad(backward ? rows.memory() : 0, "grad");
  rows.fill(x, 1, 2.0);
  if (backward) rows.fill(grad, 2, 1.0);
  Scales<A> scales(rows);
  return harness::run_schedules([&] {
    const RowPassPlan plan = plan_hidden<T>(backward ? RowPass::kGrnBackwardSums : RowPass::kGrnSums, rows, true);
    const size_t partials = static_cast<size_t>(rows.samples * plan.row_blocks * rows.columns);
    emu::Buffer<A> squares(partials, "squares"), products(backward ? partials : 0, "products"),
        grads(products.size(), "grads");
    GrnSumsParams<T> params{};
    params.x = x.data() + rows.offset;
    params.grad = backward ? grad.data() + rows.offset : nullptr;
    params.squares = squares.data();
    params.products = products.data();
    params.grads = grads.data();
    params.samples = scales.rows();
    params.rows = grouped(rows, true);
    launch_grn_sums("test", plan, params, kind, nullptr);
    Outcome outcome;
    const size_t sums = static_cast<size_t>(rows.samples * rows.columns);
    std::vector<double> expected[3], allowed[3];
    for (int i = 0; i < 3; ++i) {
      expected[i].resize(sums);
      allowed[i].resize(sums);
    }
    for (size_t i = 0; i < rows.elements(); ++i) {
      if (rows.scale(i) == 0) continue;
      const size_t at = i / static_cast<size_t>(rows.sample_rows * rows.columns) * rows.columns + i % rows.columns;
      const double input = harness::to_double(x[i + rows.offset]), g = gelu_in_double(input, kind);
      const double d = backward ? harness::to_double(grad[i + rows.offset]) : 0;
      const double error = forward_error<T>(std::fabs(input), g), rounding = 40 * kUnit<A>;
      expected[0][at] += g * g;
      allowed[0][at] += (2 * std::fabs(g) + error) * error + rounding * g * g;
      expected[1][at] += d * g;
      allowed[1][at] += std::fabs(d) * error + rounding * std::fabs(d * g);
      expected[2][at] += d;
      allowed[2][at] += rounding * std::fabs(d);
    }
    const char* names[] = {"squares", "products", "grads"};
    emu::Buffer<A>* got[] = {&squares, &products, &grads};
    for (int i = 0; i < (backward ? 3 : 1); ++i) {
      for (size_t sum = 0; sum < sums; ++sum) {
        double total = 0;
        for (int part = 0; part < plan.row_blocks; ++part)
          total += (*got[i])[(sum / rows.columns * plan.row_blocks + part) * rows.columns + sum % rows.columns];
        outcome.check(names[i], sum, total, expected[i][sum], allowed[i][sum]);
      }
      outcome.keep(*got[i]);
    }
    return outcome;
  });
}

// Options: type (an accumulation type), images, parts, columns, weight (its type), backward. Column 0 of every image
// and the whole of image 1 are 0.
template <class A>
int grn_factors_case(const Options& options) {
  const int64_t images = options.number("images"), columns = options.number("columns");
  const int parts = static_cast<int>(options.number("parts"));
  const bool backward = options.number("backward") != 0;
  const size_t count = static_cast<size_t>(images * parts * columns), results = static_cast<size_t>(images * columns);
  emu::Buffer<A> squares(count, "squares"), products(backward ? count : 0, "products");
  harness::fill_normal(squares, 1, 3.0);
  harness::fill_normal(products, 2, 2.0);
  for (size_t i = 0; i < count; ++i) {
    const bool zero = i % columns == 0 || i / (parts * columns) == 1;
    squares[i] = zero ? 0 : squares[i] * squares[i];
    if (backward && zero) products[i] = 0;
  }
  const TestParameter weight(options.text("weight"), static_cast<size_t>(columns), 3, "weight");
  return harness::run_schedules([&] {
    emu::Buffer<A> factors(results, "factors"), feedback(backward ? results : 0, "feedback"),
        weight_partials(feedback.size(), "weight_partials");
    GrnFactorsParams<A> params{};
    params.squares = squares.data();
    params.products = backward ? products.data() : nullptr;
    params.weight = weight.parameter();
    params.factors = factors.data();
    params.feedback = feedback.data();
    params.weight_partials = weight_partials.data();
    params.parts = parts;
    params.columns = columns;
    launch_grn_factors("test", params, images, nullptr);
    Outcome outcome;
    const double unit = 100 * kUnit<A>;
    for (int64_t image = 0; image < images; ++image) {
      std::vector<double> norm(columns), product(columns), product_size(columns);
      double mean = kGrnEps, shared = 0, shared_size = 0;
      for (int64_t k = 0; k < columns; ++k) {
        for (int part = 0; part < parts; ++part) {
          const size_t i = static_cast<size_t>((image * parts + part) * columns + k);
          norm[k] += squares[i];
          if (backward) product[k] += products[i];
          if (backward) product_size[k] += std::fabs(products[i]);
        }
        norm[k] = std::sqrt(norm[k]);
        mean += norm[k] / static_cast<double>(columns);
        shared += weight[k] * product[k] * norm[k] / static_cast<double>(columns);
        shared_size += std::fabs(weight[k]) * product_size[k] * norm[k] / static_cast<double>(columns);
      }
      for (int64_t k = 0; k < columns; ++k) {
        const size_t i = static_cast<size_t>(image * columns + k);
        const double response = norm[k] / mean;
        outcome.check("factors", i, factors[i], 1 + weight[k] * response, unit * (1 + std::fabs(weight[k]) * response));
        if (!backward) continue;
        const double size = norm[k] == 0 ? 0 : 1 / mean / norm[k];
        outcome.check("feedback", i, feedback[i], (weight[k] * product[k] - shared / mean) * size,
                      unit * (std::fabs(weight[k]) * product_size[k] + shared_size / mean) * size);
        outcome.check("weight_partials", i, weight_partials[i], product[k] * response,
                      unit * product_size[k] * response);
      }
    }
    outcome.keep(factors);
    outcome.keep(feedback);
    outcome.keep(weight_partials);
    return outcome;
  });
}

// Also: type, gelu, grn, bias, in_place, wants_y, partials.
template <class T>
int activation_backward_case(const Options& options) {
  using A = Accumulation<T>;
  const Rows rows(options);
  const Gelu kind = gelu_kind(options);
  const bool in_place = options.number("in_place") != 0, wants_y = options.number("wants_y") != 0;
  const bool wants_sums = options.number("partials") != 0;
  emu::Buffer<T> given(rows.memory(), "x"), given_grad(rows.memory(), "grad");
  rows.fill(given, 1, 2.0);
  rows.fill(given_grad, 2, 1.0);
  Scales<A> scales(rows);
  TestGrn<A> grn(options, rows);
  return harness::run_schedules([&] {
    const RowPassPlan plan = plan_hidden<T>(RowPass::kActivationBackward, rows, grn.given);
    emu::Buffer<T> x(rows.memory(), "x"), grad(rows.memory(), "grad");
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = given[i];
      grad[i] = given_grad[i];
    }
    emu::Buffer<T> other_y(in_place ? 0 : rows.memory(), "y"), other_grad(in_place ? 0 : rows.memory(), "grad_x");
    emu::Buffer<T>&y = in_place ? x : other_y, &grad_x = in_place ? grad : other_grad;
    const int64_t parts = (grn.given ? rows.samples : 1) * plan.row_blocks;
    emu::Buffer<A> partials(wants_sums ? static_cast<size_t>(parts * rows.columns) : 0, "partials");
    ActivationBackwardParams<T> params{};
    params.grad = grad.data() + rows.offset;
    params.x = x.data() + rows.offset;
    params.y = wants_y ? y.data() + rows.offset : nullptr;
    params.grad_x = grad_x.data() + rows.offset;
    params.partials = wants_sums ? partials.data() : nullptr;
    params.grn = grn.image();
    params.samples = scales.rows();
    params.rows = grouped(rows, grn.given);
    launch_activation_backward("test", plan, params, kind, nullptr);
    Outcome outcome;
    std::vector<double> sum(rows.columns), allowed(rows.columns);
    for (size_t i = 0; i < rows.elements(); ++i) {
      const double got = harness::to_double(grad_x[i + rows.offset]);
      if (rows.scale(i) == 0) {
        outcome.check("grad_x", i, got, 0, 0);
        if (wants_y) outcome.check("y", i, harness::to_double(y[i + rows.offset]), 0, 0);
        continue;
      }
      const double input = harness::to_double(given[i + rows.offset]);
      const double d = harness::to_double(given_grad[i + rows.offset]);
      const double g = gelu_in_double(input, kind), slope = gelu_derivative_in_double(input, kind);
      const double error = forward_error<T>(std::fabs(input), g);
      const double inner = d * grn.factor(i) + g * grn.fed_back(i);
      const double inner_size = std::fabs(d * grn.factor(i)) + std::fabs(g * grn.fed_back(i));
      const double expected = inner * slope;
      const double tolerance = derivative_error<T>(std::fabs(input)) * std::fabs(inner) +
                               (error * std::fabs(grn.fed_back(i)) + 4 * kUnit<A> * inner_size) * std::fabs(slope);
      outcome.check("grad_x", i, got, expected, harness::half_ulp<T>(expected) + tolerance);
      // The sums are of the values as they were rounded.
      sum[i % rows.columns] += got;
      allowed[i % rows.columns] += 40 * kUnit<A> * std::fabs(got);
      if (!wants_y) continue;
      const double y_expected = g * grn.factor(i) + grn.shift(i);
      outcome.check("y", i, harness::to_double(y[i + rows.offset]), y_expected,
                    harness::half_ulp<T>(y_expected) + error * std::fabs(grn.factor(i)) +
                        4 * kUnit<A> * (std::fabs(g * grn.factor(i)) + std::fabs(grn.shift(i))));
    }
    for (int64_t c = 0; c < (wants_sums && plan.row_blocks ? rows.columns : 0); ++c) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) total += partials[static_cast<size_t>(part * rows.columns + c)];
      outcome.check("partials", static_cast<size_t>(c), total, sum[c], allowed[c]);
    }
    outcome.keep(grad_x);
    if (wants_y) outcome.keep(y);
    outcome.keep(partials);
    return outcome;
  });
}

// --- rows of channels

// A tensor of any type.
class TestTensor {
 public:
  TestTensor(const std::string& type, const Rows& rows, unsigned seed, const char* name, bool nan_where_dropped)
      : rows_(rows) {
    const std::map<std::string, ElementType> types = {{"float", ElementType::kFloat},
                                                      {"double", ElementType::kDouble},
                                                      {"half", ElementType::kHalf},
                                                      {"bfloat16", ElementType::kBFloat16}};
    if (type == "none") return;
    harness::with_type(type, [&](auto element) {
      using R = decltype(element);
      memory_ = std::make_unique<emu::Buffer<unsigned char>>(rows.memory() * sizeof(R), name);
      std::mt19937 random(seed);
      std::normal_distribution<double> normal;
      for (size_t i = 0; i < rows.elements(); ++i) {
        const double value = normal(random);
        at<R>(i) = harness::from_double<R>(nan_where_dropped && rows.scale(i) == 0 ? std::nan("") : value);
      }
      read_ = [this](size_t i) { return harness::to_double(at<R>(i)); };
      half_ulp_ = [](double value) { return harness::half_ulp<R>(value); };
      parameter_ = {&at<R>(0), types.at(type)};
    });
  }
  TestTensor(const TestTensor&) = delete;
  Parameter parameter() const { return parameter_; }
  double operator[](size_t i) const { return read_(i); }
  double half_ulp(double value) const { return half_ulp_(value); }
  bool given() const { return parameter_.data != nullptr; }
  emu::Buffer<unsigned char>& memory() { return *memory_; }

 private:
  template <class R>
  R& at(size_t i) {
    return reinterpret_cast<R*>(memory_->data())[i + rows_.offset];
  }
  const Rows& rows_;
  std::unique_ptr<emu::Buffer<unsigned char>> memory_;
  std::function<double(size_t)> read_;
  std::function<double(double)> half_ulp_;
  Parameter parameter_;
};

template <class T>
RowPassPlan plan_channels(RowPass pass, bool heavy, const Rows& rows, bool typed) {
  const int size = row_pass_vector_size(rows.columns, sizeof(T), typed && rows.offset == 0);
  return plan_row_pass(row_pass_tuning(pass, heavy, sizeof(T)), 1, rows.count, rows.columns, size,
                       rows.multiprocessors);
}

// Also: type, residual, y (types), layer_scale (its type), expect: whether there is a kernel for these types.
template <class T>
int add_branch_case(const Options& options) {
  using A = Accumulation<T>;
  const Rows rows(options);
  emu::Buffer<T> branch(rows.memory(), "branch");
  rows.fill(branch, 1, 1.0);
  const TestTensor residual(options.text("residual"), rows, 2, "residual", false);
  const TestParameter layer_scale(options.text("layer_scale"), static_cast<size_t>(rows.columns), 3, "layer_scale", 1);
  Scales<A> scales(rows);
  return harness::run_schedules([&] {
    TestTensor y(options.text("y"), rows, 4, "y", false);
    AddBranchParams<T> params{};
    params.branch = branch.data() + rows.offset;
    params.residual = residual.parameter();
    params.layer_scale = layer_scale.parameter();
    params.y = const_cast<void*>(y.parameter().data);
    params.y_type = y.parameter().type;
    params.samples = scales.rows();
    params.rows = rows.count;
    params.channels = rows.columns;
    const ElementType residual_type = residual.given() ? params.residual.type : params.y_type;
    const bool typed = has_typed_add_branch<T>(residual_type, params.y_type);
    if (typed != (options.number("expect") != 0)) throw std::runtime_error("not the kernel that was expected");
    launch_add_branch("test",
                      plan_channels<T>(RowPass::kAddBranch, y.half_ulp(1) < harness::half_ulp<T>(1), rows, typed),
                      params, nullptr);
    Outcome outcome;
    for (size_t i = 0; i < rows.elements(); ++i) {
      const double rest = residual.given() ? residual[i] : 0;
      const double scaled = rows.scale(i) == 0 ? 0
                                               : harness::to_double(branch[i + rows.offset]) * rows.scale(i) *
                                                     layer_scale[i % static_cast<size_t>(rows.columns)];
      const double error = rows.scale(i) == 0 ? 0 : 4 * kUnit<A> * (std::fabs(scaled) + std::fabs(rest));
      outcome.check("y", i, y[i], rest + scaled, y.half_ulp(rest + scaled) + error);
    }
    outcome.keep(y.memory());
    return outcome;
  });
}

// Also: type, grad (its type), layer_scale, scaled, unscaled, partials (wanted or not).
template <class T>
int branch_grad_case(const Options& options) {
  using A = Accumulation<T>;
  const Rows rows(options);
  const bool wants_scaled = options.number("scaled") != 0, wants_unscaled = options.number("unscaled") != 0;
  const bool wants_sums = options.number("partials") != 0;
  const TestTensor grad(options.text("grad"), rows, 1, "grad", true);
  const TestParameter layer_scale(options.text("layer_scale"), static_cast<size_t>(rows.columns), 3, "layer_scale", 1);
  Scales<A> scales(rows);
  return harness::run_schedules([&] {
    const RowPassPlan plan =
        plan_channels<T>(RowPass::kBranchGrad, false, rows, has_typed_branch_grad<T>(grad.parameter().type));
    emu::Buffer<T> scaled(wants_scaled ? rows.memory() : 0, "scaled"),
        unscaled(wants_unscaled ? rows.memory() : 0, "unscaled");
    emu::Buffer<A> partials(wants_sums ? static_cast<size_t>(plan.row_blocks * rows.columns) : 0, "partials");
    BranchGradParams<T> params{};
    params.grad = grad.parameter();
    params.layer_scale = layer_scale.parameter();
    params.scaled = wants_scaled ? scaled.data() + rows.offset : nullptr;
    params.unscaled = wants_unscaled ? unscaled.data() + rows.offset : nullptr;
    params.partials = wants_sums ? partials.data() : nullptr;
    params.samples = scales.rows();
    params.rows = rows.count;
    params.channels = rows.columns;
    launch_branch_grad("test", plan, params, nullptr);
    Outcome outcome;
    std::vector<double> sum(rows.columns), allowed(rows.columns);
    for (size_t i = 0; i < rows.elements(); ++i) {
      const bool live = rows.scale(i) != 0;
      const double plain = live ? grad[i] * rows.scale(i) : 0;
      const double with_layer = live ? plain * layer_scale[i % static_cast<size_t>(rows.columns)] : 0;
      const auto check = [&](const char* name, emu::Buffer<T>& buffer, double expected) {
        const double got = harness::to_double(buffer[i + rows.offset]);
        const double error = live ? harness::half_ulp<T>(expected) + 3 * kUnit<A> * std::fabs(expected) : 0;
        outcome.check(name, i, got, expected, error);
        return got;
      };
      double counted = 0;
      if (wants_scaled) counted = check("scaled", scaled, with_layer);
      if (wants_unscaled) counted = check("unscaled", unscaled, plain);
      sum[i % rows.columns] += counted;
      allowed[i % rows.columns] += 40 * kUnit<A> * std::fabs(counted);
    }
    for (int64_t c = 0; c < (wants_sums && plan.row_blocks ? rows.columns : 0); ++c) {
      double total = 0;
      for (int64_t part = 0; part < plan.row_blocks; ++part)
        total += partials[static_cast<size_t>(part * rows.columns + c)];
      outcome.check("partials", static_cast<size_t>(c), total, sum[c], allowed[c]);
    }
    outcome.keep(scaled);
    outcome.keep(unscaled);
    outcome.keep(partials);
    return outcome;
  });
}

// --- gradients of weights

// Options: type, channels, hidden, bias, layer_scale (types), weight, grad_bias (wanted or not), offset; sums,
// grad_sums, grad_scale: given or not.
template <class T>
int layer_scale_case(const Options& options) {
  using A = Accumulation<T>;
  const int64_t channels = options.number("channels"), hidden = options.number("hidden");
  const size_t offset = static_cast<size_t>(options.number("offset")), count = static_cast<size_t>(channels * hidden);
  const bool wants_weight = options.number("weight") != 0, wants_bias = options.number("grad_bias") != 0;
  const bool has_sums = options.number("sums") != 0, has_grads = options.number("grad_sums") != 0;
  const bool wants_scale = options.number("grad_scale") != 0;
  emu::Buffer<T> weight(count + offset, "weight");
  emu::Buffer<A> given_sums(count, "sums"), given_grads(static_cast<size_t>(channels), "grad_sums");
  harness::fill_normal(weight, 1, 1.0);
  harness::fill_normal(given_sums, 2, 1.0);
  harness::fill_normal(given_grads, 3, 1.0);
  const TestParameter bias(options.text("bias"), static_cast<size_t>(channels), 4, "bias", 0);
  const TestParameter layer_scale(options.text("layer_scale"), static_cast<size_t>(channels), 5, "layer_scale", 1);
  return harness::run_schedules([&] {
    emu::Buffer<A> sums(count, "sums"), grads(static_cast<size_t>(channels), "grad_sums"),
        grad_scale(static_cast<size_t>(wants_scale ? channels : 0), "grad_scale");
    for (size_t i = 0; i < count; ++i) sums[i] = given_sums[i];
    for (size_t i = 0; i < grads.size(); ++i) grads[i] = given_grads[i];
    LayerScaleParams<T> params{};
    params.weight = weight.data() + offset;
    params.bias = bias.parameter();
    params.layer_scale = layer_scale.parameter();
    params.sums = has_sums ? sums.data() : nullptr;
    params.grad_sums = has_grads ? grads.data() : nullptr;
    params.grad_scale = wants_scale ? grad_scale.data() : nullptr;
    params.wants_weight = wants_weight;
    params.wants_bias = wants_bias;
    params.hidden = hidden;
    launch_layer_scale("test", params, channels, offset == 0, nullptr);
    Outcome outcome;
    for (size_t j = 0; j < grads.size(); ++j) {
      double dot = has_grads ? bias[j] * given_grads[j] : 0, size = std::fabs(dot);
      for (int64_t k = 0; k < hidden; ++k) {
        const size_t i = j * static_cast<size_t>(hidden) + static_cast<size_t>(k);
        const double term = has_sums ? harness::to_double(weight[i + offset]) * given_sums[i] : 0;
        dot += term;
        size += std::fabs(term);
        const double scale = wants_weight && has_sums ? layer_scale[j] : 1;
        outcome.check("sums", i, sums[i], scale * given_sums[i], 3 * kUnit<A> * std::fabs(scale * given_sums[i]));
      }
      if (wants_scale) outcome.check("grad_scale", j, grad_scale[j], dot, 40 * kUnit<A> * size);
      const double scale = wants_bias && has_grads ? layer_scale[j] : 1;
      outcome.check("grad_sums", j, grads[j], scale * given_grads[j], 3 * kUnit<A> * std::fabs(scale * given_grads[j]));
    }
    outcome.keep(sums);
    outcome.keep(grad_scale);
    outcome.keep(grads);
    return outcome;
  });
}

// Options: type (an accumulation type), count, multiprocessors.
template <class A>
int accumulate_case(const Options& options) {
  const size_t count = static_cast<size_t>(options.number("count"));
  emu::Buffer<A> x(count, "x"), given(count, "sum");
  harness::fill_normal(x, 1, 1.0);
  harness::fill_normal(given, 2, 1.0);
  return harness::run_schedules([&] {
    emu::Buffer<A> sum(count, "sum");
    for (size_t i = 0; i < count; ++i) sum[i] = given[i];
    launch_accumulate("test", static_cast<const A*>(x.data()), sum.data(), static_cast<int64_t>(count),
                      static_cast<int>(options.number("multiprocessors")), nullptr);
    Outcome outcome;
    for (size_t i = 0; i < count; ++i) outcome.check("sum", i, sum[i], static_cast<A>(given[i] + x[i]), 0);
    outcome.keep(sum);
    return outcome;
  });
}

// --- plans

class Sizes {
 public:
  // A size of any magnitude up to 2^bits.
  int64_t operator()(int bits) {
    const int some = static_cast<int>(random_() % static_cast<uint64_t>(bits)) + 1;
    return static_cast<int64_t>(random_() >> (64 - some)) + 1;
  }

 private:
  std::mt19937_64 random_{1};
};

int wrong_plan(const char* what, std::initializer_list<int64_t> numbers) {
  std::printf("%s:", what);
  for (int64_t number : numbers) std::printf(" %lld", static_cast<long long>(number));
  std::printf("\n");
  return 1;
}

// Every row in one part of its group and in one chunk; limits kept; a row's sample found as by division.
int passes_plan_case(const Options&) {
  Sizes size;
  for (int i = 0; i < 50000; ++i) {
    const auto pass = static_cast<RowPass>(i % 6);
    const size_t bytes = i % 3 ? (i % 3 == 1 ? 2 : 4) : 8;
    const int64_t groups = size(14), rows = size(22), columns = i % 2 ? 8 * size(14) : size(13);
    const int multiprocessors = static_cast<int>(size(8));
    const RowPassTuning tuning = row_pass_tuning(pass, i % 5 == 0, bytes);
    const int vector_size = row_pass_vector_size(columns, bytes, i % 7 != 0);
    const RowPassPlan plan = plan_row_pass(tuning, groups, rows, columns, vector_size, multiprocessors);
    const int64_t width = static_cast<int64_t>(plan.block_columns) * plan.vector_size;
    const int64_t sums = width * plan.block_rows * (pass == RowPass::kGrnBackwardSums ? 3 : 1) * (bytes == 8 ? 8 : 4);
    const bool right = plan.vector_size == vector_size && columns % vector_size == 0 &&
                       plan.block_columns * plan.block_rows <= kRowPassThreads &&
                       width * plan.column_blocks >= columns && width * (plan.column_blocks - 1) < columns &&
                       plan.row_blocks >= 1 &&
                       int64_t{plan.row_blocks - 1} * plan.block_rows * tuning.thread_rows < rows && sums <= 48 * 1024;
    if (!right) return wrong_plan("row pass", {i % 6, groups, rows, columns, multiprocessors, plan.row_blocks});
  }
  for (const auto& [groups, rows] : {std::pair<int64_t, int64_t>{0, 8}, {8, 0}})
    if (plan_row_pass(row_pass_tuning(RowPass::kAddBranch, false, 2), groups, rows, 8, 8, 1).row_blocks != 0) return 1;
  for (int i = 0; i < 50000; ++i) {
    const bool grn = i % 2;
    const int64_t unit = grn ? size(20) : 1, units = size(grn ? 16 : 36), rows = unit * units;
    const MlpWorkspace workspace{size(16), grn ? size(20) : 0, i % 3 ? size(26) : size(32)};
    const int64_t most = int64_t{1} << 30, chunk = mlp_cuda_chunk_rows(rows, unit, workspace, kMaxWorkspaceBytes, most);
    const int64_t bytes = workspace.call_bytes + chunk * workspace.row_bytes + chunk / unit * workspace.image_bytes;
    const bool bounded = bytes <= kMaxWorkspaceBytes || chunk == unit || (!grn && chunk <= 1024);
    if (chunk < 1 || chunk % unit != 0 || chunk > most || !bounded || (chunk > rows && chunk > unit))
      return wrong_plan("chunk", {rows, unit, workspace.row_bytes, workspace.image_bytes, workspace.call_bytes, chunk});
    // A chunk of twice the size would be too large.
    const bool full = 2 * bytes - workspace.call_bytes > kMaxWorkspaceBytes || 2 * chunk > most;
    if (chunk < rows && !full) return wrong_plan("small chunk", {rows, unit, workspace.row_bytes, chunk});
  }
  const float scale = 1;
  for (int i = 0; i < 200000; ++i) {
    const int64_t sample_rows_ = i < 4096 ? i + 1 : size(i % 2 ? 34 : 30);
    const int64_t first = size(36), row = i % 3 ? size(30) - 1 : sample_rows_ * size(10) - first % sample_rows_ - i % 2;
    if (row < 0 || row >= kMostChunkRows) continue;
    const SampleRows<float> rows = sample_rows(&scale, first, sample_rows_);
    const int64_t sample = (rows.scale - &scale) + rows.sample(static_cast<int>(row));
    if (sample != (first + row) / sample_rows_) return wrong_plan("sample", {first, row, sample_rows_, sample});
  }
  return 0;
}

// --- the cases

template <class Function>
int with_element(const Options& options, Function&& function) {
#ifdef ONLY_TYPE  // mutants are compiled for one type, to save time
  return function(ONLY_TYPE{});
#else
  return harness::with_type(options.text("type"), function);
#endif
}

template <class Function>
int with_accumulation(const Options& options, Function&& function) {
  return options.text("type") == "double" ? function(double{}) : function(float{});
}

}  // namespace

int main(int argc, char** argv) {
  return harness::main_of(
      argc, argv,
      {{"activation",
        [](const Options& o) {
          return with_element(o, [&](auto element) { return activation_case<decltype(element)>(o); });
        }},
       {"activation_backward",
        [](const Options& o) {
          return with_element(o, [&](auto element) { return activation_backward_case<decltype(element)>(o); });
        }},
       {"grn_sums",
        [](const Options& o) {
          return with_element(o, [&](auto element) { return grn_sums_case<decltype(element)>(o); });
        }},
       {"grn_factors",
        [](const Options& o) {
          return with_accumulation(o, [&](auto element) { return grn_factors_case<decltype(element)>(o); });
        }},
       {"add_branch",
        [](const Options& o) {
          return with_element(o, [&](auto element) { return add_branch_case<decltype(element)>(o); });
        }},
       {"branch_grad",
        [](const Options& o) {
          return with_element(o, [&](auto element) { return branch_grad_case<decltype(element)>(o); });
        }},
       {"layer_scale",
        [](const Options& o) {
          return with_element(o, [&](auto element) { return layer_scale_case<decltype(element)>(o); });
        }},
       {"accumulate",
        [](const Options& o) {
          return with_accumulation(o, [&](auto element) { return accumulate_case<decltype(element)>(o); });
        }},
       {"passes_plan", passes_plan_case}});
}
