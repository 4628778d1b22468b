// Eigenvalues and eigenvectors of a symmetric matrix, in two phases: all eigenvalues, then chosen vectors.
#pragma once

#include "scaling.h"

namespace condlr {
namespace CONDLR_ISA {

// What eigenvalues() leaves behind for eigenvectors(). It lives in the Scratch given to take_eigen().
template <class W>
struct Eigen {
  int64_t n;
  W* A;
  W* V;
  int64_t* order;
};

template <class W>
Eigen<W> take_eigen(int64_t n, Scratch& scratch) {
  return {n, scratch.take<W>(n * n), scratch.take<W>(n * n), scratch.take<int64_t>(n)};
}

// A [n, n] row-major, of which the lower half is read; lambda [n] descending. False for non-finite input or
// where something did not converge: then there are no eigenvectors either, and lambda means nothing.
template <class W>
bool eigenvalues(const W* input, Eigen<W>& eigen, W* lambda, Workspace&) {
  const int64_t n = eigen.n;
  W* A = eigen.A;
  W* V = eigen.V;
  for (int64_t i = 0; i < n; ++i) {
    if (!all_finite(input + i * n, i + 1)) return false;
    for (int64_t j = 0; j <= i; ++j) A[i * n + j] = A[j * n + i] = input[i * n + j];
  }
  const Scaling scaling = scaling_of(A, n * n);
  for (int64_t i = 0; i < n * n; ++i) A[i] *= static_cast<W>(scaling.down);
  fill(V, n * n, W(0));
  for (int64_t i = 0; i < n; ++i) {
    V[i * n + i] = 1;
    eigen.order[i] = i;
  }
  const W eps = sizeof(W) == 4 ? W(0x1p-24) : W(0x1p-53);
  bool converged = false;
  for (int sweep = 0; sweep < 60 && !converged; ++sweep) {
    converged = true;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        const W a = A[p * n + q];
        if (__builtin_fabs(a) <= eps) continue;
        converged = false;
        const W theta = (A[q * n + q] - A[p * n + p]) / (2 * a);
        const W t = (theta < 0 ? W(-1) : W(1)) / (__builtin_fabs(theta) + __builtin_sqrt(1 + theta * theta));
        const W c = 1 / __builtin_sqrt(1 + t * t), s = c * t;
        for (int64_t k = 0; k < n; ++k) {
          const W x = A[k * n + p], y = A[k * n + q];
          A[k * n + p] = c * x - s * y;
          A[k * n + q] = s * x + c * y;
        }
        for (int64_t k = 0; k < n; ++k) {
          const W x = A[p * n + k], y = A[q * n + k];
          A[p * n + k] = c * x - s * y;
          A[q * n + k] = s * x + c * y;
          const W u = V[p * n + k], v = V[q * n + k];
          V[p * n + k] = c * u - s * v;
          V[q * n + k] = s * u + c * v;
        }
        A[p * n + q] = A[q * n + p] = 0;
      }
    }
  }
  for (int64_t i = 1; i < n; ++i) {
    const int64_t row = eigen.order[i];
    int64_t j = i;
    for (; j > 0 && A[eigen.order[j - 1] * (n + 1)] < A[row * (n + 1)]; --j) eigen.order[j] = eigen.order[j - 1];
    eigen.order[j] = row;
  }
  for (int64_t i = 0; i < n; ++i) lambda[i] = static_cast<W>(scaling.up) * A[eigen.order[i] * (n + 1)];
  return converged;
}

// V [head + tail, n]: the eigenvectors of the `head` largest and of the `tail` smallest eigenvalues, in the
// order of lambda, each contiguous; head + tail <= n.
template <class W>
void eigenvectors(const Eigen<W>& eigen, int64_t head, int64_t tail, W* V, Workspace&) {
  const int64_t n = eigen.n;
  for (int64_t i = 0; i < head + tail; ++i) {
    const int64_t row = eigen.order[i < head ? i : n - head - tail + i];
    std::memcpy(V + i * n, eigen.V + row * n, sizeof(W) * static_cast<std::size_t>(n));
  }
}

// All eigenvalues, descending, and the eigenvectors of the first `head` and the last `tail` of them.
template <class W>
bool eigh(const W* A, int64_t n, int64_t head, int64_t tail, W* lambda, W* V, Workspace& workspace) {
  Scratch scratch(workspace);
  Eigen<W> eigen = take_eigen<W>(n, scratch);
  if (!eigenvalues(A, eigen, lambda, workspace)) return false;
  eigenvectors(eigen, head, tail, V, workspace);
  return true;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
