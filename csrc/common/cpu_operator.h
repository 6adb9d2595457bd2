// What the entries of the row-wise CPU operators share: raw pointers for the kernel tables, and sums over rows that
// do not depend on the number of threads.
#pragma once
#include <cstdint>
#include <vector>

#include "common/cpu_capability.h"
#include "common/cpu_element.h"
#include "common/row_groups.h"
#include "common/tensor.h"

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

// The same memory outside of autograd: nothing the operator calls may depend on the caller's grad mode.
inline Tensor detach(const Tensor& tensor) {
  StableIValue stack[1] = {torch::stable::detail::from(tensor)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::detach", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A parameter as a dense tensor of `type`.
inline Tensor parameter_as(const Tensor& tensor, ScalarType type) {
  return as_type(detach(tensor), type);
}
inline OptionalTensor parameter_as(const OptionalTensor& tensor, ScalarType type) {
  return tensor ? OptionalTensor(parameter_as(*tensor, type)) : std::nullopt;
}

inline void check_parameter(const char* op, const char* argument, const Tensor& tensor,
                            const std::vector<int64_t>& shape) {
  check_cpu(op, argument, tensor);
  check_dtype(op, argument, tensor);
  check_shape(op, argument, tensor, shape);
}
inline void check_parameter(const char* op, const char* argument, const OptionalTensor& tensor,
                            const std::vector<int64_t>& shape) {
  if (tensor) check_parameter(op, argument, *tensor, shape);
}

// A dense activation, or a row statistic: (..., columns) of any rank from 1.
inline void check_activation(const char* op, const char* argument, const Tensor& tensor) {
  check_cpu(op, argument, tensor);
  check_dtype(op, argument, tensor);
  if (tensor.dim() < 1) fail(op, argument, "a tensor of rank 1 or more", "rank 0");
  if (tensor.size(-1) < 1) fail(op, argument, "at least one channel", "shape " + describe(tensor.sizes()));
  check_contiguous(op, argument, tensor);
}

inline void check_like(const char* op, const char* argument, const Tensor& tensor, const std::vector<int64_t>& shape,
                       ScalarType type) {
  check_cpu(op, argument, tensor);
  check_shape(op, argument, tensor, shape);
  if (tensor.scalar_type() != type) fail(op, argument, describe(type), describe(tensor.scalar_type()));
  check_contiguous(op, argument, tensor);
}

inline std::vector<int64_t> shape_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end());
}

inline std::vector<int64_t> shape_without_last(const Tensor& tensor) {
  auto shape = shape_of(tensor);
  shape.pop_back();
  return shape;
}

inline std::vector<int64_t> shape_with_last(const Tensor& tensor, int64_t last) {
  auto shape = shape_of(tensor);
  shape.back() = last;
  return shape;
}

// Calls f(group, first row, end row) for every group, in parallel.
template <class F>
void for_each_group(const RowGroups& groups, const F& f) {
  torch::stable::parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) f(group, groups.first_row(group), groups.end_row(group));
  });
}

}  // namespace convnext_kernels
