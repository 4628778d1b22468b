// C = C0 + alpha A B by a register tile: a packed, zero-padded panel of B against rows of A with any strides.
#pragma once

#include "vec.h"

namespace condlr {
namespace CONDLR_ISA {

// A matrix with any strides: element (i, j) is data[i * row + j * col]. transpose() costs nothing.
template <class T>
struct View {
  const T* data;
  int64_t row, col;

  View transpose() const { return {data, col, row}; }
  View at(int64_t i, int64_t j) const { return {data + i * row + j * col, row, col}; }
};

template <class T>
inline View<T> row_major(const T* data, int64_t columns) {
  return {data, columns, 1};
}

template <class T>
struct Tile {
  static constexpr int kRows = CONDLR_TILE_ROWS;
  static constexpr int kCols = 2 * Vec<T>::kLanes;
  static constexpr int64_t kDepth = 256;
};

// out [kRows, kCols] = A [kRows, depth] panel [depth, kCols], all accumulators in registers.
template <class T>
inline void tile_product(int64_t depth, View<T> A, const T* panel, T* out) {
  using V = Vec<T>;
  using S = Tile<T>;
  typename V::type sum[S::kRows][2] = {};
  const T* a = A.data;
  for (int64_t p = 0; p < depth; ++p, a += A.col, panel += S::kCols) {
    const typename V::type b0 = V::load(panel), b1 = V::load(panel + V::kLanes);
    CONDLR_UNROLL
    for (int i = 0; i < S::kRows; ++i) {
      sum[i][0] += a[i * A.row] * b0;
      sum[i][1] += a[i * A.row] * b1;
    }
  }
  CONDLR_UNROLL
  for (int i = 0; i < S::kRows; ++i) {
    V::store(out + i * S::kCols, sum[i][0]);
    V::store(out + i * S::kCols + V::kLanes, sum[i][1]);
  }
}

// dst [size, width]: the columns of a [size, columns] view, then zeros.
template <class T>
inline void pack(View<T> from, int64_t size, int64_t columns, int64_t width, T* dst) {
  for (int64_t i = 0; i < size; ++i, dst += width) {
    for (int64_t j = 0; j < columns; ++j) dst[j] = from.data[i * from.row + j * from.col];
    for (int64_t j = columns; j < width; ++j) dst[j] = 0;
  }
}

// C [m, n] = C0 + alpha A [m, k] B [k, n]; C and C0 row-major, C0 null for zero, C0 == C allowed.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, View<T> A, View<T> B, const T* C0, T* C,
          Workspace& workspace) {
  using S = Tile<T>;
  if (C0 == nullptr) {
    fill(C, m * n, T(0));
  } else if (C0 != C) {
    std::memcpy(C, C0, sizeof(T) * static_cast<std::size_t>(m * n));
  }
  Scratch scratch(workspace);
  T* panel = scratch.take<T>(S::kDepth * S::kCols);
  T* edge = scratch.take<T>(S::kDepth * S::kRows);
  T* out = scratch.take<T>(S::kRows * S::kCols);
  for (int64_t j = 0; j < n; j += S::kCols) {
    const int64_t cols = n - j < S::kCols ? n - j : S::kCols;
    for (int64_t p = 0; p < k; p += S::kDepth) {
      const int64_t depth = k - p < S::kDepth ? k - p : S::kDepth;
      pack(B.at(p, j), depth, cols, S::kCols, panel);
      for (int64_t i = 0; i < m; i += S::kRows) {
        const int64_t rows = m - i < S::kRows ? m - i : S::kRows;
        View<T> a = A.at(i, p);
        if (rows < S::kRows) {
          pack(a.transpose(), depth, rows, S::kRows, edge);
          a = {edge, 1, S::kRows};
        }
        tile_product(depth, a, panel, out);
        for (int64_t y = 0; y < rows; ++y) {
          T* c = C + (i + y) * n + j;
          for (int64_t x = 0; x < cols; ++x) c[x] += alpha * out[y * S::kCols + x];
        }
      }
    }
  }
}

}  // namespace CONDLR_ISA
}  // namespace condlr
