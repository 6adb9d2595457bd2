// GRN's sums and factors, compiled.
#include "mlp/kernels_grn.cuh"
#include "mlp/kernels_hidden.cuh"

namespace convnext_kernels {

template void launch_grn_sums(const char*, const RowPassPlan&, const GrnSumsParams<float>&, Gelu, cudaStream_t);
template void launch_grn_sums(const char*, const RowPassPlan&, const GrnSumsParams<__half>&, Gelu, cudaStream_t);
template void launch_grn_sums(const char*, const RowPassPlan&, const GrnSumsParams<__nv_bfloat16>&, Gelu, cudaStream_t);
template void launch_grn_sums(const char*, const RowPassPlan&, const GrnSumsParams<double>&, Gelu, cudaStream_t);

template void launch_grn_factors(const char*, const GrnFactorsParams<float>&, int64_t, cudaStream_t);
template void launch_grn_factors(const char*, const GrnFactorsParams<double>&, int64_t, cudaStream_t);

}  // namespace convnext_kernels
