// A = Q R, reduced, diag(R) >= 0, Q orthonormal for every rank: Cholesky of AᵀA, Householder where that is
// too close to singular.
#pragma once

#include "cholesky.h"
#include "householder.h"
#include "info.h"
#include "scaling.h"

namespace condlr {
namespace CONDLR_ISA {

// The error of Cholesky-QR is that of the Gram matrix G times max_i G_ii (G⁻¹)_ii, which says how close a
// column is to the span of the others, whatever their lengths. Below this it does not show in Q as stored.
template <class T>
constexpr double kLargestInflation = sizeof(T) == 4 ? 0x1p20 : 2;
// Further passes make Q orthonormal; a Gram matrix closer to singular has no Cholesky factor to trust.
constexpr double kHopelessInflation = 0x1p40;

// Q [m, k] with X = Q R, diag(R) > 0, or null where X is not of full rank to rounding.
template <class T>
double* qr_by_cholesky(View<double> X, int64_t m, int64_t k, Scratch& scratch, Workspace& workspace) {
  constexpr int kPasses = 3;
  constexpr int64_t kBlock = 64;
  double* gram = scratch.take<double>(k * k);
  double* inverse = scratch.take<double>(k * k);
  double* diagonal = scratch.take<double>(k);
  double* Q[2] = {scratch.take<double>(m * k), scratch.take<double>(m * k)};
  for (int pass = 0; pass < kPasses; ++pass) {
    gemm<double>(k, k, m, 1, X.transpose(), X, false, gram, k, workspace, 0);
    for (int64_t i = 0; i < k; ++i) diagonal[i] = gram[i * (k + 1)];
    if (!inverse_cholesky(gram, k, inverse, k, workspace)) return nullptr;
    double* next = Q[pass % 2];
    double inflation = 0;
    for (int64_t j = 0; j < k; ++j) {
      double sum = 0;  // (G⁻¹)_jj
      for (int64_t i = j; i < k; ++i) sum += inverse[i * k + j] * inverse[i * k + j];
      inflation = diagonal[j] * sum > inflation ? diagonal[j] * sum : inflation;
    }
    if (inflation > kHopelessInflation) return nullptr;
    if (sizeof(T) == 8 && inflation > kLargestInflation<T>) {
      // what the product with the inverse would round away of the columns of X shows in double
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < k; ++j) next[i * k + j] = X.data[i * X.row + j * X.col];
      }
      solve_rows<double>(gram, k, k, next, k, m, workspace);
    } else {
      // L⁻ᵀ is upper triangular: no row below the block's last column counts
      for (int64_t j = 0; j < k; j += kBlock) {
        const int64_t columns = k - j < kBlock ? k - j : kBlock;
        const View<double> block = row_major<double>(inverse + j * k, k);
        gemm<double>(m, columns, j + columns, 1, X, block.transpose(), false, next + j, k, workspace);
      }
    }
    if (inflation <= kLargestInflation<T>) return next;
    X = row_major<double>(next, k);
  }
  return nullptr;
}

// A [m, n] row-major, Q [m, k], R [k, n], k = min(m, n). For m < n the first m columns are factored and
// R = Qᵀ A.
template <class T>
int qr(const T* A, int64_t m, int64_t n, T* Q, T* R, Workspace& workspace) {
  const int64_t k = m < n ? m : n;
  if (!all_finite(A, m * n)) {
    fill(Q, m * k, static_cast<T>(__builtin_nan("")));
    fill(R, k * n, static_cast<T>(__builtin_nan("")));
    return kNotFinite;
  }
  Scratch scratch(workspace);
  double* W = scratch.take<double>(m * n);
  const Scaling scaling = scaling_of(A, m * n);
  for (int64_t i = 0; i < m * n; ++i) W[i] = scaling.down * static_cast<double>(A[i]);
  const View<double> w = row_major<double>(W, n);
  if (const double* basis = qr_by_cholesky<T>(w, m, k, scratch, workspace)) {
    double* transposed = scratch.take<double>(n * k);  // the lower half of AᵀQ
    gemm<double>(n, k, m, 1, w.transpose(), row_major(basis, k), false, transposed, k, workspace, 0);
    for (int64_t i = 0; i < m * k; ++i) Q[i] = static_cast<T>(basis[i]);
    for (int64_t i = 0; i < k; ++i) {
      for (int64_t j = 0; j < n; ++j)
        R[i * n + j] = j < i ? T(0) : static_cast<T>(scaling.up * transposed[j * k + i]);
    }
    return kOk;
  }
  double* columns = scratch.take<double>(m * k);
  double* beta = scratch.take<double>(k);
  to_columns(row_major(A, n), m, n, scaling.down, W);
  householder(W, m, n, k, beta);
  form_q(W, m, k, beta, columns);
  from_columns(columns, m, k, Q);
  for (int64_t i = 0; i < k; ++i) {
    const double sign = negative_diagonal(W, m, i) ? -scaling.up : scaling.up;
    for (int64_t j = 0; j < n; ++j) R[i * n + j] = j < i ? T(0) : static_cast<T>(sign * W[j * m + i]);
  }
  return kOk;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
