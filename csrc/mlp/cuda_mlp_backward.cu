// The backward of layer_norm_mlp on CUDA tensors.
#include "common/column_sum.cuh"
#include "mlp/cuda_mlp.cuh"

namespace convnext_kernels {
namespace {

// Per chunk: the normalised rows a, h = a W1^T + b1, then from the output back
//   branch = scale * layer_scale * grad,  dg = branch W2,  g and dh = dg * gelu'(h) in place of h and dg,
//   dW2 += branch^T g,  dW1 += dh^T a,  da = dh W1,  and LayerNorm's backward.
//
// The gradient of layer scale is sum grad * scale * (g W2^T + b2), without the branch's result at hand. Where it is
// asked for, `unscaled` = scale * grad takes branch's place in the product with g: with G = unscaled^T g in the
// accumulation type, dW2 = layer_scale * G, and the gradient is sum_k W2 G + b2 * sum(scale * grad). dg still comes
// from `branch`, which is scaled before it is rounded: a W2 with a layer scale of 1e-6 in it would vanish in fp16.
template <class T>
class CudaMlpBackward {
  using A = Accumulation<T>;

 public:
  CudaMlpBackward(const CudaMlp& mlp, const Tensor& grad, const Tensor& z, const Tensor& mean, const Tensor& rstd,
                  const Tensor& kept, int64_t output_mask)
      : mlp_(mlp),
        p_(mlp.parameters),
        grad_(grad),
        z_(z),
        mean_(mean),
        rstd_(rstd),
        kept_(kept),
        has_kept_(MlpArguments::has_kept(kept)),
        wants_(p_, output_mask, true),
        wants_unscaled_(p_.layer_scale && (wants_.activated || wants_(kGradFc2Bias))),
        wants_branch_(wants_.grad_activated || (wants_.branch_grad && !wants_unscaled_)),
        wants_normalised_(wants_(kGradFc1Weight) || (!has_kept_ && (wants_.grad_hidden || wants_.activated ||
                                                                    wants_(kGradGrnWeight) || wants_(kGradGrnBias)))),
        results_(allocate_gradients(mlp, wants_, [&](MlpGradient) { return mlp.rows() == 0; })) {}

  std::vector<Tensor> run() {
    const auto chunks = mlp_.chunks(workspace());
    if (chunks.empty()) return results_;
    allocate_workspace(chunks);
    for (const CudaChunk& chunk : chunks) run_chunk(chunk);
    if (wants_unscaled_) finish_layer_scale();
    return results_;
  }

 private:
  bool aligned_hidden() const { return !has_kept_ || is_vector_aligned(kept_); }
  bool has_branch_sums() const { return wants_(kGradFc2Bias) || (wants_(kGradLayerScale) && p_.fc2_bias); }

  LayerNormPlan plan_norm(int64_t rows) const {
    const bool aligned = is_vector_aligned(z_);  // the others are our own
    return plan_layer_norm_backward(rows, mlp_.channels, sizeof(T), sizeof(T), aligned, mlp_.context.chip());
  }
  RowPassPlan plan_branch(int64_t rows) const {
    const bool vectors = has_typed_branch_grad<T>(as_parameter(grad_).type) && is_vector_aligned(grad_);
    return mlp_.plan_channels(RowPass::kBranchGrad, false, rows, vectors);
  }

  MlpWorkspace workspace() const {
    const int64_t c = mlp_.channels, k = mlp_.hidden;
    MlpWorkspace bytes;
    bytes.row_bytes = ((2 + wants_unscaled_) * c + 2 * k) * static_cast<int64_t>(mlp_.element_bytes);
    bytes.call_bytes = (1 + wants_(kGradLayerScale)) * c * k + 2 * c * plan_norm(kMostChunkRows).partial_rows() +
                       c * plan_branch(kMostChunkRows).row_blocks +
                       k * mlp_.most_hidden_partials(RowPass::kActivationBackward);
    if (mlp_.has_grn) bytes.call_bytes += 3 * k * mlp_.most_hidden_partials(RowPass::kGrnBackwardSums);
    bytes.call_bytes *= mlp_.sum_bytes;
    if (mlp_.has_grn) bytes.image_bytes = 7 * k * mlp_.sum_bytes;
    return bytes;
  }

  OptionalTensor sums_where(bool wanted, int64_t rows, int64_t columns) const {
    return wanted && rows > 0 ? OptionalTensor(mlp_.sums(rows, columns)) : std::nullopt;
  }
  OptionalTensor workspace_where(bool wanted, int64_t rows, int64_t columns) const {
    return wanted ? OptionalTensor(mlp_.workspace(rows, columns)) : std::nullopt;
  }

  void allocate_workspace(const std::vector<CudaChunk>& chunks) {
    const int64_t c = mlp_.channels, k = mlp_.hidden, rows = chunks.front().rows, images = mlp_.groups(chunks.front());
    // The last chunk may be shorter, and be divided into more parts an image.
    int64_t hidden_parts = 0, grn_parts = 0, branch_parts = 0, norm_parts = 0;
    for (const CudaChunk& chunk : {chunks.front(), chunks.back()}) {
      const auto parts_of = [&](RowPass pass) {
        return mlp_.groups(chunk) * mlp_.plan_hidden(pass, chunk, aligned_hidden()).row_blocks;
      };
      hidden_parts = std::max(hidden_parts, parts_of(RowPass::kActivationBackward));
      grn_parts = std::max(grn_parts, parts_of(grn_pass()));
      branch_parts = std::max<int64_t>(branch_parts, plan_branch(chunk.rows).row_blocks);
      norm_parts = std::max(norm_parts, plan_norm(chunk.rows).partial_rows());
    }
    normalised_ = workspace_where(wants_normalised_, rows, c);
    branch_ = workspace_where(wants_branch_ || wants_.norm, rows, c);
    unscaled_ = workspace_where(wants_unscaled_, rows, c);
    hidden_ = workspace_where(!has_kept_ || wants_.activated, rows, k);
    grad_hidden_ = workspace_where(wants_.grad_activated, rows, k);
    norm_weight_partials_ = sums_where(wants_(kGradNormWeight), norm_parts, c);
    norm_bias_partials_ = sums_where(wants_(kGradNormBias), norm_parts, c);
    fc1_bias_partials_ = sums_where(wants_(kGradFc1Bias), hidden_parts, k);
    branch_partials_ = sums_where(has_branch_sums(), branch_parts, c);
    if (mlp_.has_grn) {
      square_partials_ = sums_where(true, grn_parts, k);
      product_partials_ = sums_where(wants_.grad_activated, grn_parts, k);
      grad_partials_ = sums_where(wants_.grad_activated, grn_parts, k);
      factors_ = sums_where(true, images, k);
      feedback_ = sums_where(wants_.grad_activated, images, k);
      grn_weight_partials_ = sums_where(wants_.grad_activated, images, k);
    }
    if (wants_.activated) fc2_sum_ = wants_(kGradFc2Weight) ? results_[kGradFc2Weight] : mlp_.sums(c, k);
    if (has_branch_sums())
      branch_total_ = wants_(kGradFc2Bias) ? results_[kGradFc2Bias] : empty(z_, {c}, mlp_.accumulation);
    if (chunks.size() > 1 && (fc2_sum_ || wants_(kGradFc1Weight))) product_ = empty(z_, {c * k}, mlp_.accumulation);
  }

  void run_chunk(const CudaChunk& chunk) const {
    const auto part = [&](const OptionalTensor& buffer) {
      return buffer ? OptionalTensor(rows_of(*buffer, 0, chunk.rows)) : std::nullopt;
    };
    const OptionalTensor normalised = part(normalised_), branch = part(branch_), unscaled = part(unscaled_);
    const OptionalTensor hidden = part(hidden_), grad_hidden = part(grad_hidden_);

    if (normalised) normalise(chunk, *normalised);
    if (!has_kept_ && normalised) linear_into(*hidden, *normalised, p_.fc1_weight, p_.fc1_bias);
    // h: where it was kept, or where it was just computed.
    const T* const h = has_kept_ ? data_of<const T>(kept_, chunk.first * mlp_.hidden) : data_of<const T>(hidden);
    if (wants_.branch_grad) compute_branch_grad(chunk, branch, unscaled);
    if (wants_.grad_activated) matmul_into(*grad_hidden, *branch, p_.fc2_weight);
    if (mlp_.has_grn && (wants_.grad_activated || wants_.activated)) compute_grn(chunk, h, grad_hidden);
    if (wants_.grad_hidden) {
      compute_activation_backward(chunk, h, hidden, *grad_hidden);
    } else if (wants_.activated) {
      compute_activation(chunk, h, *hidden);
    }

    if (fc2_sum_) add_product(chunk, transposed(unscaled ? *unscaled : *branch), *hidden, *fc2_sum_);
    if (wants_(kGradFc1Weight)) add_product(chunk, transposed(*grad_hidden), *normalised, results_[kGradFc1Weight]);
    if (wants_.norm) {
      matmul_into(*branch, *grad_hidden, p_.fc1_weight);
      compute_norm(chunk, *branch);
    }
  }

  // sum (+)= a b
  void add_product(const CudaChunk& chunk, const Tensor& a, const Tensor& b, const Tensor& sum) const {
    if (chunk.first == 0) return matmul_into_accumulation(sum, a, b);
    const Tensor product = torch::stable::view(*product_, {a.size(0), b.size(1)});
    matmul_into_accumulation(product, a, b);
    launch_accumulate(mlp_.op, data_of<const A>(product), data_of<A>(sum), sum.numel(),
                      mlp_.context.chip().multiprocessors, mlp_.context.stream());
  }

  // sum (+)= the first `rows` rows of partials
  void add_columns(const CudaChunk& chunk, const OptionalTensor& partials, int64_t rows, const Tensor& sum) const {
    launch_column_sum(mlp_.op, data_of<const A>(partials), data_of<A>(sum), rows, sum.numel(), mlp_.context.stream(),
                      chunk.first > 0);
  }

  void normalise(const CudaChunk& chunk, const Tensor& normalised) const {
    const LayerNormParams<T, T> params = mlp_.template norm_rows<T>(chunk, z_, mean_, rstd_, normalised);
    launch_layer_norm_normalise(mlp_.op, params, is_vector_aligned(z_), mlp_.context.chip(), mlp_.context.stream());
  }

  void compute_branch_grad(const CudaChunk& chunk, const OptionalTensor& branch, const OptionalTensor& unscaled) const {
    BranchGradParams<T> params{};
    params.grad = parameter_from(grad_, chunk.first * mlp_.channels);
    params.layer_scale = as_parameter(p_.layer_scale);
    if (wants_branch_) params.scaled = data_of<T>(branch);
    params.unscaled = data_of<T>(unscaled);
    params.partials = data_of<A>(branch_partials_);
    params.samples = mlp_.template samples_of<T>(chunk);
    params.rows = chunk.rows;
    params.channels = mlp_.channels;
    const RowPassPlan plan = plan_branch(chunk.rows);
    launch_branch_grad(mlp_.op, plan, params, mlp_.context.stream());
    if (branch_partials_) add_columns(chunk, branch_partials_, plan.row_blocks, *branch_total_);
  }

  RowPass grn_pass() const { return wants_.grad_activated ? RowPass::kGrnBackwardSums : RowPass::kGrnSums; }

  // GRN's factors, and with a gradient what its backward multiplies with and the gradients of its parameters.
  void compute_grn(const CudaChunk& chunk, const T* h, const OptionalTensor& grad) const {
    GrnSumsParams<T> sums{};
    sums.x = h;
    sums.grad = data_of<const T>(grad);
    sums.squares = data_of<A>(square_partials_);
    sums.products = data_of<A>(product_partials_);
    sums.grads = data_of<A>(grad_partials_);
    sums.samples = mlp_.template samples_of<T>(chunk);
    sums.rows = mlp_.hidden_rows(chunk);
    const RowPassPlan plan = mlp_.plan_hidden(grn_pass(), chunk, aligned_hidden());
    launch_grn_sums(mlp_.op, plan, sums, mlp_.gelu, mlp_.context.stream());
    GrnFactorsParams<A> factors{};
    factors.squares = sums.squares;
    factors.products = sums.products;
    factors.weight = as_parameter(p_.grn_weight);
    factors.factors = data_of<A>(factors_);
    factors.feedback = data_of<A>(feedback_);
    factors.weight_partials = data_of<A>(grn_weight_partials_);
    factors.parts = plan.row_blocks;
    factors.columns = mlp_.hidden;
    const int64_t images = mlp_.groups(chunk);
    launch_grn_factors(mlp_.op, factors, images, mlp_.context.stream());
    if (wants_(kGradGrnWeight)) add_columns(chunk, grn_weight_partials_, images, results_[kGradGrnWeight]);
    if (wants_(kGradGrnBias)) add_columns(chunk, grad_partials_, images * plan.row_blocks, results_[kGradGrnBias]);
  }

  GrnImage<A> grn() const {
    return {data_of<const A>(factors_), data_of<const A>(feedback_), as_parameter(p_.grn_bias)};
  }

  void compute_activation(const CudaChunk& chunk, const T* h, const Tensor& activated) const {
    ActivationParams<T> params{};
    params.x = h;
    params.y = data_of<T>(activated);
    params.grn = grn();
    params.samples = mlp_.template samples_of<T>(chunk);
    params.rows = mlp_.hidden_rows(chunk);
    launch_activation(mlp_.op, mlp_.plan_hidden(RowPass::kActivation, chunk, aligned_hidden()), params, mlp_.gelu,
                      mlp_.context.stream());
  }

  // dh in place of dg, and g, after GRN where there is one, where it is needed: in place of h unless that was kept.
  void compute_activation_backward(const CudaChunk& chunk, const T* h, const OptionalTensor& activated,
                                   const Tensor& grad) const {
    ActivationBackwardParams<T> params{};
    params.grad = data_of<const T>(grad);
    params.x = h;
    if (wants_.activated) params.y = data_of<T>(activated);
    params.grad_x = data_of<T>(grad);
    params.partials = data_of<A>(fc1_bias_partials_);
    params.grn = grn();
    params.samples = mlp_.template samples_of<T>(chunk);
    params.rows = mlp_.hidden_rows(chunk);
    const RowPassPlan plan = mlp_.plan_hidden(RowPass::kActivationBackward, chunk, aligned_hidden());
    launch_activation_backward(mlp_.op, plan, params, mlp_.gelu, mlp_.context.stream());
    if (fc1_bias_partials_)
      add_columns(chunk, fc1_bias_partials_, mlp_.groups(chunk) * plan.row_blocks, results_[kGradFc1Bias]);
  }

  void compute_norm(const CudaChunk& chunk, const Tensor& grad_normalised) const {
    LayerNormBackwardParams<T, T> params;
    params.grad = data_of<const T>(grad_normalised);
    params.x = data_of<const T>(z_, chunk.first * mlp_.channels);
    params.mean = data_of<const A>(mean_, chunk.first);
    params.rstd = data_of<const A>(rstd_, chunk.first);
    params.weight = as_parameter(p_.norm_weight);
    params.sample_scale = data_of<const A>(p_.sample_scale);
    params.first_row = chunk.first;
    params.rows_per_sample = mlp_.rows_per_sample;
    if (wants_(kGradZ)) params.grad_x = data_of<T>(results_[kGradZ], chunk.first * mlp_.channels);
    params.weight_partials = data_of<A>(norm_weight_partials_);
    params.bias_partials = data_of<A>(norm_bias_partials_);
    params.rows = chunk.rows;
    params.channels = mlp_.channels;
    const LayerNormPlan plan = plan_norm(chunk.rows);
    launch_layer_norm_backward_partials(mlp_.op, plan, params, mlp_.context.stream());
    if (norm_weight_partials_)
      add_columns(chunk, norm_weight_partials_, plan.partial_rows(), results_[kGradNormWeight]);
    if (norm_bias_partials_) add_columns(chunk, norm_bias_partials_, plan.partial_rows(), results_[kGradNormBias]);
  }

  void finish_layer_scale() const {
    LayerScaleParams<T> params{};
    params.weight = data_of<const T>(p_.fc2_weight);
    params.bias = as_parameter(p_.fc2_bias);
    params.layer_scale = as_parameter(p_.layer_scale);
    params.sums = data_of<A>(fc2_sum_);
    params.grad_sums = data_of<A>(branch_total_);
    if (wants_(kGradLayerScale)) params.grad_scale = data_of<A>(results_[kGradLayerScale]);
    params.wants_weight = wants_(kGradFc2Weight);
    params.wants_bias = wants_(kGradFc2Bias);
    params.hidden = mlp_.hidden;
    launch_layer_scale(mlp_.op, params, mlp_.channels, is_vector_aligned(p_.fc2_weight), mlp_.context.stream());
  }

  const CudaMlp& mlp_;
  const MlpParameters& p_;
  const Tensor &grad_, &z_, &mean_, &rstd_, &kept_;
  const bool has_kept_;
  const MlpWanted wants_;
  const bool wants_unscaled_, wants_branch_, wants_normalised_;
  const std::vector<Tensor> results_;

  OptionalTensor normalised_, branch_, unscaled_;  // (rows of a chunk, channels)
  OptionalTensor hidden_, grad_hidden_;            // (rows of a chunk, hidden)
  OptionalTensor norm_weight_partials_, norm_bias_partials_, fc1_bias_partials_, branch_partials_;
  OptionalTensor square_partials_, product_partials_, grad_partials_;  // of GRN, for each part of an image
  OptionalTensor factors_, feedback_, grn_weight_partials_;            // and for each image
  OptionalTensor fc2_sum_, branch_total_, product_;
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> layer_norm_mlp_backward(
    const Tensor& grad, const Tensor& z, const Tensor& mean, const Tensor& rstd, const Tensor& hidden,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const Tensor& fc1_weight,
    const OptionalTensor& fc1_bias, const OptionalTensor& grn_weight, const OptionalTensor& grn_bias,
    const Tensor& fc2_weight, const OptionalTensor& fc2_bias, const OptionalTensor& layer_scale,
    const OptionalTensor& sample_scale, const std::string& approximate, int64_t output_mask) {
  const CudaMlp mlp("layer_norm_mlp_backward", z,
                    {norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias,
                     layer_scale, sample_scale},
                    approximate, kMaxWorkspaceBytes);
  mlp.check_backward(grad, mean, rstd, hidden, output_mask);
  const bool same = accumulation_type(grad.scalar_type()) == mlp.accumulation;
  const Tensor used_grad = same ? grad : torch::stable::to(detach(grad), mlp.accumulation);
  std::vector<Tensor> r;
  dispatch_element(mlp.type, [&](auto element) {
    r = CudaMlpBackward<decltype(element)>(mlp, used_grad, z, mean, rstd, hidden, output_mask).run();
  });
  return {r[kGradZ],         r[kGradNormWeight], r[kGradNormBias],  r[kGradFc1Weight], r[kGradFc1Bias],
          r[kGradGrnWeight], r[kGradGrnBias],    r[kGradFc2Weight], r[kGradFc2Bias],   r[kGradLayerScale]};
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CUDA, m) {
  m.impl("layer_norm_mlp_backward", TORCH_BOX(&convnext_kernels::layer_norm_mlp_backward));
}
