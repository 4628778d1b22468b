// A = Q R, reduced, diag(R) >= 0, Q orthonormal for every rank.
#pragma once

#include "householder.h"
#include "info.h"
#include "scaling.h"

namespace condlr {
namespace CONDLR_ISA {

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
  double* columns = scratch.take<double>(m * k);
  double* beta = scratch.take<double>(k);
  const Scaling scaling = scaling_of(A, m * n);
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
