// The passes of layer_norm_mlp around its matrix products, against plain loops in double; and the plans' promises.
#include "mlp/chunk_plan.h"
#include "mlp/kernels_branch.cuh"
#include "mlp/kernels_weights.cuh"
#include "mlp_hidden_cases.h"

namespace {

using namespace convnext_kernels;
using harness::Options;
using harness::Outcome;
using harness::TestParameter;

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
