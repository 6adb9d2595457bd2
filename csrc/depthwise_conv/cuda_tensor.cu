// The tensor-core kernels of the depthwise convolution, compiled beside the others (cuda.cu).
#include "depthwise_conv/kernels_tensor_convolution.cuh"
#include "depthwise_conv/kernels_tensor_weight_gradient.cuh"

namespace convnext_kernels::depthwise_conv {

template void launch_tensor_convolution(const char*, const TensorConvolutionParams<__half, __half>&, cudaStream_t);
template void launch_tensor_convolution(const char*, const TensorConvolutionParams<__half, float>&, cudaStream_t);
template void launch_tensor_convolution(const char*, const TensorConvolutionParams<__nv_bfloat16, __nv_bfloat16>&,
                                        cudaStream_t);
template void launch_tensor_convolution(const char*, const TensorConvolutionParams<__nv_bfloat16, float>&,
                                        cudaStream_t);
template void launch_tensor_convolution(const char*, const TensorConvolutionParams<__half, __half, float>&,
                                        cudaStream_t);
template void launch_tensor_convolution(const char*,
                                        const TensorConvolutionParams<__nv_bfloat16, __nv_bfloat16, float>&,
                                        cudaStream_t);
template void launch_tensor_weight_gradient(const char*, const TensorWeightGradientParams<__half>&, cudaStream_t);
template void launch_tensor_weight_gradient(const char*, const TensorWeightGradientParams<__nv_bfloat16>&,
                                            cudaStream_t);

}  // namespace convnext_kernels::depthwise_conv
