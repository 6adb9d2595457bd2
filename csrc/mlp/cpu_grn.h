// Global response normalisation, the part that is per image and hidden channel: with G = ||g||_2 over an image's rows,
// N = G / (mean_k G + eps), GRN(g) = g + weight * g * N + bias (ConvNeXt V2, arXiv:2301.00808, section 3.2).
#pragma once
#include <cmath>
#include <cstdint>

#include "mlp/grn.h"

namespace convnext_kernels {

// The mean of G, plus eps; `squares` (columns), the sums of g^2, becomes G.
template <class A>
A grn_norms(int64_t columns, A* squares) {
  double sum = 0;
  for (int64_t k = 0; k < columns; ++k) {
    squares[k] = std::sqrt(squares[k]);
    sum += squares[k];
  }
  return static_cast<A>(sum / static_cast<double>(columns) + kGrnEps);
}

// factors = 1 + weight * N, so that GRN(g) = g * factors + bias. Overwrites squares.
template <class A>
void grn_factors(int64_t columns, const A* weight, void* square_sums, void* factor_vector) {
  A* squares = static_cast<A*>(square_sums);
  A* factors = static_cast<A*>(factor_vector);
  const A denominator = grn_norms(columns, squares);
  for (int64_t k = 0; k < columns; ++k) factors[k] = 1 + weight[k] * (squares[k] / denominator);
}

// With D = sum over rows of grad * g in `products`: dN = weight * D, and through N's two uses of G
//   dG_k = dN_k / (mean + eps) - mean_j(dN_j G_j) / (mean + eps)^2;  the gradient of g gets g * dG / G: `feedback`.
// At G = 0 that is 0, as the derivative of torch.linalg.vector_norm. products becomes N * D: the image's part of the
// gradient of weight. Overwrites squares.
template <class A>
void grn_gradients(int64_t columns, const A* weight, void* square_sums, void* product_sums, void* factor_vector,
                   void* feedback_vector) {
  A* squares = static_cast<A*>(square_sums);
  A* products = static_cast<A*>(product_sums);
  A* factors = static_cast<A*>(factor_vector);
  A* feedback = static_cast<A*>(feedback_vector);
  const A denominator = grn_norms(columns, squares);
  double sum = 0;
  for (int64_t k = 0; k < columns; ++k)
    sum += static_cast<double>(weight[k]) * static_cast<double>(products[k]) * static_cast<double>(squares[k]);
  const A shared = static_cast<A>(sum / static_cast<double>(columns)) / denominator;
  for (int64_t k = 0; k < columns; ++k) {
    const A norm = squares[k], response = norm / denominator;
    factors[k] = 1 + weight[k] * response;
    feedback[k] = norm == 0 ? A(0) : (weight[k] * products[k] - shared) / denominator / norm;
    products[k] *= response;
  }
}

}  // namespace convnext_kernels
