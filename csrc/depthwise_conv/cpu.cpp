// The depthwise convolution's operators on CPU tensors: checks, the weights in the kernels' layout, threads.
#include <algorithm>
#include <atomic>

#include "common/cpu_capability.h"
#include "common/cpu_operator.h"
#include "common/tensor.h"
#include "depthwise_conv/cpu_kernels.h"
#include "depthwise_conv/plan.h"

namespace convnext_kernels {
namespace {

using namespace depthwise_conv;

const Kernels& kernels() {
#if CONVNEXT_KERNELS_X86
  return of_this_processor({&portable::depthwise_conv_kernels, &avx2::depthwise_conv_kernels,
                            &avx512::depthwise_conv_kernels, &avx512_bf16::depthwise_conv_kernels});
#else
  return portable::depthwise_conv_kernels;
#endif
}

int64_t lanes_of(ScalarType accumulation) {
  return kernels().vector_bytes / (accumulation == ScalarType::Double ? 8 : 4);
}

// --- checks
void check_image(const char* op, const char* argument, const Tensor& tensor) {
  check_cpu(op, argument, tensor);
  check_dtype(op, argument, tensor);
  check_channels_last(op, argument, tensor);
  if (tensor.size(1) < 1 || tensor.size(2) < 1 || tensor.size(3) < 1)
    fail(op, argument, "at least one channel, row and column", "shape " + describe(tensor.sizes()));
}

void check_stride(const char* op, int64_t stride) {
  if (!is_supported_stride(stride)) fail(op, "stride", "1 or 2", std::to_string(stride));
}

void check_kernel_size(const char* op, const char* argument, int64_t size) {
  if (!is_supported_kernel_size(size)) fail(op, argument, "kernel size 3, 5, 7, 9 or 11", std::to_string(size));
}

void check_weight(const char* op, const Tensor& weight, int64_t channels) {
  check_cpu(op, "weight", weight);
  check_dtype(op, "weight", weight);
  check_rank(op, "weight", weight, 4);
  check_kernel_size(op, "weight", weight.size(2));
  check_shape(op, "weight", weight, {channels, 1, weight.size(2), weight.size(2)});
}

void check_sample_scale(const char* op, const OptionalTensor& sample_scale, int64_t samples, ScalarType accumulation) {
  if (sample_scale) check_like(op, "sample_scale", *sample_scale, {samples}, accumulation);
}

const void* pointer_or_null(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// --- threads
// Calls run(task, scratch) for every task, each thread with scratch memory of its own. Tasks are handed out as threads
// come free; they write different memory, so the order does not matter.
template <class Run>
void for_each_task(const Tensor& like, int64_t tasks, int64_t multiply_adds, int64_t scratch_bytes, const Run& run) {
  // Waking a thread costs about as much as this.
  constexpr int64_t kMultiplyAddsPerThread = 1 << 20;
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t workers = std::min({threads, tasks, 1 + multiply_adds / kMultiplyAddsPerThread});
  // A multiple of 64 bytes each, from an allocation that is aligned so.
  const int64_t floats = (scratch_bytes + 63) / 64 * 16;
  const Tensor scratch = empty(like, {workers, floats}, ScalarType::Float);
  float* const memory = static_cast<float*>(scratch.mutable_data_ptr());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;)
        run(task, memory + worker * floats);
  });
}

// --- weights
template <class Use>
void with_element_type(ScalarType type, const Use& use) {
  switch (type) {
    case ScalarType::Double:
      return use(double{});
    case ScalarType::Half:
      return use(torch::headeronly::Half{});
    case ScalarType::BFloat16:
      return use(torch::headeronly::BFloat16{});
    default:
      return use(float{});
  }
}

// Row or column of the weights that tap t of this phase is.
int64_t weight_of_tap(const Correlation& c, bool flipped, int64_t phase, int64_t tap) {
  if (!flipped) return tap;
  const int64_t first = (phase + c.kernel_size / 2) % c.result_step;
  return first + c.result_step * (c.phases[phase].taps - 1 - tap);
}

// The layout Correlation::weights describes. `flipped` for the gradient of the input.
template <class A>
Tensor pack_weights(const Correlation& c, bool flipped, const Tensor& weight, const OptionalTensor& bias, int64_t lanes,
                    ScalarType accumulation) {
  const int64_t taps = c.kernel_size * c.kernel_size, blocks = ceil_div(c.channels, lanes);
  std::vector<int64_t> order;
  for (int64_t row_phase = 0; row_phase < c.result_step; ++row_phase)
    for (int64_t column_phase = 0; column_phase < c.result_step; ++column_phase)
      for (int64_t row = 0; row < c.phases[row_phase].taps; ++row)
        for (int64_t column = 0; column < c.phases[column_phase].taps; ++column)
          order.push_back(weight_of_tap(c, flipped, row_phase, row) * c.kernel_size +
                          weight_of_tap(c, flipped, column_phase, column));

  const Tensor packed = empty(weight, {blocks, taps + 1, lanes}, accumulation);
  A* const to = static_cast<A*>(packed.mutable_data_ptr());
  const Tensor dense_weight = dense(weight);
  with_element_type(weight.scalar_type(), [&](auto type) {
    const auto* from = static_cast<const decltype(type)*>(dense_weight.const_data_ptr());
    constexpr int64_t kGrain = 16;  // blocks, about 10 us
    torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        A* const block_to = to + block * (taps + 1) * lanes;
        const int64_t used = std::min(lanes, c.channels - block * lanes);
        if (used < lanes) std::fill_n(block_to, taps * lanes, A{});
        for (int64_t lane = 0; lane < used; ++lane) {
          const auto* const channel_from = from + (block * lanes + lane) * taps;
          for (int64_t tap = 0; tap < taps; ++tap)
            block_to[tap * lanes + lane] = static_cast<A>(channel_from[order[static_cast<size_t>(tap)]]);
        }
        std::fill_n(block_to + taps * lanes, lanes, A{});
      }
    });
  });
  if (bias) {
    const Tensor dense_bias = dense(*bias);
    with_element_type(bias->scalar_type(), [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(dense_bias.const_data_ptr());
      for (int64_t channel = 0; channel < c.channels; ++channel)
        to[(channel / lanes * (taps + 1) + taps) * lanes + channel % lanes] = static_cast<A>(from[channel]);
    });
  }
  return packed;
}

// Runs a correlation whose fields are all set but for weights and scratch_columns.
void run_correlation(Correlation& c, bool flipped, const Tensor& weight, const OptionalTensor& bias, int64_t samples,
                     ScalarType accumulation) {
  if (samples == 0) return;
  const int64_t lanes = lanes_of(accumulation);
  const Tensor packed = accumulation == ScalarType::Double
                            ? pack_weights<double>(c, flipped, weight, bias, lanes, accumulation)
                            : pack_weights<float>(c, flipped, weight, bias, lanes, accumulation);
  c.weights = packed.const_data_ptr();
  const Tiling tiling = correlation_tiling(samples, c.channels, c.result_height, c.result_width, c.kernel_size,
                                           c.source_step, c.result_step, kernels().vector_bytes, lanes);
  c.scratch_columns = tiling.scratch_columns;
  const int64_t multiply_adds = samples * c.channels * c.result_height * c.result_width * c.kernel_size *
                                c.kernel_size / (c.result_step * c.result_step);
  const auto run = kernels().correlate;
  for_each_task(weight, tiling.box_tiles() * tiling.channel_tiles, multiply_adds, tiling.scratch_bytes,
                [&](int64_t task, void* scratch) {
                  run(c, tiling.at(task / tiling.channel_tiles, task % tiling.channel_tiles), scratch);
                });
}

// --- operators
Tensor depthwise_conv2d(Tensor x, Tensor weight, OptionalTensor bias, int64_t stride, OptionalTensor sample_scale) {
  constexpr const char* kOp = "depthwise_conv2d";
  check_image(kOp, "x", x);
  const int64_t samples = x.size(0), channels = x.size(1);
  check_weight(kOp, weight, channels);
  check_parameter(kOp, "bias", bias, {channels});
  check_stride(kOp, stride);
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  check_sample_scale(kOp, sample_scale, samples, accumulation);

  Correlation c{};
  c.channels = channels;
  c.source_height = x.size(2);
  c.source_width = x.size(3);
  c.result_height = output_size(c.source_height, stride);
  c.result_width = output_size(c.source_width, stride);
  c.kernel_size = weight.size(2);
  c.source_step = stride;
  c.result_step = 1;
  c.phases[0] = {c.kernel_size, -(c.kernel_size / 2)};
  const Tensor y = empty_channels_last(x, {samples, channels, c.result_height, c.result_width}, x.scalar_type());
  c.source_type = c.result_type = element_of(x.scalar_type());
  c.source = x.const_data_ptr();
  c.result = y.mutable_data_ptr();
  c.sample_scale = pointer_or_null(sample_scale);
  run_correlation(c, false, weight, bias, samples, accumulation);
  return y;
}

// Two passes: on a CPU the convolution is bound by arithmetic.
std::tuple<Tensor, Tensor> depthwise_conv2d_cast(Tensor x, Tensor weight, OptionalTensor bias, ScalarType dtype,
                                                 OptionalTensor sample_scale) {
  check_image("depthwise_conv2d_cast", "x", x);
  const Tensor x_copy = converted_channels_last(detach(x), dtype);
  return {depthwise_conv2d(x_copy, weight, bias, 1, sample_scale), x_copy};
}

Tensor depthwise_conv2d_input_grad(Tensor grad, Tensor weight, OptionalTensor residual, int64_t stride,
                                   std::vector<int64_t> output_padding, OptionalTensor sample_scale) {
  constexpr const char* kOp = "depthwise_conv2d_input_grad";
  check_image(kOp, "grad", grad);
  const int64_t samples = grad.size(0), channels = grad.size(1);
  check_weight(kOp, weight, channels);
  check_stride(kOp, stride);
  if (output_padding.size() != 2 || std::min(output_padding[0], output_padding[1]) < 0 ||
      std::max(output_padding[0], output_padding[1]) >= stride) {
    const torch::headeronly::IntHeaderOnlyArrayRef got(output_padding.data(), output_padding.size());
    fail(kOp, "output_padding", "two numbers from 0 to stride - 1", describe(got));
  }
  const int64_t height = (grad.size(2) - 1) * stride + 1 + output_padding[0];
  const int64_t width = (grad.size(3) - 1) * stride + 1 + output_padding[1];
  const ScalarType accumulation = accumulation_type(grad.scalar_type());
  ScalarType result_type = grad.scalar_type();
  if (residual) {
    check_cpu(kOp, "residual", *residual);
    check_dtype(kOp, "residual", *residual);
    check_channels_last(kOp, "residual", *residual);
    check_shape(kOp, "residual", *residual, {samples, channels, height, width});
    result_type = residual->scalar_type();
    if (accumulation_type(result_type) != accumulation)
      fail(kOp, "residual", "float64 where grad is and only there", describe(result_type));
  }
  check_sample_scale(kOp, sample_scale, samples, accumulation);

  Correlation c{};
  c.channels = channels;
  c.source_height = grad.size(2);
  c.source_width = grad.size(3);
  c.result_height = height;
  c.result_width = width;
  c.kernel_size = weight.size(2);
  c.source_step = 1;
  c.result_step = stride;
  for (int64_t phase = 0; phase < stride; ++phase) c.phases[phase] = input_gradient_phase(c.kernel_size, stride, phase);
  const Tensor result = empty_channels_last(grad, {samples, channels, height, width}, result_type);
  c.source_type = element_of(grad.scalar_type());
  c.result_type = element_of(result_type);
  c.source = grad.const_data_ptr();
  c.residual = pointer_or_null(residual);
  c.result = result.mutable_data_ptr();
  c.sample_scale = pointer_or_null(sample_scale);
  run_correlation(c, true, weight, std::nullopt, samples, accumulation);
  return result;
}

// Adds the groups' partial sums in order and brings them into the gradients' layout.
template <class A>
void reduce_partials(const WeightGradientPlan& plan, const WeightGradient& g, int64_t lanes, const A* partials,
                     A* grad_weight, A* grad_bias) {
  const int64_t taps = g.kernel_size * g.kernel_size, blocks = plan.tiling.whole.blocks;
  const int64_t block_size = (taps + 1) * lanes;
  constexpr int64_t kGrain = 8;  // blocks
  torch::stable::parallel_for(0, blocks, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<A> sums(static_cast<size_t>(block_size));
    for (int64_t block = begin; block < end; ++block) {
      std::fill(sums.begin(), sums.end(), A{});
      for (int64_t group = 0; group < plan.groups; ++group)
        for (int64_t i = 0; i < block_size; ++i)
          sums[static_cast<size_t>(i)] += partials[(group * blocks + block) * block_size + i];
      const int64_t first = block * lanes, used = std::min(lanes, g.channels - first);
      for (int64_t lane = 0; lane < used; ++lane) {
        for (int64_t tap = 0; tap < taps; ++tap)
          grad_weight[(first + lane) * taps + tap] = sums[static_cast<size_t>(tap * lanes + lane)];
        grad_bias[first + lane] = sums[static_cast<size_t>(taps * lanes + lane)];
      }
    }
  });
}

std::tuple<Tensor, Tensor> depthwise_conv2d_weight_grad(Tensor grad, Tensor x, int64_t kernel_size, int64_t stride,
                                                        OptionalTensor sample_scale) {
  constexpr const char* kOp = "depthwise_conv2d_weight_grad";
  check_image(kOp, "x", x);
  check_image(kOp, "grad", grad);
  if (grad.scalar_type() != x.scalar_type())
    fail(kOp, "grad", describe(x.scalar_type()) + " like x", describe(grad.scalar_type()));
  check_kernel_size(kOp, "kernel_size", kernel_size);
  check_stride(kOp, stride);
  const int64_t samples = x.size(0), channels = x.size(1);

  WeightGradient g{};
  g.channels = channels;
  g.height = x.size(2);
  g.width = x.size(3);
  g.result_height = output_size(g.height, stride);
  g.result_width = output_size(g.width, stride);
  g.kernel_size = kernel_size;
  g.stride = stride;
  check_shape(kOp, "grad", grad, {samples, channels, g.result_height, g.result_width});
  const ScalarType accumulation = accumulation_type(x.scalar_type());
  check_sample_scale(kOp, sample_scale, samples, accumulation);
  const std::vector<int64_t> weight_shape = {channels, 1, kernel_size, kernel_size};
  if (samples == 0) return {zeros(x, weight_shape, accumulation), zeros(x, {channels}, accumulation)};

  g.type = element_of(x.scalar_type());
  g.grad = grad.const_data_ptr();
  g.x = x.const_data_ptr();
  g.sample_scale = pointer_or_null(sample_scale);
  const int64_t lanes = lanes_of(accumulation), vector_bytes = kernels().vector_bytes;
  const WeightGradientPlan plan = weight_gradient_plan(samples, channels, g.result_height, g.result_width, kernel_size,
                                                       stride, vector_bytes, lanes);
  const Tiling& tiling = plan.tiling;
  g.scratch_columns = tiling.scratch_columns;

  const int64_t results = kernel_size * kernel_size + 1;
  const Tensor partials = zeros(x, {plan.groups, tiling.whole.blocks, results, lanes}, accumulation);
  char* const partials_memory = static_cast<char*>(partials.mutable_data_ptr());
  const int64_t multiply_adds = samples * channels * g.result_height * g.result_width * kernel_size * kernel_size;
  const auto run = kernels().add_weight_gradient;
  for_each_task(x, plan.groups * tiling.channel_tiles, multiply_adds, tiling.scratch_bytes,
                [&](int64_t task, void* scratch) {
                  const int64_t group = task / tiling.channel_tiles, channel_tile = task % tiling.channel_tiles;
                  const int64_t end = std::min((group + 1) * plan.boxes_per_group, tiling.box_tiles());
                  for (int64_t box = group * plan.boxes_per_group; box < end; ++box) {
                    const Tile tile = tiling.at(box, channel_tile);
                    const int64_t first = (group * tiling.whole.blocks + tile.first_block) * results * vector_bytes;
                    run(g, tile, partials_memory + first, scratch);
                  }
                });

  const Tensor grad_weight = empty(x, weight_shape, accumulation), grad_bias = empty(x, {channels}, accumulation);
  const auto reduce = [&](auto type) {
    using A = decltype(type);
    reduce_partials(plan, g, lanes, static_cast<const A*>(partials.const_data_ptr()),
                    static_cast<A*>(grad_weight.mutable_data_ptr()), static_cast<A*>(grad_bias.mutable_data_ptr()));
  };
  accumulation == ScalarType::Double ? reduce(double{}) : reduce(float{});
  return {grad_weight, grad_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CPU, m) {
  m.impl("depthwise_conv2d", TORCH_BOX(&depthwise_conv2d));
  m.impl("depthwise_conv2d_cast", TORCH_BOX(&depthwise_conv2d_cast));
  m.impl("depthwise_conv2d_input_grad", TORCH_BOX(&depthwise_conv2d_input_grad));
  m.impl("depthwise_conv2d_weight_grad", TORCH_BOX(&depthwise_conv2d_weight_grad));
}

}  // namespace convnext_kernels
