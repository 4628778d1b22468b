// Cholesky factor, triangular inverse and inverse of a small symmetric matrix, in double.
#pragma once

#include "gemm.h"

namespace condlr {
namespace CONDLR_ISA {

// G [n, n] row-major = L Lᵀ; only the lower half of G is read, L is written there. Returns false where G is
// not positive definite to rounding (NaN included).
inline bool cholesky(double* G, int64_t n) {
  const double rounding = 2.3e-16 * static_cast<double>(n);
  for (int64_t i = 0; i < n; ++i) {
    double* row = G + i * n;
    for (int64_t j = 0; j < i; ++j) row[j] = (row[j] - dot(row, G + j * n, j)) / G[j * n + j];
    const double pivot = row[i] - dot(row, row, i);
    if (!(pivot > rounding * row[i]) || !(pivot < __builtin_inf())) return false;
    row[i] = __builtin_sqrt(pivot);
  }
  return true;
}

// X = L⁻¹, lower triangular, zeros above.
inline void invert_lower(const double* L, int64_t n, double* X) {
  fill(X, n * n, 0.0);
  for (int64_t i = 0; i < n; ++i) {
    double* row = X + i * n;
    for (int64_t j = 0; j < i; ++j) axpy(j + 1, -L[i * n + j], X + j * n, row);
    row[i] = 1;
    scale(i + 1, 1 / L[i * n + i], row);
  }
}

// X = G⁻¹ from the Cholesky factor; G is overwritten.
inline bool invert_positive(double* G, int64_t n, double* X, Workspace& workspace) {
  if (!cholesky(G, n)) return false;
  Scratch scratch(workspace);
  double* inverse = scratch.take<double>(n * n);
  invert_lower(G, n, inverse);
  const View<double> I = row_major<double>(inverse, n);
  gemm<double>(n, n, n, 1, I.transpose(), I, nullptr, X, workspace);
  return true;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
