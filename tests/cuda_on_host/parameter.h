// A parameter of any element type, or none, for the test programs.
#pragma once
#include "harness.h"

namespace harness {

class TestParameter {
 public:
  // `type`: as for with_type, or "none". `absent`: what operator[] says of none.
  TestParameter(const std::string& type, size_t count, unsigned seed, const char* name, double absent = 0)
      : absent_(absent) {
    using convnext_kernels::ElementType;
    if (type == "none") return;
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    with_type(type, [&](auto element) {
      using T = decltype(element);
      memory_ = std::make_unique<emu::Buffer<unsigned char>>(count * sizeof(T), name);
      auto* data = reinterpret_cast<T*>(memory_->data());
      for (size_t i = 0; i < count; ++i) {
        data[i] = from_double<T>(normal(random));
        values_.push_back(to_double(data[i]));
      }
    });
    const std::map<std::string, ElementType> types = {{"float", ElementType::kFloat},
                                                      {"double", ElementType::kDouble},
                                                      {"half", ElementType::kHalf},
                                                      {"bfloat16", ElementType::kBFloat16}};
    parameter_ = {memory_->data(), types.at(type)};
  }
  convnext_kernels::Parameter parameter() const { return parameter_; }
  double operator[](size_t i) const { return parameter_.data ? values_[i] : absent_; }

 private:
  double absent_;
  std::unique_ptr<emu::Buffer<unsigned char>> memory_;
  std::vector<double> values_;
  convnext_kernels::Parameter parameter_;
};

}  // namespace harness
