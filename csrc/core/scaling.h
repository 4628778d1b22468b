// Between storage and scaled double columns: a power of two brings the largest entry near 1, exactly.
#pragma once

#include "gemm.h"

namespace condlr {
namespace CONDLR_ISA {

struct Scaling {
  double down, up;  // powers of two, down * up == 1
};

template <class T>
Scaling scaling_of(const T* A, int64_t size) {
  double largest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double a = __builtin_fabs(static_cast<double>(A[i]));
    largest = a > largest ? a : largest;
  }
  int exponent = 0;
  __builtin_frexp(largest, &exponent);
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

// A [m, n] row-major from n contiguous columns of length m.
template <class T>
void from_columns(const double* W, int64_t m, int64_t n, T* A) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) A[i * n + j] = static_cast<T>(W[j * m + i]);
  }
}

}  // namespace CONDLR_ISA
}  // namespace condlr
