// The matrix product that PyTorch has on CUDA only: 16-bit factors, and a result in fp32 that is never rounded to 16
// bits.
#pragma once
#include "common/gemm.h"

namespace convnext_kernels {

// result = a b, in the accumulation type of a and b. None of the tensors may be part of an autograd graph.
inline void matmul_into_accumulation(const Tensor& result, const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == result.scalar_type()) return matmul_into(result, a, b);
  StableIValue stack[4] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                           torch::stable::detail::from(result.scalar_type()), torch::stable::detail::from(result)};
  call_operator("aten::mm", "dtype_out", stack);
  torch::stable::detail::to<Tensor>(stack[0]);  // takes over the returned reference
}

}  // namespace convnext_kernels
