// The rows of the samples that drop path keeps, numbered as if they were dense.
#pragma once
#include <vector>

#include "common/cpu_operator.h"

namespace convnext_kernels {

class LiveRows {
 public:
  LiveRows(const OptionalTensor& sample_scale, int64_t samples, int64_t rows_per_sample)
      : samples_(samples), rows_per_sample_(rows_per_sample), scaled_(sample_scale.has_value()) {
    if (!scaled_) return;
    const Elements data(*sample_scale);
    for (int64_t sample = 0; sample < samples; ++sample) {
      const double scale = data.type() == Element::kFloat64 ? *static_cast<const double*>(data.at(sample))
                                                            : *static_cast<const float*>(data.at(sample));
      if (scale == 0) {
        dropped_.push_back(sample);
      } else {
        live_.push_back(sample);
        scales_.push_back(scale);
      }
    }
  }

  int64_t count() const { return (scaled_ ? static_cast<int64_t>(live_.size()) : samples_) * rows_per_sample_; }
  const std::vector<int64_t>& dropped_samples() const { return dropped_; }

  // Where a live row is in the tensor.
  int64_t position(int64_t row) const {
    return scaled_ ? live_[row / rows_per_sample_] * rows_per_sample_ + row % rows_per_sample_ : row;
  }

  // Calls f(live row, position, rows, scale) for stretches of [first, end) that lie in one sample.
  template <class F>
  void for_each_run(int64_t first, int64_t end, const F& f) const {
    if (!scaled_) return f(first, first, end - first, 1.0);
    while (first < end) {
      const int64_t sample = first / rows_per_sample_;
      const int64_t rows = std::min(end, (sample + 1) * rows_per_sample_) - first;
      f(first, position(first), rows, scales_[sample]);
      first += rows;
    }
  }

 private:
  int64_t samples_, rows_per_sample_;
  bool scaled_;
  std::vector<int64_t> live_, dropped_;
  std::vector<double> scales_;  // of the live samples
};

}  // namespace convnext_kernels
