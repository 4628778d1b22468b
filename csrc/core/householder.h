// Householder QR in double on columns stored contiguously, and its Q.
#pragma once

#include "vec.h"

namespace condlr {
namespace CONDLR_ISA {

// What rounding leaves of dependent columns may be so short that its square has few digits or none. The
// directions in it must be orthonormal too: below this square it is lifted, and its square is a normal number.
constexpr double kTinySquare = 0x1p-900, kLift = 0x1p600;

// W holds n columns of length m, entries at most about 1. H_j = I - beta_j v_j v_jᵀ, j < k, with
// v_j = (1, tail) kept below the diagonal of column j; R stays on and above it. A column without a tail is left
// alone (beta = 0).
inline void householder(double* W, int64_t m, int64_t n, int64_t k, double* beta) {
  for (int64_t j = 0; j < k; ++j) {
    double* x = W + j * m + j;
    const int64_t tail = m - j - 1;
    double tail2 = dot(x + 1, x + 1, tail), lift = 1;
    if (x[0] * x[0] + tail2 < kTinySquare) {
      lift = kLift;
      scale(tail + 1, lift, x);
      tail2 = dot(x + 1, x + 1, tail);
    }
    beta[j] = 0;
    double alpha = x[0];
    if (tail2 != 0) {
      const double norm = __builtin_sqrt(x[0] * x[0] + tail2);
      alpha = x[0] > 0 ? -norm : norm;
      const double head = x[0] - alpha;
      beta[j] = -head / alpha;
      scale(tail, 1 / head, x + 1);
    }
    x[0] = alpha / lift;
    if (beta[j] == 0) continue;
    for (int64_t c = j + 1; c < n; ++c) {
      double* y = W + c * m + j;
      const double s = beta[j] * (y[0] + dot(x + 1, y + 1, tail));
      y[0] -= s;
      axpy(tail, -s, x + 1, y + 1);
    }
  }
}

// y <- H_0 ... H_{count-1} y for one column of length m.
inline void apply_reflections(const double* W, int64_t m, int64_t count, const double* beta, double* y) {
  for (int64_t j = count - 1; j >= 0; --j) {
    if (beta[j] == 0) continue;
    const double* v = W + j * m + j + 1;
    const int64_t tail = m - j - 1;
    const double s = beta[j] * (y[j] + dot(v, y + j + 1, tail));
    y[j] -= s;
    axpy(tail, -s, v, y + j + 1);
  }
}

// Whether row j of R changes its sign for diag(R) >= 0.
inline bool negative_diagonal(const double* W, int64_t m, int64_t j) { return W[j * m + j] < 0; }

// The k columns of Q, length m, signed so that diag(R) >= 0. They are orthonormal whatever the rank of W.
inline void form_q(const double* W, int64_t m, int64_t k, const double* beta, double* Q) {
  fill(Q, k * m, 0.0);
  for (int64_t j = 0; j < k; ++j) {
    Q[j * m + j] = negative_diagonal(W, m, j) ? -1 : 1;
    apply_reflections(W, m, j + 1, beta, Q + j * m);
  }
}

}  // namespace CONDLR_ISA
}  // namespace condlr
