// A = U diag(sigma) Vᵀ, reduced, in scaled double: eigenvectors of AᵀA, one-sided Jacobi, orthonormal
// completion.
#pragma once

#include "eigen.h"
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

// The cosine below which vectors of this length count as orthogonal: rounding to T hides it.
template <class T>
double orthogonality(int64_t length) {
  if (sizeof(T) == 4) return 0x1p-26;
  const double spread = __builtin_sqrt(static_cast<double>(length));
  return 0x1p-52 * (spread > 4 ? spread : 4);
}

// Whether the rows with this Gram matrix, of which the lower half is read, are orthogonal to `tolerance`.
inline bool is_orthogonal(const double* gram, int64_t n, double tolerance, double* length) {
  int bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    length[i] = __builtin_sqrt(gram[i * (n + 1)]);
    const double bound = tolerance * length[i];
    for (int64_t j = 0; j < i; ++j) bad |= !(__builtin_fabs(gram[i * n + j]) <= bound * length[j]);
  }
  return bad == 0;
}

// The lower half of X Xᵀ for X [n, m].
inline void gram_of_rows(const double* X, int64_t n, int64_t m, double* gram, Workspace& workspace) {
  const View<double> x = row_major(X, m);
  gemm<double>(n, n, m, 1, x, x.transpose(), false, gram, n, workspace, 0);
}

// X [n, m] <- Q X
inline void multiply_rows(const double* Q, int64_t n, int64_t m, double* X, Workspace& workspace) {
  Scratch scratch(workspace);
  double* copy = scratch.take<double>(n * m);
  std::memcpy(copy, X, sizeof(double) * static_cast<std::size_t>(n * m));
  gemm<double>(n, m, n, 1, row_major(Q, n), row_major<double>(copy, m), false, X, m, workspace);
}

// Rotates the rows of X [n, m] from `head` on away from those before by the angles [n - head, head], whose
// squares are below rounding.
inline void rotate_away(const double* angles, int64_t head, double* X, int64_t n, int64_t m,
                        Workspace& workspace) {
  const int64_t tail = n - head;
  double* rest = X + head * m;
  const View<double> a = row_major(angles, head);
  gemm<double>(tail, m, head, -1, a, row_major<double>(X, m), true, rest, m, workspace);
  gemm<double>(head, m, tail, 1, a.transpose(), row_major<double>(rest, m), true, X, m, workspace);
}

// The rows of W = V Aᵀ, by descending norm, are orthogonal to the rounding of the longest one, which is too
// coarse for the short ones. Those are rotated away from the long ones, then by the eigenvectors of their own
// Gram matrix; the shortest of them again, and so on, until the rest is left to Jacobi's rotations because an
// angle is not small. square: the squared norms of the rows; gram: workspace.
inline void separate_scales(double* W, int64_t m, double* V, int64_t n, double* square, double* gram,
                            Workspace& workspace) {
  constexpr double kShort = 0x1p-24;       // squared length relative to the longest
  constexpr double kSmallAngle = 0x1p-27;  // its square is below rounding
  Scratch scratch(workspace);
  double* matrix = scratch.take<double>(n * n);
  for (int64_t begin = 0, head = 0; begin < n; begin = head) {
    while (head < n && square[head] >= kShort * square[begin]) ++head;
    const int64_t tail = n - head;
    if (tail == 0 || square[begin] < kNullSquare) return;
    double *short_rows = W + head * m, *angles = matrix, *Q = matrix;
    gemm<double>(tail, head, m, 1, row_major<double>(short_rows, m), row_major<double>(W, m).transpose(),
                 false, angles, head, workspace);
    for (int64_t i = 0; i < tail; ++i) {
      for (int64_t j = 0; j < head; ++j) angles[i * head + j] /= square[j];
    }
    if (largest_magnitude(angles, tail * head) > kSmallAngle) return;
    rotate_away(angles, head, W, n, m, workspace);
    rotate_away(angles, head, V, n, n, workspace);
    gram_of_rows(short_rows, tail, m, gram, workspace);
    if (!eigh(gram, tail, tail, int64_t{0}, square + head, Q, workspace)) return;
    multiply_rows(Q, tail, m, short_rows, workspace);
    multiply_rows(Q, tail, n, V + head * n, workspace);
    for (int64_t i = head; i < n; ++i) square[i] = dot(W + i * m, W + i * m, m);
  }
}

// Up to this size rotations alone are as fast.
constexpr int64_t kLargestJacobi = 8;

// Rotates the rows of X, and those of V alike, until those of X are orthogonal; square: their squared norms.
inline bool rotate_rows(double* X, int64_t m, double* V, int64_t n, double tolerance, double* square,
                        int64_t* order, Workspace& workspace) {
  Scratch scratch(workspace);
  const int64_t width = padded(m), width_of_V = padded(n);
  double* x = scratch.take<double>((n + n % 2) * width);
  double* v = scratch.take<double>(n * width_of_V);
  to_rows(row_major<double>(X, m), n, m, width, x);
  to_rows(row_major<double>(V, n), n, n, width_of_V, v);
  const bool converged = jacobi(x, width, n, v, width_of_V, tolerance, square, order, workspace);
  for (int64_t i = 0; i < n; ++i) {
    std::memcpy(X + i * m, x + i * width, sizeof(double) * static_cast<std::size_t>(m));
    std::memcpy(V + i * n, v + i * width_of_V, sizeof(double) * static_cast<std::size_t>(n));
  }
  return converged;
}

// m >= n. The eigenvectors V of AᵀA make the columns of A V orthogonal up to rounding errors of sigma_1²;
// where those are too large for small singular values, rotations finish.
template <class T>
bool svd_tall(View<T> A, int64_t m, int64_t n, Svd out, Workspace& workspace) {
  Scratch scratch(workspace);
  double* columns = scratch.take<double>(n * m);
  double* W = scratch.take<double>(n * m);  // the rows are the columns of A V
  double* V = scratch.take<double>(n * n);  // the rows are those of Vᵀ
  double* gram = scratch.take<double>(n * n);
  double* square = scratch.take<double>(n);
  int64_t* order = scratch.take<int64_t>(n);
  const View<double> a = row_major<double>(columns, m), v = row_major<double>(V, n);

  to_columns(A, m, n, out.scaling.down, columns);
  bool rotated = false;
  if (n > kLargestJacobi) {
    gram_of_rows(columns, n, m, gram, workspace);
    rotated = eigh(gram, n, n, int64_t{0}, square, V, workspace);
  }
  if (!rotated) {
    for (int64_t i = 0; i < n * n; ++i) V[i] = i % (n + 1) == 0;
  }
  gemm<double>(n, m, n, 1, v, a, false, W, m, workspace);
  gram_of_rows(W, n, m, gram, workspace);
  const double tolerance = orthogonality<T>(m);
  bool converged = is_orthogonal(gram, n, tolerance, square);
  if (!converged && rotated) {
    for (int64_t i = 0; i < n; ++i) square[i] = gram[i * (n + 1)];
    separate_scales(W, m, V, n, square, gram, workspace);
    gram_of_rows(W, n, m, gram, workspace);
    converged = is_orthogonal(gram, n, tolerance, square);
  }
  if (converged) {
    for (int64_t i = 0; i < n; ++i) {
      square[i] = gram[i * (n + 1)];
      order[i] = i;
    }
    sort_descending(square, n, order);
  } else {
    converged = rotate_rows(W, m, V, n, tolerance, square, order, workspace);
  }

  bool null = false;
  for (int64_t j = 0; j < n; ++j) {
    const int64_t row = order[j];
    out.sigma[j] = square[row] < kNullSquare ? 0 : __builtin_sqrt(square[row]);
    const double inverse = out.sigma[j] == 0 ? 0 : 1 / out.sigma[j];
    null |= out.sigma[j] == 0;
    for (int64_t i = 0; i < m; ++i) out.U[j * m + i] = inverse * W[row * m + i];
    std::memcpy(out.V + j * n, V + row * n, sizeof(double) * static_cast<std::size_t>(n));
  }
  if (null) {
    // the QR of orthogonal unit columns leaves them as they are and completes null ones orthonormally
    double* beta = scratch.take<double>(n);
    std::memcpy(W, out.U, sizeof(double) * static_cast<std::size_t>(n * m));
    householder(W, m, n, n, beta);
    form_q(W, m, n, beta, out.U);
  }
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
