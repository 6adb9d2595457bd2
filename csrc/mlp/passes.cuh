// The passes of layer_norm_mlp around its matrix products: their parameters and launches. The kernels are in
// kernels_*.cuh; nvcc compiles those in cuda_hidden.cu, cuda_hidden_backward.cu, cuda_grn.cu and cuda_branch.cu only.
//
// All of them take a chunk of rows: at most kMostChunkRows (common/sample_rows.cuh), from the first row of the pointers
// on. Launches do nothing where the plan is empty. T is the type the branch is computed in.
#pragma once
#include "common/sample_rows.cuh"
#include "mlp/gelu.cuh"
#include "mlp/launch_plan.h"

namespace convnext_kernels {

// --- hidden rows: in groups, which are images with GRN, else one group is all rows

struct GroupedRows {
  int64_t groups, group_rows, columns;
};

// GRN of an image: y = g * factors + bias, and the gradient of g is grad * factors + g * feedback.
template <class A>
struct GrnImage {
  const A* factors;   // (images, columns)
  const A* feedback;  // (images, columns); not read in the forward
  Parameter bias;     // (columns)
};

template <class T>
struct ActivationParams {
  const T* x;  // (rows, columns)
  T* y;        // (rows, columns); may be x
  T* dropped;  // (rows, columns) or null: gets zeros in the rows of dropped samples; may be x
  GrnImage<Accumulation<T>> grn;
  SampleRows<Accumulation<T>> samples;
  GroupedRows rows;
};

// `plan`: plan_row_pass of row_pass_tuning(kActivation, heavy with GRN) for the groups and rows of params.rows.
template <class T>
void launch_activation(const char* op, const RowPassPlan& plan, const ActivationParams<T>& params, Gelu kind,
                       cudaStream_t stream);

// The sums that GRN's norms and its backward need: rows of partial sums, one for each part of each image.
template <class T>
struct GrnSumsParams {
  const T* x;                        // (rows, columns)
  const T* grad;                     // (rows, columns); not read in the forward
  Accumulation<T>* squares;          // (images * parts, columns): g^2, with g = GELU(x)
  Accumulation<T>*products, *grads;  // grad * g, and grad; not written in the forward
  SampleRows<Accumulation<T>> samples;
  GroupedRows rows;
};

// `plan`: of kGrnSums, or kGrnBackwardSums where there is a gradient; its row_blocks are an image's parts.
template <class T>
void launch_grn_sums(const char* op, const RowPassPlan& plan, const GrnSumsParams<T>& params, Gelu kind,
                     cudaStream_t stream);

template <class A>
struct GrnFactorsParams {
  const A* squares;    // (images, parts, columns): partial sums of g^2
  const A* products;   // the same of grad * g; null in the forward
  Parameter weight;    // (columns)
  A* factors;          // (images, columns): 1 + weight * N
  A* feedback;         // (images, columns): the gradient of g gets g * feedback through its norm; not in the forward
  A* weight_partials;  // (images, columns): an image's part of the gradient of weight; not in the forward
  int parts;
  int64_t columns;
};

template <class A>
void launch_grn_factors(const char* op, const GrnFactorsParams<A>& params, int64_t images, cudaStream_t stream);

template <class T>
struct ActivationBackwardParams {
  const T* grad;              // (rows, columns): of y
  const T* x;                 // (rows, columns)
  T* y;                       // (rows, columns): GELU(x), or GRN of it; null: not asked for; may be x
  T* grad_x;                  // (rows, columns); may be grad
  Accumulation<T>* partials;  // (groups * parts, columns): sums of grad_x, as rounded; null: not asked for
  GrnImage<Accumulation<T>> grn;
  SampleRows<Accumulation<T>> samples;
  GroupedRows rows;
};

// `plan`: of kActivationBackward, heavy with GRN.
template <class T>
void launch_activation_backward(const char* op, const RowPassPlan& plan, const ActivationBackwardParams<T>& params,
                                Gelu kind, cudaStream_t stream);

// --- rows of channels

template <class T>
constexpr ElementType element_type() {
  if (std::is_same_v<T, double>) return ElementType::kDouble;
  if (std::is_same_v<T, __half>) return ElementType::kHalf;
  return std::is_same_v<T, __nv_bfloat16> ? ElementType::kBFloat16 : ElementType::kFloat;
}

// Whether a kernel of its own adds a branch of type T to a residual, if there is one, for a result of type `y`.
template <class T>
constexpr bool has_typed_add_branch(ElementType residual, ElementType y) {
  constexpr ElementType kBranch = element_type<T>();
  if (kBranch == ElementType::kDouble) return false;
  return (y == kBranch && residual == kBranch) ||
         (y == ElementType::kFloat && (residual == kBranch || residual == ElementType::kFloat));
}

// The same for a gradient of type `grad` and a branch of type T.
template <class T>
constexpr bool has_typed_branch_grad(ElementType grad) {
  return !std::is_same_v<T, double> && (grad == element_type<T>() || grad == ElementType::kFloat);
}

template <class T>
struct AddBranchParams {
  const T* branch;        // (rows, channels)
  Parameter residual;     // (rows, channels) or absent
  Parameter layer_scale;  // (channels) or absent
  void* y;                // (rows, channels)
  ElementType y_type;
  SampleRows<Accumulation<T>> samples;
  int64_t rows, channels;
};

// `plan`: of kAddBranch, heavy where y is wider than the branch, one group. Vectors are for types that have a kernel of
// their own, and for tensors that start at multiples of 16 bytes.
template <class T>
void launch_add_branch(const char* op, const RowPassPlan& plan, const AddBranchParams<T>& params, cudaStream_t stream);

template <class T>
struct BranchGradParams {
  Parameter grad;             // (rows, channels)
  Parameter layer_scale;      // (channels) or absent
  T* scaled;                  // (rows, channels): sample_scale * layer_scale * grad; null: not asked for
  T* unscaled;                // (rows, channels): sample_scale * grad; null: not asked for
  Accumulation<T>* partials;  // (blocks along the rows, channels): sums of `unscaled`, or else of `scaled`, as rounded;
                              // null: not asked for
  SampleRows<Accumulation<T>> samples;
  int64_t rows, channels;
};

// `plan`: of kBranchGrad, one group; vectors as in launch_add_branch. Its row_blocks are the rows of the partials.
template <class T>
void launch_branch_grad(const char* op, const RowPassPlan& plan, const BranchGradParams<T>& params,
                        cudaStream_t stream);

// --- gradients of weights

// From G = sum over rows of (scale * grad)^T g, the unscaled gradient of W2, and the sums of scale * grad, of b2.
template <class T>
struct LayerScaleParams {
  const T* weight;             // W2 (channels, hidden), as the branch was computed with it
  Parameter bias;              // b2 (channels) or absent
  Parameter layer_scale;       // (channels)
  Accumulation<T>* sums;       // G (channels, hidden), or null; becomes layer_scale * G, where asked for
  Accumulation<T>* grad_sums;  // (channels): of scale * grad, or null; becomes layer_scale times that, where asked for
  Accumulation<T>*
      grad_scale;  // (channels): the gradient of layer scale, sum_k W2 G + b2 * grad_sums; null: not wanted
  bool wants_weight, wants_bias;
  int64_t hidden;
};

template <class T>
void launch_layer_scale(const char* op, const LayerScaleParams<T>& params, int64_t channels, bool aligned,
                        cudaStream_t stream);

// sum += x, both aligned to 16 bytes.
template <class A>
void launch_accumulate(const char* op, const A* x, A* sum, int64_t count, int multiprocessors, cudaStream_t stream);

}  // namespace convnext_kernels
