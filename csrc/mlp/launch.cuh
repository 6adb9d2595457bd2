// From a plan to the kernel that fits it: compile-time constants for vector sizes and kinds of GELU.
#pragma once
#include "mlp/gelu.cuh"
#include "mlp/launch_plan.h"
#include "mlp/row_walk.cuh"

namespace convnext_kernels {

inline dim3 block_of(const RowPassPlan& plan) {
  return dim3(static_cast<unsigned>(plan.block_columns), static_cast<unsigned>(plan.block_rows));
}

// Shared memory for sum_of_block.
template <class A>
size_t block_sum_bytes(const RowPassPlan& plan) {
  return shared_piece(block_sum_elements(plan.block_columns, plan.block_rows, plan.vector_size) * sizeof(A));
}

// Calls function(vector size), a compile-time constant.
template <class T, class Function>
void dispatch_vector_size(int vector_size, Function&& function) {
  constexpr int kWide = std::is_same_v<T, double> ? 1 : kVectorBytes / static_cast<int>(sizeof(T));
  if (vector_size == kWide) return function(std::integral_constant<int, kWide>{});
  function(std::integral_constant<int, 1>{});
}

// Calls function(vector size, kind of GELU), both as compile-time constants.
template <class T, class Function>
void dispatch_gelu(const RowPassPlan& plan, Gelu kind, Function&& function) {
  dispatch_vector_size<T>(plan.vector_size, [&](auto size) {
    if (kind == Gelu::kErf) {
      function(size, std::integral_constant<Gelu, Gelu::kErf>{});
    } else {
      function(size, std::integral_constant<Gelu, Gelu::kTanh>{});
    }
  });
}

}  // namespace convnext_kernels
