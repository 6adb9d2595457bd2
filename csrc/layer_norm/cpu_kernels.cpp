// Layer normalisation on the CPU, row by row, a vector of channels at a time. Compiled once per capability.
#include "layer_norm/cpu_kernels.h"

#include "common/cpu_loops.h"

namespace convnext_kernels::CPU_CAPABILITY {
namespace {

template <int kRows, class X, class Y, class A>
CK_INLINE void normalise_rows(int64_t channels, const X* x, const A* mean, const A* rstd, const A* weight,
                              const A* bias, Y* y) {
  const auto sweep = [&](auto affine) {
    for_columns<A>(channels, [&](int64_t c, auto part) {
      for (int r = 0; r < kRows; ++r) {
        const Vector<A> hat = (load(x + r * channels + c, part) - mean[r]) * rstd[r];
        store(y + r * channels + c, affine(hat, c, part), part);
      }
    });
  };
  // A loop a case: with a branch in it the compiler would fuse multiplications and additions in one place and not in
  // another, and backward's normalised rows would not be forward's to the bit.
  if (weight && bias) {
    sweep([&](Vector<A> hat, int64_t c, auto part) { return hat * load(weight + c, part) + load(bias + c, part); });
  } else if (weight) {
    sweep([&](Vector<A> hat, int64_t c, auto part) { return hat * load(weight + c, part); });
  } else if (bias) {
    sweep([&](Vector<A> hat, int64_t c, auto part) { return hat + load(bias + c, part); });
  } else {
    sweep([](Vector<A> hat, int64_t, auto) { return hat; });
  }
}

// In longer rows, of values that are not rounded to 16 bits, a second look is taken at the mean: of all but equal
// values nothing would be seen but what the first sum's own rounding has left in it.
template <class A>
constexpr int64_t kShortRow = 8 * kLanes<A>;

// Rows of X that are taken through a sweep together: a row's sums are one chain of additions, and those of several rows
// go on under one another; what belongs to a column is read once for all. As many as the registers hold, but one where
// memory's rate is the limit: rows of fp32 and fp64 are then read faster one after the other.
template <class X>
constexpr int kRowsTogether = sizeof(X) > 2 ? 1 : kVectorBytes / 16;

template <class A>
CK_INLINE A reciprocal_root(A value) {
  if constexpr (__is_same(A, double)) {
    return 1 / __builtin_sqrt(value);
  } else {
    return 1 / __builtin_sqrtf(value);
  }
}

template <int kRows, class X, class Y>
CK_INLINE void forward_rows(int64_t channels, double eps, const X* x, const Accumulation<X>* weight,
                            const Accumulation<X>* bias, Y* y, Accumulation<X>* means, Accumulation<X>* rstds) {
  using A = Accumulation<X>;
  const A count = static_cast<A>(channels);
  Vector<A> sums[kRows] = {};
  for_columns<A>(channels, [&](int64_t c, auto part) {
    for (int r = 0; r < kRows; ++r) sums[r] += load(x + r * channels + c, part);
  });
  A mean[kRows], rstd[kRows];
  for (int r = 0; r < kRows; ++r) mean[r] = horizontal_sum<A>(sums[r]) / count;

  // A pass of its own for the variance: E[x^2] - E[x]^2 would cancel.
  const bool twice = sizeof(X) == sizeof(A) && channels > kShortRow<A>;
  Vector<A> squares[kRows] = {}, rests[kRows] = {};
  for_columns<A>(channels, [&](int64_t c, auto part) {
    for (int r = 0; r < kRows; ++r) {
      const Vector<A> centred = existing<A>(load(x + r * channels + c, part) - mean[r], part);
      squares[r] += centred * centred;
      if (twice) rests[r] += centred;
    }
  });
  for (int r = 0; r < kRows; ++r) {
    const A correction = twice ? horizontal_sum<A>(rests[r]) / count : 0;
    mean[r] += correction;
    const A square = horizontal_sum<A>(squares[r]) / count - correction * correction;
    rstd[r] = reciprocal_root((square < 0 ? 0 : square) + static_cast<A>(eps));  // a NaN stays
    means[r] = mean[r];
    rstds[r] = rstd[r];
  }
  normalise_rows<kRows>(channels, x, mean, rstd, weight, bias, y);
}

template <class X, class Y>
void forward_as(int64_t rows, int64_t channels, double eps, const X* x, const void* weights, const void* biases, Y* y,
                void* means, void* rstds) {
  using A = Accumulation<X>;
  const auto* weight = static_cast<const A*>(weights);
  const auto* bias = static_cast<const A*>(biases);
  auto* mean = static_cast<A*>(means);
  auto* rstd = static_cast<A*>(rstds);
  int64_t row = 0;
  for (; row + kRowsTogether<X> <= rows; row += kRowsTogether<X>)
    forward_rows<kRowsTogether<X>>(channels, eps, x + row * channels, weight, bias, y + row * channels, mean + row,
                                   rstd + row);
  for (; row < rows; ++row)
    forward_rows<1>(channels, eps, x + row * channels, weight, bias, y + row * channels, mean + row, rstd + row);
}

void forward(Element x_type, Element y_type, int64_t rows, int64_t channels, double eps, const void* x,
             const void* weight, const void* bias, void* y, void* mean, void* rstd) {
  with_elements(x_type, y_type, [&](auto x_tag, auto y_tag) {
    using X = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    forward_as(rows, channels, eps, static_cast<const X*>(x), weight, bias, static_cast<Y*>(y), mean, rstd);
  });
}

template <class X, class Y>
void normalise_as(int64_t rows, int64_t channels, const X* x, const void* means, const void* rstds, const void* weights,
                  const void* biases, Y* y) {
  using A = Accumulation<X>;
  for (int64_t row = 0; row < rows; ++row)
    normalise_rows<1>(channels, x + row * channels, static_cast<const A*>(means) + row,
                      static_cast<const A*>(rstds) + row, static_cast<const A*>(weights), static_cast<const A*>(biases),
                      y + row * channels);
}

void normalise(Element x_type, Element y_type, int64_t rows, int64_t channels, const void* x, const void* mean,
               const void* rstd, const void* weight, const void* bias, void* y) {
  with_elements(x_type, y_type, [&](auto x_tag, auto y_tag) {
    using X = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    normalise_as(rows, channels, static_cast<const X*>(x), mean, rstd, weight, bias, static_cast<Y*>(y));
  });
}

// With n = (x - mean) * rstd and s = grad * weight: grad_x = rstd * (s - mean(s) - n * mean(s * n)).
template <class G, class X>
void backward_as(int64_t rows, int64_t channels, const G* grad, const X* x, const void* means, const void* rstds,
                 const void* weights, X* grad_x, void* weight_sum, void* bias_sum) {
  using A = Accumulation<X>;
  const auto* weight = static_cast<const A*>(weights);
  auto* weight_sums = static_cast<A*>(weight_sum);
  auto* bias_sums = static_cast<A*>(bias_sum);
  const A count = static_cast<A>(channels);
  for (int64_t row = 0; row < rows; ++row, grad += channels, x += channels) {
    const A mean = static_cast<const A*>(means)[row], rstd = static_cast<const A*>(rstds)[row];
    Vector<A> sum{}, product{};
    for_columns<A>(channels, [&](int64_t c, auto part) {
      const Vector<A> g = load(grad + c, part);
      const Vector<A> n = (load(x + c, part) - mean) * rstd;
      const Vector<A> s = weight ? g * load(weight + c, part) : g;
      sum += s;
      // Where lanes do not exist s is 0 and n finite, unless the statistics are not.
      product += existing<A>(s * n, part);
      if (weight_sums) add_to(weight_sums + c, g * n, part);
      if (bias_sums) add_to(bias_sums + c, g, part);
    });
    if (!grad_x) continue;
    const A mean_sum = horizontal_sum<A>(sum) / count, mean_product = horizontal_sum<A>(product) / count;
    for_columns<A>(channels, [&](int64_t c, auto part) {
      const Vector<A> n = (load(x + c, part) - mean) * rstd;
      Vector<A> s = load(grad + c, part);
      if (weight) s *= load(weight + c, part);
      store(grad_x + c, (s - mean_sum - n * mean_product) * rstd, part);
    });
    grad_x += channels;
  }
}

void backward(Element grad_type, Element x_type, int64_t rows, int64_t channels, const void* grad, const void* x,
              const void* mean, const void* rstd, const void* weight, void* grad_x, void* weight_sums,
              void* bias_sums) {
  with_elements(x_type, grad_type, [&](auto x_tag, auto grad_tag) {
    using X = typename decltype(x_tag)::type;
    using G = typename decltype(grad_tag)::type;
    backward_as(rows, channels, static_cast<const G*>(grad), static_cast<const X*>(x), mean, rstd, weight,
                static_cast<X*>(grad_x), weight_sums, bias_sums);
  });
}

// In double, so that a long row of partial sums adds no error of its own.
template <class A>
void sum_parts_as(int64_t parts, int64_t columns, const A* partial_sums, bool add, A* result) {
  constexpr int64_t kBlock = 64;
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t count = columns - first < kBlock ? columns - first : kBlock;
    double sums[kBlock] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t i = 0; i < count; ++i) sums[i] += static_cast<double>(partial_sums[part * columns + first + i]);
    for (int64_t i = 0; i < count; ++i)
      result[first + i] = static_cast<A>(add ? static_cast<double>(result[first + i]) + sums[i] : sums[i]);
  }
}

void sum_parts(Element type, int64_t parts, int64_t columns, const void* partial_sums, bool add, void* result) {
  if (type == Element::kFloat64) {
    sum_parts_as(parts, columns, static_cast<const double*>(partial_sums), add, static_cast<double*>(result));
  } else {
    sum_parts_as(parts, columns, static_cast<const float*>(partial_sums), add, static_cast<float*>(result));
  }
}

}  // namespace

extern const LayerNormKernels layer_norm_kernels = {forward, normalise, backward, sum_parts};

}  // namespace convnext_kernels::CPU_CAPABILITY
