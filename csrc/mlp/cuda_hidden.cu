// GELU and GRN applied to hidden rows, compiled.
#include "mlp/kernels_hidden.cuh"

namespace convnext_kernels {

template void launch_activation(const char*, const RowPassPlan&, const ActivationParams<float>&, Gelu, cudaStream_t);
template void launch_activation(const char*, const RowPassPlan&, const ActivationParams<__half>&, Gelu, cudaStream_t);
template void launch_activation(const char*, const RowPassPlan&, const ActivationParams<__nv_bfloat16>&, Gelu,
                                cudaStream_t);
template void launch_activation(const char*, const RowPassPlan&, const ActivationParams<double>&, Gelu, cudaStream_t);

}  // namespace convnext_kernels
