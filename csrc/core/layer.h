// The factorized linear layer: Y = X V Sᵀ Uᵀ + b and its gradients, in parts that threads share.
//
// Part `part` of `parts` is a range of rows of X, Y and G, or of rows of a gradient of the factors. No sum is
// split, so that results do not depend on the number of parts.
#pragma once

#include "gemm.h"
#include "linear.h"

namespace condlr {
namespace CONDLR_ISA {

// Calls work(first, how many) for a part of `size` rows, unless it is empty.
template <class Work>
void for_part(Share part, int64_t size, const Work& work) {
  if (size < 32 * part.count) part = {part.index, 1};
  const int64_t begin = part_begin(size, part.count, part.index);
  const int64_t end = part_begin(size, part.count, part.index + 1);
  if (part.index < part.count && end > begin) work(begin, end - begin);
}

// The rows of a matrix from one on; null stays null.
template <class T>
T* from_row(T* data, int64_t row, int64_t columns) {
  return data == nullptr ? nullptr : data + row * columns;
}

// US = U S
template <class T>
void linear_fold(const Linear<T>& layer, T* US, Workspace& workspace) {
  gemm<T>(layer.m, layer.r, layer.r, 1, row_major(layer.U, layer.r), row_major(layer.S, layer.r), nullptr, US,
          workspace);
}

// A part of the rows of Y [rows, m] and P = X V [rows, r]; bias null for none.
template <class T>
void linear_forward(const Linear<T>& layer, const T* X, const T* bias, T* Y, T* P, Share part,
                    Workspace& workspace) {
  const int64_t m = layer.m, n = layer.n, r = layer.r;
  for_part(part, layer.rows, [&](int64_t first, int64_t rows) {
    Scratch scratch(workspace);
    T *y = Y + first * m, *p = P + first * r;
    gemm<T>(rows, r, n, 1, row_major(X + first * n, n), row_major(layer.V, r), nullptr, p, workspace);
    const T *left = p, *right = layer.US;
    if (right == nullptr) {
      T* PS = scratch.take<T>(rows * r);
      gemm<T>(rows, r, r, 1, row_major<T>(p, r), row_major(layer.S, r).transpose(), nullptr, PS, workspace);
      left = PS, right = layer.U;
    }
    if (bias != nullptr) {
      for (int64_t i = 0; i < rows; ++i) std::memcpy(y + i * m, bias, sizeof(T) * static_cast<std::size_t>(m));
    }
    gemm<T>(rows, m, r, 1, row_major(left, r), row_major(right, r).transpose(), bias != nullptr ? y : nullptr,
            y, workspace);
  });
}

// A part of the rows of the products that are asked for, but dC, and of dX = QS Vᵀ.
template <class T>
void linear_backward_rows(const Linear<T>& layer, const T* G, const T* P, const LinearProducts<T>& to, T* dX,
                          Share part, Workspace& workspace) {
  const int64_t m = layer.m, n = layer.n, r = layer.r;
  for_part(part, layer.rows, [&](int64_t first, int64_t rows) {
    const View<T> g = row_major(G + first * m, m), S = row_major(layer.S, r);
    T* QS = from_row(to.QS, first, r);
    if (to.PS != nullptr)
      gemm<T>(rows, r, r, 1, row_major(P + first * r, r), S.transpose(), nullptr, to.PS + first * r, workspace);
    if (to.Q != nullptr) {
      T* Q = to.Q + first * r;
      gemm<T>(rows, r, m, 1, g, row_major(layer.U, r), nullptr, Q, workspace);
      if (to.QS != nullptr) gemm<T>(rows, r, r, 1, row_major<T>(Q, r), S, nullptr, QS, workspace);
    } else if (to.QS != nullptr) {
      gemm<T>(rows, r, m, 1, g, row_major(layer.US, r), nullptr, QS, workspace);
    }
    if (dX != nullptr)
      gemm<T>(rows, n, r, 1, row_major<T>(QS, r), row_major(layer.V, r).transpose(), nullptr, dX + first * n,
              workspace);
  });
}

// A part of the rows of dU = Gᵀ PS or dC Sᵀ, of dV = Xᵀ QS, of db = Σ G, and of dC or dS = Qᵀ P.
template <class T>
void linear_backward_sums(const Linear<T>& layer, const T* G, const T* X, const T* P,
                          const LinearProducts<T>& from, const LinearGradients<T>& out, Share part,
                          Workspace& workspace) {
  const int64_t rows = layer.rows, m = layer.m, n = layer.n, r = layer.r;
  const View<T> g = row_major(G, m).transpose(), S = row_major(layer.S, r);
  for_part(part, m, [&](int64_t first, int64_t count) {
    T* dU = from_row(out.dU, first, r);
    if (from.dC != nullptr) {
      T* dC = from.dC + first * r;
      gemm<T>(count, r, rows, 1, g.at(first, 0), row_major(P, r), nullptr, dC, workspace);
      if (out.dU != nullptr)
        gemm<T>(count, r, r, 1, row_major<T>(dC, r), S.transpose(), nullptr, dU, workspace);
    } else if (out.dU != nullptr) {
      gemm<T>(count, r, rows, 1, g.at(first, 0), row_major<T>(from.PS, r), nullptr, dU, workspace);
    }
    if (out.db != nullptr) {
      Scratch scratch(workspace);
      T *db = out.db + first, *sum = scratch.take<T>(count);
      fill(db, count, T(0));
      for (int64_t block = 0; block < rows; block += 32) {  // sums of sums: the error grows with the blocks
        fill(sum, count, T(0));
        for (int64_t i = block; i < rows && i < block + 32; ++i)
          for (int64_t j = 0; j < count; ++j) sum[j] += G[i * m + first + j];
        for (int64_t j = 0; j < count; ++j) db[j] += sum[j];
      }
    }
  });
  if (out.dV != nullptr)
    for_part(part, n, [&](int64_t first, int64_t count) {
      gemm<T>(count, r, rows, 1, row_major(X, n).transpose().at(first, 0), row_major<T>(from.QS, r), nullptr,
              out.dV + first * r, workspace);
    });
  if (out.dS != nullptr && from.dC == nullptr)
    for_part(part, r, [&](int64_t first, int64_t count) {
      gemm<T>(count, r, rows, 1, row_major<T>(from.Q, r).transpose().at(first, 0), row_major(P, r), nullptr,
              out.dS + first * r, workspace);
    });
}

// dS = Uᵀ dC
template <class T>
void linear_backward_core(const Linear<T>& layer, const T* dC, T* dS, Workspace& workspace) {
  const int64_t r = layer.r;
  gemm<T>(r, r, layer.m, 1, row_major(layer.U, r).transpose(), row_major(dC, r), nullptr, dS, workspace);
}

}  // namespace CONDLR_ISA
}  // namespace condlr
