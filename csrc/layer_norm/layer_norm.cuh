// What other rooms call: parameters and launches of the layer normalisation over rows of channels. The kernels are in
// launch.cuh; nvcc compiles them in this room's sources only.
//
// Types: T of x, R of y, G of the gradient of y.
#pragma once
#include "common/machine.cuh"
#include "layer_norm/launch_plan.h"

namespace convnext_kernels {

// Whether there are kernels for x of type T and y, or its gradient, of type O: those that autocast makes.
template <class T, class O>
constexpr bool kHasLayerNorm = std::is_same_v<T, O> || (std::is_same_v<T, float> && sizeof(O) == 2) ||
                               (std::is_same_v<O, float> && sizeof(T) == 2);

// Row r belongs to sample (first_row + r) / rows_per_sample. Where sample_scale (samples) is 0 the sample is dropped:
// what it holds is not read and counts for nothing, and its results are 0. Then there are at most 2^30 rows a launch.
template <class T, class R>
struct LayerNormParams {
  const T* x = nullptr;                           // (rows, channels)
  Parameter weight, bias;                         // (channels) or absent
  const Accumulation<T>* sample_scale = nullptr;  // null: none is dropped
  int64_t first_row = 0, rows_per_sample = 1;
  R* y = nullptr;                                   // (rows, channels)
  Accumulation<T>*mean = nullptr, *rstd = nullptr;  // (rows): results of layer_norm, inputs of layer_norm_normalise
  int64_t rows = 0, channels = 0;
  Accumulation<T> eps = 0;
};

template <class G, class T>
struct LayerNormBackwardParams {
  const G* grad = nullptr;                                // (rows, channels)
  const T* x = nullptr;                                   // (rows, channels)
  const Accumulation<T>*mean = nullptr, *rstd = nullptr;  // (rows)
  Parameter weight;                                       // (channels) or absent
  const Accumulation<T>* sample_scale = nullptr;          // null: none is dropped
  int64_t first_row = 0, rows_per_sample = 1;
  T* grad_x = nullptr;  // (rows, channels); null: not asked for
  // (plan.partial_rows(), channels), all of it written; null: not asked for
  Accumulation<T>*weight_partials = nullptr, *bias_partials = nullptr;
  int64_t rows = 0, channels = 0;
};

// y = (x - mean) * rstd * weight + bias, and mean and rstd. All launches do nothing for no rows. `aligned`: x and y
// begin at multiples of 16 bytes.
template <class T, class R>
void launch_layer_norm(const char* op, const LayerNormParams<T, R>& params, bool aligned, const Chip& chip,
                       cudaStream_t stream);

// The same with the mean and rstd that an earlier launch wrote: the same bits.
template <class T, class R>
void launch_layer_norm_normalise(const char* op, const LayerNormParams<T, R>& params, bool aligned, const Chip& chip,
                                 cudaStream_t stream);

// `plan`: plan_layer_norm_backward(rows, channels, sizeof(G), sizeof(T), aligned, chip). The sums over the rows of the
// partials are the gradients of weight and bias. The partials of several launches may be pieces of one workspace.
template <class G, class T>
void launch_layer_norm_backward_partials(const char* op, const LayerNormPlan& plan,
                                         const LayerNormBackwardParams<G, T>& params, cudaStream_t stream);

// Also adds the partials up: to grad_weight and grad_bias (channels), each where its partials are asked for.
template <class G, class T>
void launch_layer_norm_backward(const char* op, const LayerNormPlan& plan, const LayerNormBackwardParams<G, T>& params,
                                Accumulation<T>* grad_weight, Accumulation<T>* grad_bias, cudaStream_t stream);

}  // namespace convnext_kernels
