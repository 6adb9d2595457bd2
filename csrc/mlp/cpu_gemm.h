// The matrix products of layer_norm_mlp on the CPU: PyTorch's own, through oneDNN where there is a choice.
//
// PyTorch's mm and linear give fp32 to MKL, which runs AVX2 on processors that are not Intel's: 160 to 215 GFLOP/s on
// two Zen 5 cores at ConvNeXt's shapes, where the inner product of PyTorch's oneDNN reaches 360 to 450. In bf16 mm is
// oneDNN's too, and up to 10 % faster than the inner product; with a bias, and for the gradients of weights, it is the
// slower one. The inner product also takes GELU along, reads a transposed weight as it lies, and its sums have one
// order whatever the number of threads, which MKL's have not.
#pragma once
#include "common/cpu_operator.h"
#include "common/gemm.h"
#include "mlp/cpu_table.h"

namespace convnext_kernels {

// oneDNN's inner product of dense `x` with `weight`, dense or the transposed view of a dense matrix. `activation` is
// 'none' or 'gelu', `algorithm` GELU's form. What PyTorch's compiler calls for linear layers on a CPU.
inline Tensor onednn_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                            const std::string& activation, const std::optional<std::string>& algorithm) {
  using torch::stable::detail::from;
  const std::vector<double> no_scalars;
  StableIValue stack[6] = {from(x), from(weight), from(bias), from(activation), from(no_scalars), from(algorithm)};
  call_operator("mkldnn::_linear_pointwise", "", stack);
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Whether this PyTorch was built with oneDNN, found out by a product of two numbers.
inline bool has_onednn(const Tensor& like) {
  static const bool there = [&] {
    const Tensor one = zeros(like, {1, 1}, ScalarType::Float);
    try {
      onednn_linear(one, one, std::nullopt, "none", std::nullopt);
    } catch (const std::exception&) {
      return false;
    }
    return true;
  }();
  return there;
}

// Call from the operator's thread only.
class MatrixProducts {
 public:
  MatrixProducts(const Tensor& like, ScalarType type)
      : like_(like),
        type_(type),
        onednn_((type == ScalarType::Float || type == ScalarType::BFloat16) &&
                cpu_capability() >= CpuCapability::kAvx512 && has_onednn(like)) {}

  bool onednn() const { return onednn_; }

  // How many rows a gradient of a weight adds up in one product. oneDNN adds in one chain, whose rounding shows in fp32
  // where rows are many; sums of 256 have about the error of MKL's.
  int64_t most_summed() const { return type_ == ScalarType::Float ? 256 : int64_t{1} << 40; }

  // x weight^T + bias, rounded once.
  Tensor linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) const {
    if (onednn_) return onednn_linear(x, weight, bias, "none", std::nullopt);
    const Tensor result = empty(like_, {x.size(0), weight.size(0)}, type_);
    linear_into(result, x, weight, bias);
    return result;
  }

  // GELU(x weight^T + bias), rounded once. Only where onednn().
  Tensor linear_gelu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool tanh) const {
    return onednn_linear(x, weight, bias, "gelu", tanh ? "tanh" : "none");
  }

  // x weight, rounded once.
  Tensor product(const Tensor& x, const Tensor& weight) const {
    if (onednn_ && type_ == ScalarType::Float) return inner_product(x, weight);
    const Tensor result = empty(like_, {x.size(0), weight.size(1)}, type_);
    matmul_into(result, x, weight);
    return result;
  }
  // The same by oneDNN's inner product, where onednn(): x is dense then.
  Tensor inner_product(const Tensor& x, const Tensor& weight) const {
    return onednn_linear(x, transposed(weight), std::nullopt, "none", std::nullopt);
  }

 private:
  const Tensor like_;
  const ScalarType type_;
  const bool onednn_;
};

// The gradient of a weight: the sum over chunks of a^T b, in the accumulation type.
//
// oneDNN's inner product takes its first factor dense, so that a or b is turned round first, whichever is less work: b
// gives the gradient's transpose, which is turned round itself in the end.
class WeightGradient {
 public:
  // a has a_columns, b has b_columns; `rows` of all chunks together.
  WeightGradient(const MatrixProducts& products, int64_t a_columns, int64_t b_columns, int64_t rows)
      : products_(products), turned_(products.onednn() && rows * (a_columns - b_columns) > a_columns * b_columns) {}

  void add_product(const Tensor& a, const Tensor& b) {
    if (!products_.onednn()) return add(products_.product(transposed(a), b));
    const Tensor& first = turned_ ? b : a;
    const Tensor& second = turned_ ? a : b;
    const int64_t rows = a.size(0), parts = ceil_divide(rows, products_.most_summed());
    const int64_t part_rows = ceil_divide(rows, parts);
    for (int64_t row = 0; row < rows; row += part_rows) {
      const int64_t count = std::min(part_rows, rows - row);
      add(products_.inner_product(turned(rows_of(first, row, count), first.scalar_type()),
                                  rows_of(second, row, count)));
    }
  }

  // The sum; of a single product, in the products' type.
  Tensor sum() const { return turned_ ? turned(*sum_, accumulation_type(sum_->scalar_type())) : *sum_; }

  Tensor in_accumulation_type() const {
    const Tensor total = sum();
    const ScalarType type = accumulation_type(total.scalar_type());
    return total.scalar_type() == type ? total : converted(total, type);
  }

 private:
  void add(const Tensor& product) {
    if (!sum_) {
      sum_ = product;
      return;
    }
    const ScalarType type = accumulation_type(product.scalar_type());
    if (sum_->scalar_type() != type) sum_ = converted(*sum_, type);
    accumulate(product, true, *sum_);
  }

  static Tensor converted(const Tensor& matrix, ScalarType type) {
    const Tensor result = empty(matrix, shape_of(matrix), type);
    accumulate(matrix, false, result);
    return result;
  }

  static void accumulate(const Tensor& matrix, bool add, const Tensor& sum) {
    const Elements from(matrix), to(sum);
    torch::stable::parallel_for(0, sum.numel(), 1 << 15, [&](int64_t begin, int64_t end) {
      mlp_kernels().accumulate(from.type(), end - begin, from.at(begin), add, to.at(begin));
    });
  }

  // A dense transpose.
  static Tensor turned(const Tensor& matrix, ScalarType type) {
    const int64_t rows = matrix.size(0), columns = matrix.size(1);
    const Tensor result = empty(matrix, {columns, rows}, type);
    const Elements from(matrix), to(result);
    // Whole cache lines of the result are one thread's.
    torch::stable::parallel_for(0, ceil_divide(rows, kTurnedRows), 1, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * kTurnedRows, count = std::min(end * kTurnedRows, rows) - first;
      mlp_kernels().transpose(from.type(), to.type(), count, columns, from.at(first * columns), rows, to.at(first));
    });
    return result;
  }

  static constexpr int64_t kTurnedRows = 64;

  const MatrixProducts& products_;
  const bool turned_;
  OptionalTensor sum_;
};

}  // namespace convnext_kernels
