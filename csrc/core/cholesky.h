// Cholesky factors of small symmetric matrices, by halves with products, and what is made of their inverse.
#pragma once

#include "gemm.h"

namespace condlr {
namespace CONDLR_ISA {

template <class T>
constexpr T kEps = sizeof(T) == 4 ? T(0x1p-23) : T(0x1p-52);

// For n <= N: X = L⁻¹ with G = L Lᵀ, and L in the lower half of G. `floor` holds the least pivot of each row that
// counts as positive.
template <class T, int N>
bool inverse_cholesky_leaf(T* G, int64_t ldg, int64_t n, const T* floor, T* X, int64_t ldx) {
  T L[N][N] = {};  // by columns: row k of this array is column k of L
  T inverse[N][N] = {};
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j <= i; ++j) L[j][i] = G[i * ldg + j];
  }
  for (int64_t k = 0; k < n; ++k) {
    const T pivot = L[k][k];
    if (!(pivot > floor[k]) || !(pivot < static_cast<T>(__builtin_inf()))) return false;
    const T scale = 1 / __builtin_sqrt(pivot);
    for (int i = 0; i < N; ++i) L[k][i] *= scale;
    for (int64_t j = k + 1; j < n; ++j) {
      const T factor = L[k][j];
      for (int i = 0; i < N; ++i) L[j][i] -= factor * L[k][i];
    }
    // row k of the inverse: (e_k - Σ_{j<k} L_kj X_j) / L_kk
    for (int64_t j = 0; j < k; ++j) {
      const T factor = L[j][k];
      for (int i = 0; i < N; ++i) inverse[k][i] -= factor * inverse[j][i];
    }
    inverse[k][k] = 1;
    for (int i = 0; i < N; ++i) inverse[k][i] *= scale;
  }
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < n; ++j) X[i * ldx + j] = j <= i ? inverse[i][j] : T(0);
    for (int64_t j = 0; j <= i; ++j) G[i * ldg + j] = L[j][i];
  }
  return true;
}

template <class T>
bool inverse_cholesky_blocks(T* G, int64_t ldg, int64_t n, const T* floor, T* X, int64_t ldx,
                             Workspace& workspace) {
  if (n <= 16) return inverse_cholesky_leaf<T, 16>(G, ldg, n, floor, X, ldx);
  if (n <= 32) return inverse_cholesky_leaf<T, 32>(G, ldg, n, floor, X, ldx);
  // G = [G11 .; G21 G22]: L21 = G21 L11⁻ᵀ, L22 L22ᵀ = G22 - L21 L21ᵀ, X21 = -X22 L21 X11
  const int64_t a = (n / 2 + 15) / 16 * 16, b = n - a;
  T *G21 = G + a * ldg, *G22 = G21 + a, *X21 = X + a * ldx, *X22 = X21 + a;
  if (!inverse_cholesky_blocks(G, ldg, a, floor, X, ldx, workspace)) return false;
  Scratch scratch(workspace);
  T* L21 = scratch.take<T>(b * a);
  T* product = scratch.take<T>(b * a);
  const View<T> X11{X, ldx, 1}, l21{L21, a, 1};
  gemm<T>(b, a, a, 1, {G21, ldg, 1}, X11.transpose(), false, L21, a, workspace);
  gemm<T>(b, b, a, -1, l21, l21.transpose(), true, G22, ldg, workspace, 0);
  if (!inverse_cholesky_blocks(G22, ldg, b, floor + a, X22, ldx, workspace)) return false;
  gemm<T>(b, a, a, 1, l21, X11, false, product, a, workspace);
  gemm<T>(b, a, b, -1, {X22, ldx, 1}, {product, a, 1}, false, X21, ldx, workspace);
  for (int64_t i = 0; i < a; ++i) fill(X + i * ldx + a, b, T(0));
  const std::size_t row = sizeof(T) * static_cast<std::size_t>(a);
  for (int64_t i = 0; i < b; ++i) std::memcpy(G21 + i * ldg, L21 + i * a, row);
  return true;
}

// X [n, n] = L⁻¹ for G = L Lᵀ, lower triangular with zeros above, rows ldx apart. Only the lower half of G is
// read; it becomes L. Returns false where G is not positive definite to rounding (NaN included).
template <class T>
bool inverse_cholesky(T* G, int64_t n, T* X, int64_t ldx, Workspace& workspace) {
  Scratch scratch(workspace);
  T* floor = scratch.take<T>(n);
  for (int64_t i = 0; i < n; ++i) floor[i] = kEps<T> * static_cast<T>(n) * G[i * (n + 1)];
  return inverse_cholesky_blocks(G, n, n, floor, X, ldx, workspace);
}

// X [m, n] <- X L⁻ᵀ for n <= N by substitution, as many rows at a time as a vector has lanes.
template <class T, int N>
void solve_rows_leaf(const T* L, int64_t ldl, int64_t n, T* X, int64_t ldx, int64_t m) {
  using V = Vec<T>;
  T inverse[N];
  for (int64_t j = 0; j < n; ++j) inverse[j] = 1 / L[j * (ldl + 1)];
  for (int64_t begin = 0; begin < m; begin += V::kLanes) {
    const int64_t rows = m - begin < V::kLanes ? m - begin : V::kLanes;
    T* block = X + begin * ldx;
    T lanes[N][V::kLanes] = {};
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; ++j) lanes[j][i] = block[i * ldx + j];
    }
    for (int64_t j = 0; j < n; ++j) {
      auto x = V::load(lanes[j]);
      for (int64_t i = 0; i < j; ++i) x -= L[j * ldl + i] * V::load(lanes[i]);
      V::store(lanes[j], x * inverse[j]);
    }
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < n; ++j) block[i * ldx + j] = lanes[j][i];
    }
  }
}

// X [m, n] <- X L⁻ᵀ: X Lᵀ is the old X to its own rounding, however L is conditioned, which the product with
// an explicit inverse is not.
template <class T>
void solve_rows(const T* L, int64_t ldl, int64_t n, T* X, int64_t ldx, int64_t m, Workspace& workspace) {
  if (n <= 16) return solve_rows_leaf<T, 16>(L, ldl, n, X, ldx, m);
  const int64_t a = (n / 2 + 15) / 16 * 16, b = n - a;
  solve_rows(L, ldl, a, X, ldx, m, workspace);
  const View<T> L21{const_cast<T*>(L) + a * ldl, ldl, 1};
  gemm<T>(m, b, a, -1, {X, ldx, 1}, L21.transpose(), true, X + a, ldx, workspace);
  solve_rows(L + a * (ldl + 1), ldl, b, X + a, ldx, m, workspace);
}

// The upper half from the lower one.
template <class T>
void mirror(T* A, int64_t n, int64_t lda) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) A[j * lda + i] = A[i * lda + j];
  }
}

// X [n, n] = G⁻¹; the lower half of G is overwritten.
template <class T>
bool invert_positive(T* G, int64_t n, T* X, Workspace& workspace) {
  Scratch scratch(workspace);
  T* inverse = scratch.take<T>(n * n);
  if (!inverse_cholesky(G, n, inverse, n, workspace)) return false;
  const View<T> I = row_major<T>(inverse, n);
  gemm<T>(n, n, n, 1, I.transpose(), I, false, X, n, workspace, 0);
  mirror(X, n, n);
  return true;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
