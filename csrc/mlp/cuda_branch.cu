// Layer scale, drop path and residual, their backward, and the passes over gradients of weights, compiled.
#include "mlp/kernels_branch.cuh"
#include "mlp/kernels_weights.cuh"

namespace convnext_kernels {

template void launch_add_branch(const char*, const RowPassPlan&, const AddBranchParams<float>&, cudaStream_t);
template void launch_add_branch(const char*, const RowPassPlan&, const AddBranchParams<__half>&, cudaStream_t);
template void launch_add_branch(const char*, const RowPassPlan&, const AddBranchParams<__nv_bfloat16>&, cudaStream_t);
template void launch_add_branch(const char*, const RowPassPlan&, const AddBranchParams<double>&, cudaStream_t);

template void launch_branch_grad(const char*, const RowPassPlan&, const BranchGradParams<float>&, cudaStream_t);
template void launch_branch_grad(const char*, const RowPassPlan&, const BranchGradParams<__half>&, cudaStream_t);
template void launch_branch_grad(const char*, const RowPassPlan&, const BranchGradParams<__nv_bfloat16>&, cudaStream_t);
template void launch_branch_grad(const char*, const RowPassPlan&, const BranchGradParams<double>&, cudaStream_t);

template void launch_layer_scale(const char*, const LayerScaleParams<float>&, int64_t, bool, cudaStream_t);
template void launch_layer_scale(const char*, const LayerScaleParams<__half>&, int64_t, bool, cudaStream_t);
template void launch_layer_scale(const char*, const LayerScaleParams<__nv_bfloat16>&, int64_t, bool, cudaStream_t);
template void launch_layer_scale(const char*, const LayerScaleParams<double>&, int64_t, bool, cudaStream_t);

template void launch_accumulate(const char*, const float*, float*, int64_t, int, cudaStream_t);
template void launch_accumulate(const char*, const double*, double*, int64_t, int, cudaStream_t);

}  // namespace convnext_kernels
