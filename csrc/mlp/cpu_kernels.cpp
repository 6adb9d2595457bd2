// Everything around the MLP's matrix products on the CPU: GELU, GRN, layer scale, drop path and residual, and their
// backwards, row by row, a vector of columns at a time. Compiled once per capability.
#include "mlp/cpu_kernels.h"

#include "common/cpu_loops.h"
#include "common/cpu_math.h"

namespace convnext_kernels::CPU_CAPABILITY {
namespace {

template <class A>
CK_INLINE const A* vector_of(const void* vector) {
  return static_cast<const A*>(vector);
}

// --- GELU and GRN

template <class T, bool kTanh>
void gelu_as(int64_t rows, int64_t columns, const T* x, const void* biases, T* y, void* square_sums) {
  using A = Accumulation<T>;
  const A* bias = vector_of<A>(biases);
  A* squares = static_cast<A*>(square_sums);
  for (int64_t row = 0; row < rows; ++row, x += columns, y += columns)
    for_columns<A>(columns, [&](int64_t c, auto part) {
      Vector<A> h = load(x + c, part);
      if (bias) h += load(bias + c, part);
      const Vector<A> g = h * gelu_gate<T, kTanh>(h).gate;
      store(y + c, g, part);
      if (squares) {
        const Vector<A> stored = rounded<T>(g);
        add_to(squares + c, stored * stored, part);
      }
    });
}

void gelu(Element type, bool tanh, int64_t rows, int64_t columns, const void* x, const void* bias, void* y,
          void* squares) {
  with_element(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto run = tanh ? gelu_as<T, true> : gelu_as<T, false>;
    run(rows, columns, static_cast<const T*>(x), bias, static_cast<T*>(y), squares);
  });
}

void squares(Element type, int64_t rows, int64_t columns, const void* values, void* sums) {
  with_element(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulation<T>;
    const T* x = static_cast<const T*>(values);
    for (int64_t row = 0; row < rows; ++row, x += columns)
      for_columns<A>(columns, [&](int64_t c, auto part) {
        const Vector<A> value = load(x + c, part);
        add_to(static_cast<A*>(sums) + c, value * value, part);
      });
  });
}

void apply_grn(Element type, int64_t rows, int64_t columns, const void* factors, const void* bias, void* values) {
  with_element(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulation<T>;
    T* g = static_cast<T*>(values);
    for (int64_t row = 0; row < rows; ++row, g += columns)
      for_columns<A>(columns, [&](int64_t c, auto part) {
        store(g + c, load(g + c, part) * load(vector_of<A>(factors) + c, part) + load(vector_of<A>(bias) + c, part),
              part);
      });
  });
}

template <class T, bool kTanh, bool kGrn>
void gelu_backward_as(const HiddenRows& hidden) {
  using A = Accumulation<T>;
  const T* x = static_cast<const T*>(hidden.x);
  const T* grad = static_cast<const T*>(hidden.grad);
  T* result = static_cast<T*>(hidden.result);
  T* grad_x = static_cast<T*>(hidden.grad_x);
  const A* bias = vector_of<A>(hidden.bias);
  A* grad_sums = static_cast<A*>(hidden.grad_sums);
  for (int64_t row = 0; row < hidden.rows; ++row) {
    const int64_t start = row * hidden.columns;
    for_columns<A>(hidden.columns, [&](int64_t c, auto part) {
      Vector<A> h = load(x + start + c, part);
      if (bias) h += load(bias + c, part);
      const Gate<A> gate = gelu_gate<T, kTanh>(h);
      const Vector<A> g = h * gate.gate;
      if (grad) {
        Vector<A> d = load(grad + start + c, part);
        if constexpr (kGrn)
          d = d * load(vector_of<A>(hidden.factors) + c, part) + g * load(vector_of<A>(hidden.feedback) + c, part);
        d *= gate.gate + h * gate.slope;
        store(grad_x + start + c, d, part);
        if (grad_sums) add_to(grad_sums + c, rounded<T>(d), part);
      }
      if (result) {
        Vector<A> y = g;
        if constexpr (kGrn)
          y = g * load(vector_of<A>(hidden.factors) + c, part) + load(vector_of<A>(hidden.grn_bias) + c, part);
        store(result + start + c, y, part);
      }
    });
  }
}

void gelu_backward(const HiddenRows& hidden) {
  with_element(hidden.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (hidden.factors) {
      hidden.tanh ? gelu_backward_as<T, true, true>(hidden) : gelu_backward_as<T, false, true>(hidden);
    } else {
      hidden.tanh ? gelu_backward_as<T, true, false>(hidden) : gelu_backward_as<T, false, false>(hidden);
    }
  });
}

template <class T, bool kTanh>
void grn_backward_sums_as(const HiddenRows& hidden, const GrnSums& sums) {
  using A = Accumulation<T>;
  const T* x = static_cast<const T*>(hidden.x);
  const T* grad = static_cast<const T*>(hidden.grad);
  const A* bias = vector_of<A>(hidden.bias);
  for (int64_t row = 0; row < hidden.rows; ++row) {
    const int64_t start = row * hidden.columns;
    for_columns<A>(hidden.columns, [&](int64_t c, auto part) {
      Vector<A> h = load(x + start + c, part);
      if (bias) h += load(bias + c, part);
      const Vector<A> g = h * gelu_gate<T, kTanh>(h).gate;
      add_to(static_cast<A*>(sums.squares) + c, g * g, part);
      if (grad) {
        const Vector<A> d = load(grad + start + c, part);
        add_to(static_cast<A*>(sums.products) + c, d * g, part);
        add_to(static_cast<A*>(sums.grads) + c, d, part);
      }
    });
  }
}

void grn_backward_sums(const HiddenRows& hidden, const GrnSums& sums) {
  with_element(hidden.type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    hidden.tanh ? grn_backward_sums_as<T, true>(hidden, sums) : grn_backward_sums_as<T, false>(hidden, sums);
  });
}

// --- layer scale, drop path and residual

template <class T, class R, class Y>
void add_branch_as(int64_t rows, int64_t columns, const T* branch, const void* bias, const R* residual,
                   const void* layer_scale, double scale, Y* y) {
  using A = Accumulation<T>;
  const Vector<A> sample_scale = broadcast(static_cast<A>(scale));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * columns;
    for_columns<A>(columns, [&](int64_t c, auto part) {
      Vector<A> value{};
      if (branch) {
        value = load(branch + start + c, part);
        if (bias) value += load(vector_of<A>(bias) + c, part);
        value *= sample_scale;
        if (layer_scale) value *= load(vector_of<A>(layer_scale) + c, part);
      }
      if (residual) value += load(residual + start + c, part);
      store(y + start + c, value, part);
    });
  }
}

void add_branch(Element branch_type, Element residual_type, Element y_type, int64_t rows, int64_t columns,
                const void* branch, const void* bias, const void* residual, const void* layer_scale, double scale,
                void* y) {
  with_elements(branch_type, residual_type, [&](auto branch_tag, auto residual_tag) {
    using T = typename decltype(branch_tag)::type;
    using R = typename decltype(residual_tag)::type;
    with_element_of<Accumulation<T>>(y_type, [&](auto y_tag) {
      using Y = typename decltype(y_tag)::type;
      add_branch_as(rows, columns, static_cast<const T*>(branch), bias, static_cast<const R*>(residual), layer_scale,
                    scale, static_cast<Y*>(y));
    });
  });
}

template <class G, class T>
void branch_grad_as(int64_t rows, int64_t columns, const G* grad, const void* layer_scale, double scale, T* grad_branch,
                    void* sums) {
  using A = Accumulation<T>;
  const Vector<A> sample_scale = broadcast(static_cast<A>(scale));
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t start = row * columns;
    for_columns<A>(columns, [&](int64_t c, auto part) {
      Vector<A> value = load(grad + start + c, part) * sample_scale;
      if (layer_scale) value *= load(vector_of<A>(layer_scale) + c, part);
      store(grad_branch + start + c, value, part);
      if (sums) add_to(static_cast<A*>(sums) + c, rounded<T>(value), part);
    });
  }
}

void branch_grad(Element grad_type, Element branch_type, int64_t rows, int64_t columns, const void* grad,
                 const void* layer_scale, double scale, void* grad_branch, void* sums) {
  with_elements(branch_type, grad_type, [&](auto branch_tag, auto grad_tag) {
    using T = typename decltype(branch_tag)::type;
    using G = typename decltype(grad_tag)::type;
    branch_grad_as(rows, columns, static_cast<const G*>(grad), layer_scale, scale, static_cast<T*>(grad_branch), sums);
  });
}

void layer_scale_grad(Element grad_type, Element branch_type, int64_t rows, int64_t columns, const void* grad,
                      const void* branch, double scale, void* sums) {
  with_elements(branch_type, grad_type, [&](auto branch_tag, auto grad_tag) {
    using T = typename decltype(branch_tag)::type;
    using G = typename decltype(grad_tag)::type;
    using A = Accumulation<T>;
    const Vector<A> sample_scale = broadcast(static_cast<A>(scale));
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t start = row * columns;
      for_columns<A>(columns, [&](int64_t c, auto part) {
        const Vector<A> product =
            load(static_cast<const G*>(grad) + start + c, part) * load(static_cast<const T*>(branch) + start + c, part);
        add_to(static_cast<A*>(sums) + c, product * sample_scale, part);
      });
    }
  });
}

// --- parameters

// Transposes a square of as many vectors as a vector has lanes: interleaving the vectors of its first half with those
// of its second, log2(lanes) times.
template <class A>
CK_INLINE void transpose_square(Vector<A>* rows) {
  constexpr int kSize = kLanes<A>;
  using Mask = typename VectorOf<A>::mask;
  Mask low{}, high{};
  for (int i = 0; i < kSize; ++i) {
    low[i] = i / 2 + i % 2 * kSize;
    high[i] = low[i] + kSize / 2;
  }
  for (int step = 1; step < kSize; step *= 2) {
    Vector<A> next[kSize];
    for (int i = 0; i < kSize / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kSize / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kSize / 2], high);
    }
    for (int i = 0; i < kSize; ++i) rows[i] = next[i];
  }
}

template <class T, class Y>
void transpose_as(int64_t rows, int64_t columns, const T* x, int64_t y_columns, Y* y) {
  using A = Accumulation<T>;
  constexpr int64_t kSize = kLanes<A>;
  for (int64_t c = 0; c < columns; c += kSize) {
    const int width = static_cast<int>(columns - c < kSize ? columns - c : kSize);
    for (int64_t r = 0; r < rows; r += kSize) {
      const int height = static_cast<int>(rows - r < kSize ? rows - r : kSize);
      const T* from = x + r * columns + c;
      Y* to = y + c * y_columns + r;
      Vector<A> square[kSize];
      if (width == kSize && height == kSize) {
        for (int i = 0; i < kSize; ++i) square[i] = load(from + i * columns);
        transpose_square<A>(square);
        for (int i = 0; i < kSize; ++i) store(to + i * y_columns, square[i]);
      } else {
        for (int i = 0; i < kSize; ++i) square[i] = i < height ? load_partial(from + i * columns, width) : Vector<A>{};
        transpose_square<A>(square);
        for (int i = 0; i < width; ++i) store_partial(to + i * y_columns, square[i], height);
      }
    }
  }
}

void transpose(Element x_type, Element y_type, int64_t rows, int64_t columns, const void* x, int64_t y_columns,
               void* y) {
  with_elements(x_type, y_type, [&](auto x_tag, auto y_tag) {
    using T = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    transpose_as(rows, columns, static_cast<const T*>(x), y_columns, static_cast<Y*>(y));
  });
}

void accumulate(Element type, int64_t count, const void* values, bool add, void* sums) {
  with_element(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulation<T>;
    const T* x = static_cast<const T*>(values);
    A* sum = static_cast<A*>(sums);
    for_columns<A>(count, [&](int64_t i, auto part) {
      const Vector<A> value = load(x + i, part);
      store(sum + i, add ? load(sum + i, part) + value : value, part);
    });
  });
}

void add_product(Element type, int64_t count, const void* values, const void* factors, void* sums) {
  with_element(type, [&](auto tag) {
    using T = typename decltype(tag)::type;
    using A = Accumulation<T>;
    const T* x = static_cast<const T*>(values);
    const A* y = vector_of<A>(factors);
    A* sum = static_cast<A*>(sums);
    for_columns<A>(count, [&](int64_t i, auto part) { add_to(sum + i, load(x + i, part) * load(y + i, part), part); });
  });
}

template <class T, class R>
void scale_rows_as(int64_t rows, int64_t columns, const T* x, const void* scales, R* result) {
  using A = Accumulation<T>;
  for (int64_t row = 0; row < rows; ++row, x += columns, result += columns) {
    const A scale = vector_of<A>(scales)[row];
    for_columns<A>(columns, [&](int64_t c, auto part) { store(result + c, load(x + c, part) * scale, part); });
  }
}

void scale_rows(Element x_type, Element result_type, int64_t rows, int64_t columns, const void* x, const void* scales,
                void* result) {
  with_elements(x_type, result_type, [&](auto x_tag, auto result_tag) {
    using T = typename decltype(x_tag)::type;
    using R = typename decltype(result_tag)::type;
    scale_rows_as(rows, columns, static_cast<const T*>(x), scales, static_cast<R*>(result));
  });
}

template <class T, class Y>
void dot_rows_as(int64_t rows, int64_t columns, const T* x, const Y* y, void* dots) {
  using A = Accumulation<T>;
  for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
    Vector<A> sum{};
    for_columns<A>(columns, [&](int64_t c, auto part) { sum += load(x + c, part) * load(y + c, part); });
    static_cast<A*>(dots)[row] = horizontal_sum<A>(sum);
  }
}

void dot_rows(Element x_type, Element y_type, int64_t rows, int64_t columns, const void* x, const void* y, void* dots) {
  with_elements(x_type, y_type, [&](auto x_tag, auto y_tag) {
    using T = typename decltype(x_tag)::type;
    using Y = typename decltype(y_tag)::type;
    dot_rows_as(rows, columns, static_cast<const T*>(x), static_cast<const Y*>(y), dots);
  });
}

}  // namespace

extern const MlpKernels mlp_kernels = {gelu,        squares,     apply_grn,        gelu_backward, grn_backward_sums,
                                       add_branch,  branch_grad, layer_scale_grad, transpose,     accumulate,
                                       add_product, scale_rows,  dot_rows};

}  // namespace convnext_kernels::CPU_CAPABILITY
