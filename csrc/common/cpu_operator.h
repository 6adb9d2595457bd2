// What the entries of the row-wise CPU operators share: raw pointers for the kernel tables, and sums over rows that
// do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <vector>

#include "common/cpu_capability.h"
#include "common/cpu_element.h"
#include "common/operator.h"
#include "common/row_groups.h"

namespace convnext_kernels {

inline Element element_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    default:
      return Element::kFloat32;
  }
}

// A dense tensor as kernels see it; null where there is none.
class Elements {
 public:
  Elements() = default;
  explicit Elements(const Tensor& tensor)
      : data_(static_cast<char*>(tensor.data_ptr())),
        type_(element_of(tensor.scalar_type())),
        size_(static_cast<int64_t>(tensor.element_size())) {}
  explicit Elements(const OptionalTensor& tensor) {
    if (tensor) *this = Elements(*tensor);
  }
  Element type() const { return type_; }
  void* at(int64_t index) const { return data_ ? data_ + index * size_ : nullptr; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  char* data_ = nullptr;
  Element type_ = Element::kFloat32;
  int64_t size_ = 0;
};

inline void check_on_cpu(const char* op, const char* argument, const Tensor& tensor, const Tensor&) {
  check_cpu(op, argument, tensor);
}

inline void check_parameter(const char* op, const char* argument, const OptionalTensor& tensor,
                            const std::vector<int64_t>& shape) {
  if (tensor) Checks{op, check_on_cpu, *tensor}.parameter(argument, *tensor, shape);
}
inline void check_activation(const char* op, const char* argument, const Tensor& tensor) {
  Checks{op, check_on_cpu, tensor}.activation(argument, tensor);
}
inline void check_like(const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& shape,
                       ScalarType type) {
  Checks{op, check_on_cpu, tensor}.like(argument, tensor, shape, type);
}

// Calls f(group, first row, end row) for every group, in parallel.
template <class F>
void for_each_group(const RowGroups& groups, const F& f) {
  torch::stable::parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) f(group, groups.first_row(group), groups.end_row(group));
  });
}

}  // namespace convnext_kernels
