// qf(Y), the Q of the QR factorization with positive diagonal, by Cholesky-QR with a Householder fallback.
#pragma once

#include "cholesky.h"
#include "householder.h"
#include "scaling.h"

namespace condlr {
namespace CONDLR_ISA {

// Rows of one sum in T. The terms of a longer one, if all are equal, would round in one direction.
constexpr int64_t kShortSum = 128;

// X = Y L⁻ᵀ with Yᵀ Y = L Lᵀ, distance = ‖Yᵀ Y - I‖_F. Returns false where Yᵀ Y is not positive definite.
// The products are of type T, the r x r work is done in double.
template <class T>
bool cholesky_qr(const T* Y, int64_t m, int64_t r, T* X, double& distance, Workspace& workspace) {
  Scratch scratch(workspace);
  T* product = scratch.take<T>(r * r);
  double* gram = scratch.take<double>(r * r);
  double* inverse = scratch.take<double>(r * r);
  const View<T> y = row_major(Y, r);
  fill(gram, r * r, 0.0);
  for (int64_t begin = 0; begin < m; begin += kShortSum) {
    const View<T> rows = y.at(begin, 0);
    const int64_t count = m - begin < kShortSum ? m - begin : kShortSum;
    gemm<T>(r, r, count, 1, rows.transpose(), rows, nullptr, product, workspace);
    for (int64_t i = 0; i < r * r; ++i) gram[i] += static_cast<double>(product[i]);
  }
  double sum = 0;
  for (int64_t i = 0; i < r * r; ++i) {
    const double e = gram[i] - (i % (r + 1) == 0 ? 1 : 0);
    sum += e * e;
  }
  distance = __builtin_sqrt(sum);
  if (!inverse_cholesky(gram, r, inverse, r, workspace)) return false;
  for (int64_t i = 0; i < r * r; ++i) product[i] = static_cast<T>(inverse[i]);
  gemm<T>(m, r, r, 1, y, row_major<T>(product, r).transpose(), nullptr, X, workspace);
  return true;
}

// One pass is exact to rounding up to this distance, at which no eigenvalue of Yᵀ Y is below 1/2. Its error
// grows with the condition number of Yᵀ Y.
constexpr double kNearIdentity = 0.5;

// X [m, r] = qf(Y), m >= r, Y finite. One pass is exact to rounding near the identity, a long step takes a
// second one, and what even that leaves far from orthonormal goes to Householder.
template <class T>
void orthonormalize(const T* Y, int64_t m, int64_t r, T* X, Workspace& workspace) {
  Scratch scratch(workspace);
  double distance;
  if (cholesky_qr(Y, m, r, X, distance, workspace)) {
    if (distance <= kNearIdentity) return;
    T* first = scratch.take<T>(m * r);
    std::memcpy(first, X, sizeof(T) * static_cast<std::size_t>(m * r));
    if (cholesky_qr(first, m, r, X, distance, workspace) && distance <= kNearIdentity) return;
  }
  double* W = scratch.take<double>(m * r);
  double* Q = scratch.take<double>(m * r);
  double* beta = scratch.take<double>(r);
  to_columns(row_major(Y, r), m, r, scaling_of(Y, m * r).down, W);
  householder(W, m, r, r, beta);
  form_q(W, m, r, beta, Q);
  from_columns(Q, m, r, X);
}

}  // namespace CONDLR_ISA
}  // namespace condlr
