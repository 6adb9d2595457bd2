// The backward of GELU and GRN on hidden rows, compiled.
#include "mlp/kernels_hidden.cuh"

namespace convnext_kernels {

template void launch_activation_backward(const char*, const RowPassPlan&, const ActivationBackwardParams<float>&, Gelu,
                                         cudaStream_t);
template void launch_activation_backward(const char*, const RowPassPlan&, const ActivationBackwardParams<__half>&, Gelu,
                                         cudaStream_t);
template void launch_activation_backward(const char*, const RowPassPlan&,
                                         const ActivationBackwardParams<__nv_bfloat16>&, Gelu, cudaStream_t);
template void launch_activation_backward(const char*, const RowPassPlan&, const ActivationBackwardParams<double>&, Gelu,
                                         cudaStream_t);

}  // namespace convnext_kernels
