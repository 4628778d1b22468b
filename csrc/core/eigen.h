// Eigenvalues and eigenvectors of a symmetric matrix, in two phases: all eigenvalues, then chosen vectors.
//
// Householder reduction to tridiagonal form and divide and conquer; the chosen vectors take the last product
// of divide and conquer and the reflections of the reduction.
#pragma once

#include "divide_conquer.h"
#include "scaling.h"
#include "tridiagonal.h"

namespace condlr {
namespace CONDLR_ISA {

// The state that eigenvalues() leaves for eigenvectors(), in the memory of the Scratch given to take_eigen().
template <class T>
struct Eigen {
  Tridiagonal<T> reduction;
  Merge<T> merge;
};

template <class T>
Eigen<T> take_eigen(int64_t n, Scratch& scratch) {
  return {take_tridiagonal<T>(n, scratch), take_merge<T>(n, scratch)};
}

// A [n, n] row-major, of which the lower half is read; lambda [n] descending. Returns false for non-finite
// input or without convergence: then lambda is undefined, and there are no eigenvectors.
template <class T>
bool eigenvalues(const T* A, Eigen<T>& eigen, T* lambda, Workspace& workspace) {
  Tridiagonal<T>& reduction = eigen.reduction;
  const int64_t n = reduction.n;
  T largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T row = largest_magnitude(A + i * n, i + 1);
    if (!(row - row == 0)) return false;
    largest = row > largest ? row : largest;
  }
  // a power of two that brings the largest entry near 1; it and its inverse are normal numbers
  constexpr int kRange = sizeof(T) == 4 ? 120 : 1000;
  int exponent = 0;
  __builtin_frexp(largest, &exponent);
  exponent = exponent < -kRange ? -kRange : exponent > kRange ? kRange : exponent;
  const T down = static_cast<T>(__builtin_ldexp(1.0, -exponent)),
          up = static_cast<T>(__builtin_ldexp(1.0, exponent));
  for (int64_t i = 0; i < n; ++i) {
    T* row = reduction.A + i * reduction.stride;
    for (int64_t j = 0; j <= i; ++j) row[j] = down * A[i * n + j];
    // the diagonal tile is kept whole
    const int64_t tile = i / kDiagonalTile<T> * kDiagonalTile<T>;
    fill(row + i + 1, tile + kDiagonalTile<T> - i - 1, T(0));
    for (int64_t j = tile; j < i; ++j) reduction.A[j * reduction.stride + i] = row[j];
  }
  tridiagonalize(reduction, workspace);
  if (!divide_conquer(n, reduction.d, reduction.e, eigen.merge, workspace)) return false;
  for (int64_t i = 0; i < n; ++i) lambda[i] = up * reduction.d[n - 1 - i];
  return true;
}

// V [head + tail, n]: the eigenvectors of the `head` largest and of the `tail` smallest eigenvalues, in the
// order of lambda, each contiguous; head + tail <= n.
template <class T>
void eigenvectors(const Eigen<T>& eigen, int64_t head, int64_t tail, T* V, Workspace& workspace) {
  const int64_t n = eigen.reduction.n, count = head + tail;
  if (count == 0) return;
  Scratch scratch(workspace);
  int64_t* positions = scratch.take<int64_t>(count);
  int64_t* column = scratch.take<int64_t>(count);
  const int64_t stride = row_stride<T>(count);
  T* X = scratch.take<T>(n * stride);
  for (int64_t c = 0; c < count; ++c) positions[c] = (c < head ? n : count) - 1 - c;
  form_columns(eigen.merge, positions, count, X, stride, column, workspace);
  back_transform(eigen.reduction, count, X, stride, workspace);
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t i = 0; i < n; ++i) V[c * n + i] = X[i * stride + column[c]];
  }
}

// All eigenvalues, descending, and the eigenvectors of the `head` largest and the `tail` smallest of them.
template <class T>
bool eigh(const T* A, int64_t n, int64_t head, int64_t tail, T* lambda, T* V, Workspace& workspace) {
  Scratch scratch(workspace);
  Eigen<T> eigen = take_eigen<T>(n, scratch);
  if (!eigenvalues(A, eigen, lambda, workspace)) return false;
  eigenvectors(eigen, head, tail, V, workspace);
  return true;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
