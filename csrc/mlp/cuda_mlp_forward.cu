// layer_norm_mlp on CUDA tensors: the passes around PyTorch's matrix products.
#include "mlp/cuda_mlp.cuh"

namespace convnext_kernels {
namespace {

// Per chunk: the normalised rows, h = a W1^T + b1, g = GELU(h) (with GRN: the sums of h's images, their factors, and
// then GELU and GRN in one), g W2^T + b2, and the residual.
template <class T>
class CudaMlpForward {
  using A = Accumulation<T>;

 public:
  CudaMlpForward(const CudaMlp& mlp, const Tensor& z, const OptionalTensor& residual, double eps, ScalarType y_type,
                 bool keep_hidden)
      : mlp_(mlp),
        p_(mlp.parameters),
        z_(z),
        residual_(residual),
        eps_(static_cast<A>(eps)),
        keep_hidden_(keep_hidden),
        y_(empty(z, shape_of(z), y_type)),
        mean_(empty(z, shape_without_last(z), mlp.accumulation)),
        rstd_(empty(z, shape_without_last(z), mlp.accumulation)),
        kept_(empty(z, keep_hidden ? shape_with_last(z, mlp.hidden) : std::vector<int64_t>{0}, mlp.type)) {}

  void run() {
    MlpWorkspace workspace;
    workspace.row_bytes = (mlp_.channels + mlp_.hidden) * static_cast<int64_t>(mlp_.element_bytes);
    if (mlp_.has_grn) {
      workspace.image_bytes = 2 * mlp_.hidden * mlp_.sum_bytes;
      workspace.call_bytes = mlp_.most_hidden_partials(RowPass::kGrnSums) * mlp_.hidden * mlp_.sum_bytes;
    }
    const auto chunks = mlp_.chunks(workspace);
    if (chunks.empty()) return;
    narrow_ = mlp_.workspace(chunks.front().rows, mlp_.channels);
    wide_ = mlp_.workspace(chunks.front().rows, mlp_.hidden);
    if (mlp_.has_grn) {
      int64_t parts = 0;
      for (const CudaChunk& chunk : {chunks.front(), chunks.back()})
        parts = std::max(parts, mlp_.groups(chunk) * mlp_.plan_hidden(RowPass::kGrnSums, chunk, true).row_blocks);
      squares_ = mlp_.sums(parts, mlp_.hidden);
      factors_ = mlp_.sums(mlp_.groups(chunks.front()), mlp_.hidden);
    }
    if (keep_hidden_) kept_rows_ = torch::stable::view(kept_, {mlp_.rows(), mlp_.hidden});
    for (const CudaChunk& chunk : chunks) run_chunk(chunk);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> results(ScalarType out_dtype) const {
    return {y_.scalar_type() == out_dtype ? y_ : torch::stable::to(y_, out_dtype), mean_, rstd_, kept_};
  }

 private:
  void run_chunk(const CudaChunk& chunk) const {
    const Tensor narrow = rows_of(*narrow_, 0, chunk.rows), activated = rows_of(*wide_, 0, chunk.rows);
    // Rows to be kept are written where they belong.
    const Tensor hidden = keep_hidden_ ? rows_of(*kept_rows_, chunk.first, chunk.rows) : activated;
    normalise(chunk, narrow);
    linear_into(hidden, narrow, p_.fc1_weight, p_.fc1_bias);
    activate(chunk, hidden, activated);
    linear_into(narrow, activated, p_.fc2_weight, p_.fc2_bias);
    add_branch(chunk, narrow);
  }

  void normalise(const CudaChunk& chunk, const Tensor& normalised) const {
    LayerNormParams<T, T> params = mlp_.template norm_rows<T>(chunk, z_, mean_, rstd_, normalised);
    params.eps = eps_;
    launch_layer_norm(mlp_.op, params, is_vector_aligned(z_), mlp_.context.chip(), mlp_.context.stream());
  }

  void activate(const CudaChunk& chunk, const Tensor& hidden, const Tensor& activated) const {
    ActivationParams<T> params{};
    params.x = data_of<const T>(hidden);
    params.y = data_of<T>(activated);
    if (keep_hidden_ && p_.sample_scale) params.dropped = data_of<T>(hidden);
    params.samples = mlp_.template samples_of<T>(chunk);
    params.rows = mlp_.hidden_rows(chunk);
    if (mlp_.has_grn) {
      GrnSumsParams<T> sums{};
      sums.x = params.x;
      sums.squares = data_of<A>(squares_);
      sums.samples = params.samples;
      sums.rows = params.rows;
      const RowPassPlan plan = mlp_.plan_hidden(RowPass::kGrnSums, chunk, true);
      launch_grn_sums(mlp_.op, plan, sums, mlp_.gelu, mlp_.context.stream());
      GrnFactorsParams<A> factors{};
      factors.squares = sums.squares;
      factors.weight = as_parameter(p_.grn_weight);
      factors.factors = data_of<A>(factors_);
      factors.parts = plan.row_blocks;
      factors.columns = mlp_.hidden;
      launch_grn_factors(mlp_.op, factors, mlp_.groups(chunk), mlp_.context.stream());
      params.grn.factors = factors.factors;
      params.grn.bias = as_parameter(p_.grn_bias);
    }
    launch_activation(mlp_.op, mlp_.plan_hidden(RowPass::kActivation, chunk, true), params, mlp_.gelu,
                      mlp_.context.stream());
  }

  void add_branch(const CudaChunk& chunk, const Tensor& branch) const {
    AddBranchParams<T> params{};
    params.branch = data_of<const T>(branch);
    params.residual = parameter_from(residual_, chunk.first * mlp_.channels);
    params.layer_scale = as_parameter(p_.layer_scale);
    const Parameter y = parameter_from(y_, chunk.first * mlp_.channels);
    params.y = const_cast<void*>(y.data);
    params.y_type = y.type;
    params.samples = mlp_.template samples_of<T>(chunk);
    params.rows = chunk.rows;
    params.channels = mlp_.channels;
    const bool vectors = has_typed_add_branch<T>(residual_ ? params.residual.type : y.type, y.type) &&
                         (!residual_ || is_vector_aligned(*residual_));
    const bool heavy = y_.element_size() > mlp_.element_bytes;
    launch_add_branch(mlp_.op, mlp_.plan_channels(RowPass::kAddBranch, heavy, chunk.rows, vectors), params,
                      mlp_.context.stream());
  }

  const CudaMlp& mlp_;
  const MlpParameters& p_;
  const Tensor& z_;
  const OptionalTensor& residual_;
  const A eps_;
  const bool keep_hidden_;
  const Tensor y_, mean_, rstd_, kept_;
  OptionalTensor kept_rows_;          // (rows, hidden)
  OptionalTensor narrow_;             // the normalised rows, then the branch's result
  OptionalTensor wide_;               // h, then g
  OptionalTensor squares_, factors_;  // of GRN
};

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm_mlp(
    const Tensor& z, const OptionalTensor& residual, const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
    const Tensor& fc1_weight, const OptionalTensor& fc1_bias, const OptionalTensor& grn_weight,
    const OptionalTensor& grn_bias, const Tensor& fc2_weight, const OptionalTensor& fc2_bias,
    const OptionalTensor& layer_scale, const OptionalTensor& sample_scale, double eps, const std::string& approximate,
    ScalarType out_dtype, bool keep_hidden) {
  const CudaMlp mlp("layer_norm_mlp", z,
                    {norm_weight, norm_bias, fc1_weight, fc1_bias, grn_weight, grn_bias, fc2_weight, fc2_bias,
                     layer_scale, sample_scale},
                    approximate, kMaxWorkspaceBytes);
  mlp.check_forward(residual, out_dtype);
  const ScalarType y_type = accumulation_type(out_dtype) == mlp.accumulation ? out_dtype : mlp.accumulation;
  std::tuple<Tensor, Tensor, Tensor, Tensor> results;
  dispatch_element(mlp.type, [&](auto element) {
    CudaMlpForward<decltype(element)> forward(mlp, z, residual, eps, y_type, keep_hidden);
    forward.run();
    results = forward.results(out_dtype);
  });
  return results;
}

}  // namespace
}  // namespace convnext_kernels

STABLE_TORCH_LIBRARY_IMPL(convnext_kernels, CUDA, m) {
  m.impl("layer_norm_mlp", TORCH_BOX(&convnext_kernels::layer_norm_mlp));
}
