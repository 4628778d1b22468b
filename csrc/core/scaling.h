// Conversion between stored matrices and columns in double, scaled by a power of two to entries of at most
// about 1.
#pragma once

#include "gemm.h"

namespace condlr {
namespace CONDLR_ISA {

struct Scaling {
  double down, up;  // powers of two, down * up == 1
};

// The largest magnitude, or NaN where an entry is not finite.
template <class T>
inline T largest_magnitude(const T* x, int64_t n) {
  using V = Vec<T>;
  using S = typename V::type;
  S largest = {}, nothing = {};
  int64_t i = 0;
  for (; i + V::kLanes <= n; i += V::kLanes) {
    const S a = magnitude<T>(V::load(x + i));
    largest = a > largest ? a : largest;
    nothing += a - a;
  }
  T result = 0, rest = 0;
  for (int lane = 0; lane < V::kLanes; ++lane) {
    result = largest[lane] > result ? largest[lane] : result;
    rest += nothing[lane];
  }
  for (; i < n; ++i) {
    const T a = __builtin_fabs(x[i]);
    result = a > result ? a : result;
    rest += a - a;
  }
  return result + rest;
}

template <class T>
Scaling scaling_of(const T* A, int64_t size) {
  int exponent = 0;
  __builtin_frexp(static_cast<double>(largest_magnitude(A, size)), &exponent);
  // both powers stay normal numbers; subnormal matrices are only brought closer to 1
  exponent = exponent < -1000 ? -1000 : exponent > 1000 ? 1000 : exponent;
  return {__builtin_ldexp(1.0, -exponent), __builtin_ldexp(1.0, exponent)};
}

// W: the n columns of A [m, n], each contiguous, times `factor`.
template <class T>
void to_columns(View<T> A, int64_t m, int64_t n, double factor, double* W) {
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i)
      W[j * m + i] = factor * static_cast<double>(A.data[i * A.row + j * A.col]);
  }
}

// X: the m rows of A [m, n], each contiguous and filled up to `width` with zeros.
template <class T>
void to_rows(View<T> A, int64_t m, int64_t n, int64_t width, T* X) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) X[i * width + j] = A.data[i * A.row + j * A.col];
    fill(X + i * width + n, width - n, T(0));
  }
}

// A [m, n] row-major from n contiguous columns of length m.
template <class T>
void from_columns(const double* W, int64_t m, int64_t n, T* A) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) A[i * n + j] = static_cast<T>(W[j * m + i]);
  }
}

}  // namespace CONDLR_ISA
}  // namespace condlr
