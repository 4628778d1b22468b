// A = U diag(sigma) Vᵀ, reduced, in scaled double: QR, one-sided Jacobi on Rᵀ, orthonormal completion.
#pragma once

#include "householder.h"
#include "info.h"
#include "jacobi.h"
#include "scaling.h"

namespace condlr {
namespace CONDLR_ISA {

// Columns contiguous: U k columns of length m, V k columns of length n; sigma descending; k = min(m, n).
// It is the SVD of A * scaling.down; U and V are orthonormal also where sigma = 0.
struct Svd {
  double* U;
  double* sigma;
  double* V;
  Scaling scaling;
};

inline Svd take_svd(int64_t m, int64_t n, Scratch& scratch) {
  const int64_t k = m < n ? m : n;
  return {scratch.take<double>(m * k), scratch.take<double>(k), scratch.take<double>(n * k), {1, 1}};
}

// m >= n. A * scaling.down = Q R and, with the rotations G, Rᵀ G = Z diag(sigma): then U = Q G and V = Z.
template <class T>
bool svd_tall(View<T> A, int64_t m, int64_t n, Svd out, Workspace& workspace) {
  Scratch scratch(workspace);
  double* W = scratch.take<double>(m * n);
  double* X = scratch.take<double>(n * n);
  double* G = scratch.take<double>(n * n);
  double* beta = scratch.take<double>(n);
  double* square = scratch.take<double>(n);
  int64_t* order = scratch.take<int64_t>(n);

  to_columns(A, m, n, out.scaling.down, W);
  householder(W, m, n, n, beta);
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < n; ++i) X[j * n + i] = i < j ? 0 : W[i * m + j];
  }
  const bool converged = jacobi(X, n, n, G, square, order);

  for (int64_t j = 0; j < n; ++j) {
    double* u = out.U + j * m;
    std::memcpy(u, G + order[j] * n, sizeof(double) * static_cast<std::size_t>(n));
    fill(u + n, m - n, 0.0);
    apply_reflections(W, m, n, beta, u);
  }
  // the QR of orthogonal unit columns leaves them as they are and completes null ones orthonormally
  double* Z = G;
  for (int64_t j = 0; j < n; ++j) {
    const double norm2 = square[order[j]];
    out.sigma[j] = norm2 < kNullSquare ? 0 : __builtin_sqrt(norm2);
    const double inverse = out.sigma[j] == 0 ? 0 : 1 / out.sigma[j];
    for (int64_t i = 0; i < n; ++i) Z[j * n + i] = inverse * X[order[j] * n + i];
  }
  householder(Z, n, n, n, beta);
  form_q(Z, n, n, beta, out.V);
  return converged;
}

// Finite A, row-major.
template <class T>
bool svd_columns(const T* A, int64_t m, int64_t n, Svd& out, Workspace& workspace) {
  out.scaling = scaling_of(A, m * n);
  const View<T> view = row_major(A, n);
  if (m >= n) return svd_tall(view, m, n, out, workspace);
  return svd_tall(view.transpose(), n, m, {out.V, out.sigma, out.U, out.scaling}, workspace);
}

template <class T>
int svd(const T* A, int64_t m, int64_t n, T* U, T* sigma, T* V, Workspace& workspace) {
  const int64_t k = m < n ? m : n;
  if (!all_finite(A, m * n)) {
    fill(U, m * k, static_cast<T>(__builtin_nan("")));
    fill(sigma, k, static_cast<T>(__builtin_nan("")));
    fill(V, n * k, static_cast<T>(__builtin_nan("")));
    return kNotFinite;
  }
  Scratch scratch(workspace);
  Svd out = take_svd(m, n, scratch);
  const bool converged = svd_columns(A, m, n, out, workspace);
  from_columns(out.U, m, k, U);
  from_columns(out.V, n, k, V);
  for (int64_t j = 0; j < k; ++j) sigma[j] = static_cast<T>(out.sigma[j] * out.scaling.up);
  return converged ? kOk : kNotConverged;
}

// Q = U Vᵀ
template <class T>
int polar(const T* A, int64_t m, int64_t n, T* Q, Workspace& workspace) {
  const int64_t k = m < n ? m : n;
  if (!all_finite(A, m * n)) {
    fill(Q, m * n, static_cast<T>(__builtin_nan("")));
    return kNotFinite;
  }
  Scratch scratch(workspace);
  Svd out = take_svd(m, n, scratch);
  double* product = scratch.take<double>(m * n);
  const bool converged = svd_columns(A, m, n, out, workspace);
  gemm<double>(m, n, k, 1, {out.U, 1, m}, {out.V, n, 1}, nullptr, product, workspace);
  for (int64_t i = 0; i < m * n; ++i) Q[i] = static_cast<T>(product[i]);
  return converged ? kOk : kNotConverged;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
