// From parameters and plan to the one kernel that fits: what layer_norm.cuh declares.
#pragma once
#include "common/column_sum.cuh"
#include "layer_norm/kernels_long.cuh"

namespace convnext_kernels {

// Calls function(vector size, vectors), both as compile-time constants, of the plan.
template <bool kBackward, class T, class O, class Function>
void dispatch_layer_norm(const LayerNormPlan& plan, Function&& function) {
  static_assert(kHasLayerNorm<T, O>, "no kernel for these types");
  const auto with_size = [&]<int kVectorSize>() {
    if (plan.vector_size != kVectorSize) return;
    [&]<int... kVectors>(std::integer_sequence<int, kVectors...>) {
      const auto one = [&]<int kCount>() {
        if constexpr (layer_norm_has_kernel(kBackward, kVectorSize, kCount))
          if (plan.vectors == kCount)
            function(std::integral_constant<int, kVectorSize>{}, std::integral_constant<int, kCount>{});
      };
      (one.template operator()<kVectors>(), ...);
    }(std::make_integer_sequence<int, kLayerNormMostVectors + 1>{});
  };
  if constexpr (sizeof(T) == 2 && sizeof(O) == 2) with_size.template operator()<8>();
  if constexpr (!std::is_same_v<T, double>) with_size.template operator()<4>();
  with_size.template operator()<1>();
}

template <class A>
RowLength<A> row_length(int64_t channels) {
  return {static_cast<A>(channels), A(1) / static_cast<A>(channels)};
}

inline LaunchShape layer_norm_shape(const LayerNormPlan& plan, cudaStream_t stream) {
  return {dim3(static_cast<unsigned>(plan.blocks)),
          dim3(static_cast<unsigned>(plan.row_threads), static_cast<unsigned>(plan.block_rows)),
          static_cast<size_t>(plan.shared_bytes), stream};
}

template <class T, class R>
void launch_layer_norm_of(const char* op, const LayerNormParams<T, R>& params, bool given, bool aligned,
                          const Chip& chip, cudaStream_t stream) {
  const LayerNormPlan plan = plan_layer_norm(params.rows, params.channels, sizeof(T), sizeof(R), aligned, chip);
  if (plan.blocks == 0) return;
  const auto samples = sample_rows(params.sample_scale, params.first_row, params.rows_per_sample);
  const LaunchShape shape = layer_norm_shape(plan, stream);
  const auto length = row_length<Accumulation<T>>(params.channels);
  if (plan.vectors == 0) return launch(op, layer_norm_long_kernel<T, R>, shape, params, samples, length, given);
  dispatch_layer_norm<false, T, R>(plan, [&](auto size, auto vectors) {
    launch(op, layer_norm_kernel<T, R, decltype(size)::value, decltype(vectors)::value>, shape, params, samples, length,
           given);
  });
}

template <class T, class R>
void launch_layer_norm(const char* op, const LayerNormParams<T, R>& params, bool aligned, const Chip& chip,
                       cudaStream_t stream) {
  launch_layer_norm_of(op, params, false, aligned, chip, stream);
}

template <class T, class R>
void launch_layer_norm_normalise(const char* op, const LayerNormParams<T, R>& params, bool aligned, const Chip& chip,
                                 cudaStream_t stream) {
  launch_layer_norm_of(op, params, true, aligned, chip, stream);
}

template <class G, class T>
void launch_layer_norm_backward_partials(const char* op, const LayerNormPlan& plan,
                                         const LayerNormBackwardParams<G, T>& params, cudaStream_t stream) {
  const bool sums = params.weight_partials || params.bias_partials;
  if (plan.blocks == 0 || !(sums || params.grad_x)) return;
  const auto samples = sample_rows(params.sample_scale, params.first_row, params.rows_per_sample);
  const LaunchShape shape = layer_norm_shape(plan, stream);
  const auto length = row_length<Accumulation<T>>(params.channels);
  if (plan.vectors == 0) {
    if (params.grad_x) launch(op, layer_norm_long_backward_kernel<G, T>, shape, params, samples, length);
    if (!sums) return;
    const int64_t column_blocks = (params.channels + kLayerNormThreads - 1) / kLayerNormThreads;
    const dim3 grid(static_cast<unsigned>(column_blocks), static_cast<unsigned>(plan.sum_blocks));
    return launch(op, layer_norm_long_sums_kernel<G, T>, {grid, dim3(kLayerNormThreads), 0, stream}, params, samples);
  }
  dispatch_layer_norm<true, G, T>(plan, [&](auto size, auto vectors) {
    launch(op, layer_norm_backward_kernel<G, T, decltype(size)::value, decltype(vectors)::value>, shape, params,
           samples, length);
  });
}

template <class G, class T>
void launch_layer_norm_backward(const char* op, const LayerNormPlan& plan, const LayerNormBackwardParams<G, T>& params,
                                Accumulation<T>* grad_weight, Accumulation<T>* grad_bias, cudaStream_t stream) {
  if (plan.blocks == 0) return;
  launch_layer_norm_backward_partials(op, plan, params, stream);
  if (params.weight_partials)
    launch_column_sum(op, params.weight_partials, grad_weight, plan.partial_rows(), params.channels, stream);
  if (params.bias_partials)
    launch_column_sum(op, params.bias_partials, grad_bias, plan.partial_rows(), params.channels, stream);
}

// The types of the launches, for sources that compile them.
template <class T, class R>
using LayerNormLaunch = void(const char*, const LayerNormParams<T, R>&, bool, const Chip&, cudaStream_t);
template <class G, class T>
using LayerNormPartialsLaunch = void(const char*, const LayerNormPlan&, const LayerNormBackwardParams<G, T>&,
                                     cudaStream_t);
template <class G, class T>
using LayerNormBackwardLaunch = void(const char*, const LayerNormPlan&, const LayerNormBackwardParams<G, T>&,
                                     Accumulation<T>*, Accumulation<T>*, cudaStream_t);

}  // namespace convnext_kernels
