// The factorized linear layer: Y = X V Sᵀ Uᵀ + b and its gradients, for sizes where calls cost more than
// flops.
#pragma once

#include "gemm.h"
#include "linear.h"

namespace condlr {
namespace CONDLR_ISA {

// Y [rows, m] and P = X V [rows, r]. S is folded into the shorter of P and U; bias null for none.
template <class T>
void linear_forward(const Linear<T>& layer, const T* X, const T* bias, T* Y, T* P, Workspace& workspace) {
  const int64_t rows = layer.rows, m = layer.m, n = layer.n, r = layer.r;
  Scratch scratch(workspace);
  gemm<T>(rows, r, n, 1, row_major(X, n), row_major(layer.V, r), nullptr, P, workspace);
  const bool fold_into_rows = rows <= m;
  T* folded = scratch.take<T>((fold_into_rows ? rows : m) * r);
  if (fold_into_rows) {
    gemm<T>(rows, r, r, 1, row_major<T>(P, r), row_major(layer.S, r).transpose(), nullptr, folded, workspace);
  } else {
    gemm<T>(m, r, r, 1, row_major(layer.U, r), row_major(layer.S, r), nullptr, folded, workspace);
  }
  const T* PS = fold_into_rows ? folded : P;
  const T* US = fold_into_rows ? layer.U : folded;
  if (bias != nullptr) {
    for (int64_t i = 0; i < rows; ++i) std::memcpy(Y + i * m, bias, sizeof(T) * static_cast<std::size_t>(m));
  }
  gemm<T>(rows, m, r, 1, row_major(PS, r), row_major(US, r).transpose(), bias != nullptr ? Y : nullptr, Y,
          workspace);
}

// With Q = G U: dX = Q S Vᵀ, dU = Gᵀ P Sᵀ, dS = Qᵀ P, dV = Xᵀ Q S, db = Σ G; null where not asked for.
template <class T>
void linear_backward(const Linear<T>& layer, const T* G, const T* X, const T* P,
                     const LinearGradients<T>& out, Workspace& workspace) {
  const int64_t rows = layer.rows, m = layer.m, n = layer.n, r = layer.r;
  const View<T> g = row_major(G, m), S = row_major(layer.S, r);
  Scratch scratch(workspace);
  if (out.dU != nullptr) {
    T* PS = scratch.take<T>(rows * r);
    gemm<T>(rows, r, r, 1, row_major(P, r), S.transpose(), nullptr, PS, workspace);
    gemm<T>(m, r, rows, 1, g.transpose(), row_major<T>(PS, r), nullptr, out.dU, workspace);
  }
  if (out.dX != nullptr || out.dS != nullptr || out.dV != nullptr) {
    T* Q = scratch.take<T>(rows * r);
    gemm<T>(rows, r, m, 1, g, row_major(layer.U, r), nullptr, Q, workspace);
    const View<T> q = row_major<T>(Q, r);
    if (out.dS != nullptr) gemm<T>(r, r, rows, 1, q.transpose(), row_major(P, r), nullptr, out.dS, workspace);
    if (out.dX != nullptr || out.dV != nullptr) {
      T* QS = scratch.take<T>(rows * r);
      gemm<T>(rows, r, r, 1, q, S, nullptr, QS, workspace);
      const View<T> qs = row_major<T>(QS, r);
      if (out.dX != nullptr)
        gemm<T>(rows, n, r, 1, qs, row_major(layer.V, r).transpose(), nullptr, out.dX, workspace);
      if (out.dV != nullptr)
        gemm<T>(n, r, rows, 1, row_major(X, n).transpose(), qs, nullptr, out.dV, workspace);
    }
  }
  if (out.db != nullptr) {
    fill(out.db, m, T(0));
    T* part = scratch.take<T>(m);
    for (int64_t block = 0; block < rows; block += 32) {  // sums of sums: the error grows with the blocks
      fill(part, m, T(0));
      for (int64_t i = block; i < rows && i < block + 32; ++i)
        for (int64_t j = 0; j < m; ++j) part[j] += G[i * m + j];
      for (int64_t j = 0; j < m; ++j) out.db[j] += part[j];
    }
  }
}

}  // namespace CONDLR_ISA
}  // namespace condlr
