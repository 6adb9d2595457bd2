// The table of kernels around the MLP's matrix products that each capability's build of cpu_kernels.cpp fills. Plain
// declarations: an inline function here would be compiled with every instruction set, and the linker keeps one.
#pragma once
#include <cstdint>

#include "common/cpu_element.h"

namespace convnext_kernels {

// Dense rows of hidden values, and what the backward of GELU (and of GRN, where `factors` is not null) makes of them.
// All vectors are `columns` long and of the accumulation type.
struct HiddenRows {
  Element type;
  bool tanh;
  int64_t rows, columns;
  const void* x;     // before the activation
  const void* bias;  // added to x; may be null
  const void* grad;  // of the result; may be null
  void* result;      // GRN(GELU(x + bias)); may be null; may be x
  void* grad_x;      // null only where grad is; may be grad
  void* grad_sums;   // grad_x, as rounded, is added; may be null
  // GRN: result = g * factors + grn_bias; the gradient of g is grad * factors + g * feedback.
  const void* factors;
  const void* grn_bias;
  const void* feedback;
};

// Sums over rows for the backward of GRN, with g = GELU(x). Each is added to.
struct GrnSums {
  void* squares;   // g^2
  void* products;  // grad * g; null where grad is
  void* grads;     // grad; null where grad is
};

struct MlpKernels {
  // y = GELU(x + bias); y^2, as rounded, is added to `squares`. bias and squares may be null, y may be x.
  void (*gelu)(Element type, bool tanh, int64_t rows, int64_t columns, const void* x, const void* bias, void* y,
               void* squares);
  // x^2 is added to `squares`.
  void (*squares)(Element type, int64_t rows, int64_t columns, const void* x, void* squares);
  // In place: g * factors + bias.
  void (*apply_grn)(Element type, int64_t rows, int64_t columns, const void* factors, const void* bias, void* g);
  void (*gelu_backward)(const HiddenRows& hidden);
  void (*grn_backward_sums)(const HiddenRows& hidden, const GrnSums& sums);

  // y = residual + scale * layer_scale * (branch + bias), where any of the four tensors may be null.
  void (*add_branch)(Element branch_type, Element residual_type, Element y_type, int64_t rows, int64_t columns,
                     const void* branch, const void* bias, const void* residual, const void* layer_scale, double scale,
                     void* y);
  // grad_branch = scale * layer_scale * grad; added, as rounded, to `sums`. layer_scale and sums may be null.
  void (*branch_grad)(Element grad_type, Element branch_type, int64_t rows, int64_t columns, const void* grad,
                      const void* layer_scale, double scale, void* grad_branch, void* sums);
  // scale * grad * branch is added to `sums`.
  void (*layer_scale_grad)(Element grad_type, Element branch_type, int64_t rows, int64_t columns, const void* grad,
                           const void* branch, double scale, void* sums);

  // y[c][r] = x[r][c], where a row of y has `y_columns`: x may be some of the rows that become columns of y.
  void (*transpose)(Element x_type, Element y_type, int64_t rows, int64_t columns, const void* x, int64_t y_columns,
                    void* y);
  // sum = x, or sum += x where `add`; sum has the accumulation type.
  void (*accumulate)(Element type, int64_t count, const void* x, bool add, void* sum);
  // sum += x * y, vectors; y and sum of the accumulation type.
  void (*add_product)(Element type, int64_t count, const void* x, const void* y, void* sum);
  // result[i][j] = scale[i] * x[i][j], in place or not.
  void (*scale_rows)(Element x_type, Element result_type, int64_t rows, int64_t columns, const void* x,
                     const void* scale, void* result);
  // dots[i] = sum_j x[i][j] y[i][j], in the accumulation type.
  void (*dot_rows)(Element x_type, Element y_type, int64_t rows, int64_t columns, const void* x, const void* y,
                   void* dots);
};

}  // namespace convnext_kernels

namespace convnext_kernels::portable {
extern const MlpKernels mlp_kernels;
}
#if CONVNEXT_KERNELS_X86
namespace convnext_kernels::avx2 {
extern const MlpKernels mlp_kernels;
}
namespace convnext_kernels::avx512 {
extern const MlpKernels mlp_kernels;
}
namespace convnext_kernels::avx512_bf16 {
extern const MlpKernels mlp_kernels;
}
#endif
