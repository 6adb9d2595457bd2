// The MLP kernels of this processor.
#pragma once
#include "common/cpu_capability.h"
#include "mlp/cpu_kernels.h"

namespace convnext_kernels {

inline const MlpKernels& mlp_kernels() {
#if CONVNEXT_KERNELS_X86
  switch (cpu_capability()) {
    case CpuCapability::kAvx512:
      return avx512::mlp_kernels;
    case CpuCapability::kAvx2:
      return avx2::mlp_kernels;
    case CpuCapability::kPortable:
      break;
  }
#endif
  return portable::mlp_kernels;
}

}  // namespace convnext_kernels
