// The backward of layer_norm_mlp on the CPU. Included by cpu.cpp alone.
#pragma once
#include <cstring>

#include "mlp/cpu_mlp.h"

namespace convnext_kernels {

// One call of the operator. Per chunk: the normalised rows a, h = a W1^T + b1, then from the output back
//   branch = scale * layer_scale * grad,  dg = branch W2,  g and dh = dg * gelu'(h) in place of h and dg,
//   dW2 += branch^T g,  dW1 += dh^T a,  da = dh W1,  and LayerNorm's backward.
//
// The gradient of layer scale is sum grad * scale * (g W2^T + b2), without the branch's result at hand. It comes from
// G = (scale * grad)^T g, of which dW2 is layer_scale * G: it is sum_k W2 G + b2 * sum(scale * grad). Then dg takes W2
// scaled by layer_scale. In fp16 G, which lacks the factor layer_scale, could overflow: there g W2^T + b2 is computed
// again.
class MlpBackward {
 public:
  MlpBackward(const Tensor& grad, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& hidden,
              const MlpParameters& given, const std::string& approximate, int64_t mask)
      : mlp_(kName, z, given),
        p_(mlp_.parameters),
        like_(z),
        tanh_(is_tanh(kName, approximate)),
        kernels_(mlp_kernels()),
        type_(element_of(mlp_.type)),
        unscaled_(p_.layer_scale && mlp_.type != ScalarType::Half),
        wants_(p_, mask, unscaled_) {
    mlp_.check_backward(grad, mean, rstd, hidden, mask);
    const bool same = accumulation_type(grad.scalar_type()) == mlp_.accumulation;
    grad_tensor_ = same ? grad : torch::stable::to(detach(grad), mlp_.accumulation);
    grad_ = Elements(*grad_tensor_);
    z_ = Elements(z);
    mean_ = Elements(mean);
    rstd_ = Elements(rstd);
    if (MlpArguments::has_kept(hidden)) kept_ = Elements(hidden);
    // Rows of dropped samples are not written; nothing is where there are no rows.
    results_ = allocate_gradients(mlp_, wants_, [&](MlpGradient gradient) {
      return mlp_.live.count() == 0 || (gradient == kGradZ && !mlp_.live.dropped_samples().empty());
    });
  }

  std::vector<Tensor> run() {
    // Four buffers, and no more than as much again for the rest.
    const int64_t row_bytes = 4 * (mlp_.channels + mlp_.hidden) * static_cast<int64_t>(like_.element_size());
    const auto chunks = mlp_.chunks(row_bytes);
    if (chunks.empty()) return results_;
    allocate_workspace(chunks);
    for (const Chunk& chunk : chunks) run_chunk(chunk);
    if (fc1_weight_) results_[kGradFc1Weight] = fc1_weight_->in_accumulation_type();
    if (fc2_weight_ && unscaled_) {
      finish_unscaled(fc2_weight_->sum());
    } else if (fc2_weight_) {
      results_[kGradFc2Weight] = fc2_weight_->in_accumulation_type();
    }
    if (wants_(kGradFc2Bias) && unscaled_) scale_by_layer(*branch_total_, *branch_total_);
    return results_;
  }

 private:
  static constexpr const char* kName = "layer_norm_mlp_backward";

  ColumnSums sums(bool wanted, int64_t parts, int64_t columns) const {
    return ColumnSums(like_, wanted, parts, columns, mlp_.accumulation);
  }

  void allocate_workspace(const std::vector<Chunk>& chunks) {
    const int64_t c = mlp_.channels, k = mlp_.hidden, rows = chunks.front().rows, groups = most_groups(chunks);
    normalised_buffer_ = empty(like_, {rows, c}, mlp_.type);
    branch_buffer_ = empty(like_, {rows, c}, mlp_.type);
    norm_weight_sums_ = sums(wants_(kGradNormWeight), groups, c);
    norm_bias_sums_ = sums(wants_(kGradNormBias), groups, c);
    fc1_bias_sums_ = sums(wants_(kGradFc1Bias), groups, k);
    branch_sums_ = sums(wants_(kGradFc2Bias) || wants_.by_weights, groups, c);
    layer_scale_sums_ = sums(wants_(kGradLayerScale) && !wants_.by_weights, groups, c);
    if (mlp_.grn_weight) {
      const int64_t images = mlp_.images(chunks.front());
      square_sums_ = sums(true, groups, k);
      norms_ = sums(true, images, k);
      product_sums_ = sums(true, groups, k);
      products_ = sums(true, images, k);
      grad_sums_ = sums(true, groups, k);
      factors_ = sums(true, images, k);
      feedback_ = sums(true, images, k);
    }
    if (wants_(kGradFc1Weight)) fc1_weight_.emplace(mlp_.products, k, c, mlp_.live.count());
    if (wants_(kGradFc2Weight) || wants_.by_weights) fc2_weight_.emplace(mlp_.products, c, k, mlp_.live.count());
    if (wants_(kGradFc2Bias)) branch_total_ = results_[kGradFc2Bias];
    if (wants_.by_weights && !branch_total_) branch_total_ = empty(like_, {c}, mlp_.accumulation);
    if (unscaled_ && wants_.grad_activated) {
      scaled_fc2_weight_ = empty(like_, {c, k}, mlp_.type);
      scale_by_layer(p_.fc2_weight, *scaled_fc2_weight_);
    }
  }

  void run_chunk(const Chunk& chunk) {
    const Tensor normalised = rows_of(*normalised_buffer_, 0, chunk.rows);
    const Tensor branch = rows_of(*branch_buffer_, 0, chunk.rows);
    OptionalTensor hidden, grad_hidden;

    if (wants_.grad_activated || wants_.activated) hidden = compute_hidden(chunk, normalised);
    if (wants_.branch_grad) compute_branch_grad(chunk, branch);
    if (wants_.grad_activated)
      grad_hidden = mlp_.products.product(branch, unscaled_ ? *scaled_fc2_weight_ : p_.fc2_weight);
    if (mlp_.grn_weight && hidden) compute_grn(chunk, *hidden, grad_hidden);
    if (wants_.grad_hidden || wants_.activated) compute_activation(chunk, *hidden, grad_hidden);

    if (fc2_weight_) fc2_weight_->add_product(branch, *hidden);
    if (layer_scale_sums_) compute_layer_scale(chunk, *hidden);
    if (fc1_weight_) fc1_weight_->add_product(*grad_hidden, normalised);
    if (wants_.norm) compute_norm(chunk, mlp_.products.product(*grad_hidden, p_.fc1_weight));
  }

  // The normalised rows where something needs them, and the hidden rows: computed again unless they were kept.
  Tensor compute_hidden(const Chunk& chunk, const Tensor& normalised) const {
    const int64_t c = mlp_.channels, k = mlp_.hidden;
    if (!kept_ || fc1_weight_) {
      const Elements to(normalised);
      mlp_.for_each_run(chunk, [&](const Run& run) {
        layer_norm_kernels().normalise(type_, type_, run.rows, c, z_.at(run.position * c), mean_.at(run.position),
                                       rstd_.at(run.position), mlp_.norm_weight.at(0), mlp_.norm_bias.at(0),
                                       to.at(run.row * c));
      });
    }
    if (!kept_) return mlp_.products.linear(normalised, p_.fc1_weight, p_.fc1_bias);
    const Tensor hidden = empty(like_, {chunk.rows, k}, mlp_.type);
    const Elements to(hidden);
    const size_t row_bytes = static_cast<size_t>(k) * hidden.element_size();
    mlp_.for_each_run(chunk, [&](const Run& run) {
      std::memcpy(to.at(run.row * k), kept_.at(run.position * k), static_cast<size_t>(run.rows) * row_bytes);
    });
    return hidden;
  }

  void compute_branch_grad(const Chunk& chunk, const Tensor& branch) const {
    const int64_t c = mlp_.channels;
    const Elements to(branch);
    const void* layer_scale = unscaled_ ? nullptr : mlp_.layer_scale.at(0);
    mlp_.for_each_run(chunk, [&](const Run& run) {
      kernels_.branch_grad(grad_.type(), type_, run.rows, c, grad_.at(run.position * c), layer_scale, run.scale,
                           to.at(run.row * c), branch_sums_.part(run.group, run.first));
    });
    if (branch_sums_) branch_sums_.finish(chunk.groups.count, chunk.first > 0, *branch_total_);
  }

  HiddenRows hidden_rows(int64_t begin, int64_t end, const Elements& hidden, const Elements& grad) const {
    const int64_t k = mlp_.hidden;
    HiddenRows rows{};
    rows.type = type_;
    rows.tanh = tanh_;
    rows.rows = end - begin;
    rows.columns = k;
    rows.x = hidden.at(begin * k);
    rows.grad = grad.at(begin * k);
    return rows;
  }

  // GRN's norms, the gradients of its parameters, and what its backward multiplies with.
  void compute_grn(const Chunk& chunk, const Tensor& hidden, const OptionalTensor& grad) {
    const Elements from(hidden), grads(grad);
    for_each_group(chunk.groups, [&](int64_t group, int64_t begin, int64_t end) {
      kernels_.grn_backward_sums(
          hidden_rows(begin, end, from, grads),
          {square_sums_.part(group, true), product_sums_.part(group, true), grad_sums_.part(group, true)});
    });
    const int64_t parts = chunk.groups.groups_per_block;
    mlp_.for_each_image(chunk, [&](int64_t image, int64_t group, const auto* weight) {
      square_sums_.sum(group, parts, norms_.part(image));
      product_sums_.sum(group, parts, products_.part(image));
      grn_gradients(mlp_.hidden, weight, norms_.part(image), products_.part(image), factors_.part(image),
                    feedback_.part(image));
    });
    if (wants_(kGradGrnWeight)) products_.finish(mlp_.images(chunk), chunk.first > 0, results_[kGradGrnWeight]);
    if (wants_(kGradGrnBias)) grad_sums_.finish(chunk.groups.count, chunk.first > 0, results_[kGradGrnBias]);
  }

  // g' in place of h, dh in place of dg.
  void compute_activation(const Chunk& chunk, const Tensor& hidden, const OptionalTensor& grad) const {
    const int64_t k = mlp_.hidden;
    const Elements values(hidden), grads = wants_.grad_hidden ? Elements(grad) : Elements();
    for_each_group(chunk.groups, [&](int64_t group, int64_t begin, int64_t end) {
      HiddenRows rows = hidden_rows(begin, end, values, grads);
      rows.result = wants_.activated ? values.at(begin * k) : nullptr;
      rows.grad_x = grads.at(begin * k);
      rows.grad_sums = fc1_bias_sums_.part(group, true);
      if (mlp_.grn_weight) {
        const int64_t image = group / chunk.groups.groups_per_block;
        rows.factors = factors_.part(image);
        rows.grn_bias = mlp_.grn_bias.at(0);
        rows.feedback = feedback_.part(image);
      }
      kernels_.gelu_backward(rows);
    });
    if (fc1_bias_sums_) fc1_bias_sums_.finish(chunk.groups.count, chunk.first > 0, results_[kGradFc1Bias]);
  }

  // With the branch's result computed again.
  void compute_layer_scale(const Chunk& chunk, const Tensor& activated) const {
    const int64_t c = mlp_.channels;
    const Tensor branch = mlp_.products.linear(activated, p_.fc2_weight, parameter_as(p_.fc2_bias, mlp_.type));
    const Elements from(branch);
    mlp_.for_each_run(chunk, [&](const Run& run) {
      kernels_.layer_scale_grad(grad_.type(), type_, run.rows, c, grad_.at(run.position * c), from.at(run.row * c),
                                run.scale, layer_scale_sums_.part(run.group, run.first));
    });
    layer_scale_sums_.finish(chunk.groups.count, chunk.first > 0, results_[kGradLayerScale]);
  }

  void compute_norm(const Chunk& chunk, const Tensor& grad_normalised) const {
    const int64_t c = mlp_.channels;
    const Elements from(grad_normalised), to = wants_(kGradZ) ? Elements(results_[kGradZ]) : Elements();
    mlp_.for_each_run(chunk, [&](const Run& run) {
      layer_norm_kernels().backward(type_, type_, run.rows, c, from.at(run.row * c), z_.at(run.position * c),
                                    mean_.at(run.position), rstd_.at(run.position), mlp_.norm_weight.at(0),
                                    to.at(run.position * c), norm_weight_sums_.part(run.group, run.first),
                                    norm_bias_sums_.part(run.group, run.first));
    });
    if (norm_weight_sums_) norm_weight_sums_.finish(chunk.groups.count, chunk.first > 0, results_[kGradNormWeight]);
    if (norm_bias_sums_) norm_bias_sums_.finish(chunk.groups.count, chunk.first > 0, results_[kGradNormBias]);
  }

  // result = layer_scale * rows, a row of any length a channel; in place where they are the same.
  void scale_by_layer(const Tensor& rows, const Tensor& result) const {
    const int64_t k = rows.numel() / mlp_.channels;
    const Elements from(rows), to(result);
    torch::stable::parallel_for(0, mlp_.channels, 16, [&](int64_t begin, int64_t end) {
      kernels_.scale_rows(from.type(), to.type(), end - begin, k, from.at(begin * k), mlp_.layer_scale.at(begin),
                          to.at(begin * k));
    });
  }

  // The gradients of W2 and of layer scale, from G and the sum of scale * grad.
  void finish_unscaled(const Tensor& product) {
    if (wants_.by_weights) {
      const int64_t k = mlp_.hidden;
      const Elements weight(p_.fc2_weight), from(product), to(results_[kGradLayerScale]), total(*branch_total_);
      torch::stable::parallel_for(0, mlp_.channels, 16, [&](int64_t begin, int64_t end) {
        kernels_.dot_rows(type_, from.type(), end - begin, k, weight.at(begin * k), from.at(begin * k), to.at(begin));
      });
      if (mlp_.fc2_bias) kernels_.add_product(to.type(), mlp_.channels, mlp_.fc2_bias.at(0), total.at(0), to.at(0));
    }
    if (!wants_(kGradFc2Weight)) return;
    if (product.scalar_type() == mlp_.accumulation) results_[kGradFc2Weight] = product;
    scale_by_layer(product, results_[kGradFc2Weight]);
  }

  const Mlp mlp_;
  const MlpParameters& p_;
  const Tensor like_;
  const bool tanh_;
  const MlpKernels& kernels_;
  const Element type_;

  OptionalTensor grad_tensor_;
  Elements grad_, z_, mean_, rstd_, kept_;
  std::vector<Tensor> results_;

  const bool unscaled_;  // `branch`, its sums and the product of W2's gradient are without layer scale
  const MlpWanted wants_;

  OptionalTensor normalised_buffer_, branch_buffer_;
  ColumnSums norm_weight_sums_, norm_bias_sums_, fc1_bias_sums_, branch_sums_, layer_scale_sums_;
  ColumnSums square_sums_, product_sums_, grad_sums_;  // of GRN, per group
  ColumnSums norms_, products_, factors_, feedback_;   // and per image
  OptionalTensor branch_total_, scaled_fc2_weight_;
  std::optional<WeightGradient> fc1_weight_, fc2_weight_;
};

}  // namespace convnext_kernels
