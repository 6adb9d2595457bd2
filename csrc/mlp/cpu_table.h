// The MLP kernels of this processor.
#pragma once
#include "common/cpu_capability.h"
#include "mlp/cpu_kernels.h"

namespace convnext_kernels {

inline const MlpKernels& mlp_kernels() {
#if CONVNEXT_KERNELS_X86
  return of_this_processor(
      {&portable::mlp_kernels, &avx2::mlp_kernels, &avx512::mlp_kernels, &avx512_bf16::mlp_kernels});
#else
  return portable::mlp_kernels;
#endif
}

}  // namespace convnext_kernels
