// The arguments of layer_norm_mlp and its backward, as every device checks and reads them.
#pragma once
#include "common/operator.h"

namespace convnext_kernels {

inline bool is_tanh(const char* op, const std::string& approximate) {
  if (approximate != "none" && approximate != "tanh") fail(op, "approximate", "'none' or 'tanh'", approximate);
  return approximate == "tanh";
}

// The parameters of layer_norm_mlp, in the order of the schema.
struct MlpParameters {
  OptionalTensor norm_weight, norm_bias;
  Tensor fc1_weight;
  OptionalTensor fc1_bias, grn_weight, grn_bias;
  Tensor fc2_weight;
  OptionalTensor fc2_bias, layer_scale, sample_scale;
};

// The results of layer_norm_mlp_backward, and the bits of output_mask.
enum MlpGradient {
  kGradZ,
  kGradNormWeight,
  kGradNormBias,
  kGradFc1Weight,
  kGradFc1Bias,
  kGradGrnWeight,
  kGradGrnBias,
  kGradFc2Weight,
  kGradFc2Bias,
  kGradLayerScale,
  kMlpGradients
};

struct MlpArguments {
  // Raises where the arguments do not fit together.
  MlpArguments(const char* operator_name, DeviceCheck on_device, const Tensor& z, const MlpParameters& given)
      : op(operator_name),
        checks{op, on_device, z},
        channels(checked(z).size(-1)),
        hidden(hidden_of(given.fc1_weight)),
        samples(z.size(0)),
        rows_per_sample(samples ? z.numel() / channels / samples : 0),
        type(z.scalar_type()),
        accumulation(accumulation_type(type)) {
    checks.parameter("norm_weight", given.norm_weight, {channels});
    checks.parameter("norm_bias", given.norm_bias, {channels});
    checks.parameter("fc1_weight", given.fc1_weight, {hidden, channels});
    checks.parameter("fc1_bias", given.fc1_bias, {hidden});
    checks.parameter("grn_weight", given.grn_weight, {hidden});
    checks.parameter("grn_bias", given.grn_bias, {hidden});
    if (given.grn_weight.has_value() != given.grn_bias.has_value())
      fail(op, given.grn_weight ? "grn_bias" : "grn_weight", "both of grn_weight and grn_bias, or neither", "None");
    checks.parameter("fc2_weight", given.fc2_weight, {channels, hidden});
    checks.parameter("fc2_bias", given.fc2_bias, {channels});
    checks.parameter("layer_scale", given.layer_scale, {channels});
    if (given.sample_scale) checks.like("sample_scale", *given.sample_scale, {samples}, accumulation);
  }

  void check_forward(const OptionalTensor& residual, ScalarType out_dtype) const {
    if (residual) {
      checks.activation("residual", *residual);
      check_shape(op, "residual", *residual, shape_of(checks.beside));
      if (accumulation_type(residual->scalar_type()) != accumulation)
        fail(op, "residual", "float64 together with a float64 z only", describe(residual->scalar_type()));
    }
    if (!is_supported(out_dtype)) fail(op, "out_dtype", "float32, float64, float16 or bfloat16", describe(out_dtype));
  }

  // `hidden_rows`: kept by the forward, or of shape (0).
  void check_backward(const Tensor& grad, const Tensor& mean, const Tensor& rstd, const Tensor& hidden_rows,
                      int64_t output_mask) const {
    const Tensor& z = checks.beside;
    checks.activation("grad", grad);
    check_shape(op, "grad", grad, shape_of(z));
    checks.like("mean", mean, shape_without_last(z), accumulation);
    checks.like("rstd", rstd, shape_without_last(z), accumulation);
    if (has_kept(hidden_rows)) checks.like("hidden", hidden_rows, shape_with_last(z, hidden), type);
    if (output_mask < 0 || output_mask >> kMlpGradients)
      fail(op, "output_mask", "bits 0 to " + std::to_string(kMlpGradients - 1), std::to_string(output_mask));
  }
  static bool has_kept(const Tensor& hidden_rows) { return hidden_rows.dim() != 1; }

  int64_t rows() const { return samples * rows_per_sample; }

  const char* const op;
  const Checks checks;  // beside z
  const int64_t channels, hidden, samples, rows_per_sample;
  const ScalarType type, accumulation;

 private:
  const Tensor& checked(const Tensor& z) const {
    checks.activation("z", z);
    if (z.dim() < 2) fail(op, "z", "a tensor of rank 2 or more", "rank 1");
    return z;
  }

  int64_t hidden_of(const Tensor& fc1_weight) const {
    check_rank(op, "fc1_weight", fc1_weight, 2);
    if (fc1_weight.size(0) < 1) fail(op, "fc1_weight", "at least one row", "shape " + describe(fc1_weight.sizes()));
    return fc1_weight.size(0);
  }
};

// Which gradients the backward computes, and what it needs for them on the way.
class MlpWanted {
 public:
  // `can_use_weights`: the gradient of layer scale can come from the unscaled gradient of W2.
  MlpWanted(const MlpParameters& parameters, int64_t output_mask, bool can_use_weights) {
    const bool exists[] = {true,
                           parameters.norm_weight.has_value(),
                           parameters.norm_bias.has_value(),
                           true,
                           parameters.fc1_bias.has_value(),
                           parameters.grn_weight.has_value(),
                           parameters.grn_bias.has_value(),
                           true,
                           parameters.fc2_bias.has_value(),
                           parameters.layer_scale.has_value()};
    for (int i = 0; i < kMlpGradients; ++i) wanted_[i] = exists[i] && (output_mask >> i & 1);
    const auto& wants = *this;
    norm = wants(kGradZ) || wants(kGradNormWeight) || wants(kGradNormBias);
    grad_hidden = norm || wants(kGradFc1Weight) || wants(kGradFc1Bias);
    grad_activated = grad_hidden || wants(kGradGrnWeight) || wants(kGradGrnBias);
    activated = wants(kGradFc2Weight) || wants(kGradLayerScale);
    by_weights = wants(kGradLayerScale) && can_use_weights;
    branch_grad = grad_activated || wants(kGradFc2Weight) || wants(kGradFc2Bias) || by_weights;
  }

  bool operator()(MlpGradient gradient) const { return wanted_[gradient]; }

  bool norm;            // something of LayerNorm's backward
  bool grad_hidden;     // dh
  bool grad_activated;  // dg
  bool activated;       // g, or GRN(g)
  bool by_weights;      // the gradient of layer scale comes from the unscaled gradient of W2
  bool branch_grad;

 private:
  bool wanted_[kMlpGradients];
};

// Tensors for the gradients: empty of shape (0) where not wanted, zeros where `unwritten(gradient)`.
template <class Unwritten>
std::vector<Tensor> allocate_gradients(const MlpArguments& mlp, const MlpWanted& wants, const Unwritten& unwritten) {
  const Tensor& z = mlp.checks.beside;
  const int64_t c = mlp.channels, k = mlp.hidden;
  const std::vector<int64_t> shapes[] = {shape_of(z), {c}, {c}, {k, c}, {k}, {k}, {k}, {c, k}, {c}, {c}};
  std::vector<Tensor> results;
  for (int i = 0; i < kMlpGradients; ++i) {
    const auto gradient = static_cast<MlpGradient>(i);
    const ScalarType type = wants(gradient) && gradient == kGradZ ? mlp.type : mlp.accumulation;
    if (!wants(gradient)) {
      results.push_back(empty(z, {0}, type));
    } else {
      results.push_back(unwritten(gradient) ? zeros(z, shapes[i], type) : empty(z, shapes[i], type));
    }
  }
  return results;
}

}  // namespace convnext_kernels
