// The rows that the cases of layer_norm_mlp's passes work on.
#pragma once
#include "common/sample_rows.cuh"
#include "harness.h"

namespace {

using namespace convnext_kernels;
using harness::Options;

template <class A>
constexpr double kUnit = std::is_same_v<A, double> ? 0x1p-53 : 0x1p-24;

// A chunk of rows. Options: samples, sample_rows (of one); first: rows of the first sample before the chunk; columns;
// drop: every third sample from this one on, whose rows hold NaN (-1: there is no drop path); offset: elements by which
// the tensors miss 16-byte alignment; multiprocessors of the chip.
struct Rows {
  explicit Rows(const Options& options)
      : samples(options.number("samples")),
        sample_rows(options.number("sample_rows")),
        first(options.number("first")),
        columns(options.number("columns")),
        drop(options.number("drop")),
        offset(options.number("offset")),
        multiprocessors(static_cast<int>(options.number("multiprocessors"))),
        count(std::max<int64_t>(samples * sample_rows - first, 0)) {}

  size_t elements() const { return static_cast<size_t>(count * columns); }
  size_t memory() const { return elements() + static_cast<size_t>(offset); }
  double scale_of(int64_t sample) const {
    if (drop < 0) return 1;
    return sample % 3 == drop % 3 ? 0 : 1.25 + static_cast<double>(sample % 2);
  }
  double scale(size_t element) const {
    return scale_of((static_cast<int64_t>(element) / columns + first) / sample_rows);
  }
  template <class T>
  void fill(emu::Buffer<T>& buffer, unsigned seed, double size) const {
    harness::fill_normal(buffer, seed, size);
    for (size_t i = 0; i < elements(); ++i)
      if (scale(i) == 0) buffer[i + offset] = harness::from_double<T>(std::nan(""));
  }

  int64_t samples, sample_rows, first, columns, drop, offset;
  int multiprocessors;
  int64_t count;
};

// The drop-path vector as the kernels get it.
template <class A>
class Scales {
 public:
  explicit Scales(const Rows& rows) : rows_(rows), scale_(static_cast<size_t>(rows.samples), "sample_scale") {
    for (size_t i = 0; i < scale_.size(); ++i) scale_[i] = static_cast<A>(rows.scale_of(static_cast<int64_t>(i)));
  }
  SampleRows<A> rows() {
    return sample_rows<A>(rows_.drop < 0 ? nullptr : scale_.data(), rows_.first, rows_.sample_rows);
  }

 private:
  const Rows& rows_;
  emu::Buffer<A> scale_;
};

}  // namespace
