// The LayerNorm kernels of this processor, and sums over rows made of the partial sums of groups.
#pragma once
#include <cstring>

#include "common/cpu_operator.h"
#include "layer_norm/cpu_kernels.h"

namespace convnext_kernels {

inline const LayerNormKernels& layer_norm_kernels() {
#if CONVNEXT_KERNELS_X86
  return of_this_processor({&portable::layer_norm_kernels, &avx2::layer_norm_kernels, &avx512::layer_norm_kernels,
                            &avx512_bf16::layer_norm_kernels});
#else
  return portable::layer_norm_kernels;
#endif
}

// Partial sums (parts, columns) of the accumulation type; without memory, and all pointers null, where not `wanted`.
class ColumnSums {
 public:
  ColumnSums() = default;
  ColumnSums(const Tensor& like, bool wanted, int64_t parts, int64_t columns, ScalarType type) : columns_(columns) {
    if (!wanted) return;
    // A spare row keeps the pointer valid where there are no parts.
    parts_ = Elements(tensor_.emplace(empty(like, {parts + 1, columns}, type)));
  }
  explicit operator bool() const { return tensor_.has_value(); }

  void* part(int64_t index) const { return parts_.at(index * columns_); }

  // The part, set to zero first where `fresh`.
  void* part(int64_t index, bool fresh) const {
    void* start = part(index);
    if (start && fresh) std::memset(start, 0, static_cast<size_t>(columns_) * tensor_->element_size());
    return start;
  }

  // result (columns) = the sum of `count` parts from `first` on.
  void sum(int64_t first, int64_t count, void* result) const {
    layer_norm_kernels().sum_parts(parts_.type(), count, columns_, part(first), false, result);
  }

  // result (columns) = the sum of the first `count` parts, in their order; or that is added to what it holds.
  void finish(int64_t count, bool add, const Tensor& result) const {
    layer_norm_kernels().sum_parts(parts_.type(), count, columns_, parts_.at(0), add, Elements(result).at(0));
  }

 private:
  int64_t columns_ = 0;
  OptionalTensor tensor_;
  Elements parts_;
};

}  // namespace convnext_kernels
