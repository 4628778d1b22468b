// One-sided Jacobi: plane rotations of column pairs until all columns of W V are orthogonal.
#pragma once

#include "vec.h"

namespace condlr {
namespace CONDLR_ISA {

constexpr int kMaxSweeps = 60;
// Entries are near 1 at most; the square of a column below 1e-100 is not told from zero.
constexpr double kNullSquare = 1e-200;

// order: the columns by descending norm (insertion sort: nearly sorted after the first sweep).
inline void sort_descending(const double* square, int64_t n, int64_t* order) {
  for (int64_t i = 1; i < n; ++i) {
    const int64_t column = order[i];
    int64_t j = i;
    for (; j > 0 && square[order[j - 1]] < square[column]; --j) order[j] = order[j - 1];
    order[j] = column;
  }
}

// W (n columns of length m) and V (n columns of length n) are rotated together from V = I. square: the
// squared norms at the end, order: the columns by descending norm. Returns whether it converged.
inline bool jacobi(double* W, int64_t m, int64_t n, double* V, double* square, int64_t* order) {
  // pairs count as orthogonal at the rounding error of their scalar product
  const double root = __builtin_sqrt(static_cast<double>(m));
  const double tolerance = 2.3e-16 * (root > 4 ? root : 4);
  fill(V, n * n, 0.0);
  for (int64_t j = 0; j < n; ++j) {
    V[j * n + j] = 1;
    order[j] = j;
  }
  bool converged = false;
  for (int sweep = 0; sweep <= kMaxSweeps; ++sweep) {
    for (int64_t j = 0; j < n; ++j) square[j] = dot(W + j * m, W + j * m, m);
    // large columns first: graded spectra then take few sweeps
    sort_descending(square, n, order);
    if (converged || sweep == kMaxSweeps) break;
    converged = true;
    for (int64_t a = 0; a + 1 < n; ++a) {
      double* x = W + order[a] * m;
      for (int64_t b = a + 1; b < n; ++b) {
        double* y = W + order[b] * m;
        double xx, yy, xy;
        gram_pair(x, y, m, xx, yy, xy);
        if (xx < kNullSquare || yy < kNullSquare) continue;
        if (__builtin_fabs(xy) <= tolerance * __builtin_sqrt(xx) * __builtin_sqrt(yy)) continue;
        converged = false;
        const double zeta = (yy - xx) / (2 * xy);
        const double t = (zeta < 0 ? -1 : 1) / (__builtin_fabs(zeta) + __builtin_sqrt(1 + zeta * zeta));
        const double c = 1 / __builtin_sqrt(1 + t * t);
        const double s = c * t, h = s / (1 + c);
        rotate(m, s, h, x, y);
        rotate(n, s, h, V + order[a] * n, V + order[b] * n);
      }
    }
  }
  return converged;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
