// The passes over rows of hidden values: GELU, GRN's sums and factors, and their backwards. Part of
// mlp_passes_cases.cpp.
#pragma once
#include "gelu_in_double.h"
#include "mlp/kernels_grn.cuh"
#include "mlp/kernels_hidden.cuh"
#include "mlp_rows.h"
#include "parameter.h"

namespace {

using namespace convnext_kernels;
using harness::Options;
using harness::Outcome;
using harness::TestParameter;

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

}  // namespace
