// The table of LayerNorm kernels that each capability's build of cpu_kernels.cpp fills. Plain declarations: an inline
// function here would be compiled with every instruction set, and the linker keeps one.
#pragma once
#include <cstdint>

#include "common/cpu_element.h"

namespace convnext_kernels {

// Rows are dense, `channels` elements each. weight, bias, mean, rstd and sums have x's accumulation type, which is also
// that of the other element type. weight and bias may be null.
struct LayerNormKernels {
  // y = (x - mean) * rstd * weight + bias, and the statistics.
  void (*forward)(Element x_type, Element y_type, int64_t rows, int64_t channels, double eps, const void* x,
                  const void* weight, const void* bias, void* y, void* mean, void* rstd);
  // y again from the statistics.
  void (*normalise)(Element x_type, Element y_type, int64_t rows, int64_t channels, const void* x, const void* mean,
                    const void* rstd, const void* weight, const void* bias, void* y);
  // grad_x in x's type; adds to weight_sums and bias_sums (channels). Each of the three may be null.
  void (*backward)(Element grad_type, Element x_type, int64_t rows, int64_t channels, const void* grad, const void* x,
                   const void* mean, const void* rstd, const void* weight, void* grad_x, void* weight_sums,
                   void* bias_sums);
  // result (columns) = the sum over `parts` rows of partial sums, from the first to the last; plus what it holds where
  // `add`. `type` is an accumulation type.
  void (*sum_parts)(Element type, int64_t parts, int64_t columns, const void* partial_sums, bool add, void* result);
};

}  // namespace convnext_kernels

namespace convnext_kernels::portable {
extern const LayerNormKernels layer_norm_kernels;
}
#if CONVNEXT_KERNELS_X86
namespace convnext_kernels::avx2 {
extern const LayerNormKernels layer_norm_kernels;
}
namespace convnext_kernels::avx512 {
extern const LayerNormKernels layer_norm_kernels;
}
namespace convnext_kernels::avx512_bf16 {
extern const LayerNormKernels layer_norm_kernels;
}
#endif
