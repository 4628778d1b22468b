// C = C0 + alpha A B by register tiles: up to four vectors of a row of B against scalars of A with any
// strides.
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

// Rows of a tile that is `vectors` wide: its accumulators, a row of B and a scalar fit the registers.
constexpr int kTileVectors = 4;
constexpr int kDiagonalVectors = 2;  // narrow panels leave more tiles out
constexpr int tile_rows(int vectors) {
  const int rows = 2 * CONDLR_TILE_ROWS / vectors;
  return rows < CONDLR_TILE_ROWS ? rows : CONDLR_TILE_ROWS;
}

constexpr int64_t kNoDiagonal = int64_t{1} << 62;

// n columns of a row-major matrix in tiles of nearly equal width, in vectors; parts of m rows alike.
inline int64_t parts(int64_t size, int64_t largest) { return (size + largest - 1) / largest; }
inline int64_t part_begin(int64_t size, int64_t count, int64_t index) {
  const int64_t small = size / count, extra = size % count;
  return index * small + (index < extra ? index : extra);
}

template <class T>
int64_t vectors_of(int64_t n) {
  return (n + Vec<T>::kLanes - 1) / Vec<T>::kLanes;
}

// One tile C [R, columns] = C or 0 + alpha A [R, depth] B [depth, columns]. Rows of B are `stride` apart and
// may be read to the end of their last vector.
template <class T, int R, int V>
inline void tile_product(int64_t depth, T alpha, View<T> A, const T* B, int64_t stride, bool accumulate,
                         int64_t columns, T* C, int64_t ldc) {
  using X = Vec<T>;
  typename X::type sum[R][V] = {};
  const T* a = A.data;
  for (int64_t p = 0; p < depth; ++p, a += A.col, B += stride) {
    typename X::type b[V];
    CONDLR_UNROLL
    for (int v = 0; v < V; ++v) b[v] = X::load(B + v * X::kLanes);
    CONDLR_UNROLL
    for (int i = 0; i < R; ++i) {
      CONDLR_UNROLL
      for (int v = 0; v < V; ++v) sum[i][v] += a[i * A.row] * b[v];
    }
  }
  const int64_t last = columns - (V - 1) * X::kLanes;
  CONDLR_UNROLL
  for (int i = 0; i < R; ++i) {
    T* c = C + i * ldc;
    CONDLR_UNROLL
    for (int v = 0; v < V; ++v, c += X::kLanes) {
      if (v < V - 1 || last == X::kLanes) {
        X::store(c, accumulate ? X::load(c) + alpha * sum[i][v] : alpha * sum[i][v]);
      } else {
        X::store(c, accumulate ? X::load(c, last) + alpha * sum[i][v] : alpha * sum[i][v], last);
      }
    }
  }
}

template <class T, int V, int R>
struct TileOf {
  static void run(int64_t rows, int64_t depth, T alpha, View<T> A, const T* B, int64_t stride,
                  bool accumulate, int64_t columns, T* C, int64_t ldc) {
    if (rows == R) return tile_product<T, R, V>(depth, alpha, A, B, stride, accumulate, columns, C, ldc);
    TileOf<T, V, R - 1>::run(rows, depth, alpha, A, B, stride, accumulate, columns, C, ldc);
  }
};

template <class T, int V>
struct TileOf<T, V, 0> {
  static void run(int64_t, int64_t, T, View<T>, const T*, int64_t, bool, int64_t, T*, int64_t) {}
};

// C [m, columns] = C or 0 + alpha A B for one panel, B [depth, V vectors]. Tiles whose first column lies
// above the diagonal j = i + diagonal of their last row are left out; `column` is that of B's first one.
template <class T, int V>
void panel_product(int64_t m, int64_t depth, T alpha, View<T> A, const T* B, int64_t stride, bool accumulate,
                   int64_t columns, T* C, int64_t ldc, int64_t column, int64_t diagonal) {
  constexpr int R = tile_rows(V);
  const int64_t count = parts(m, R);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t i = part_begin(m, count, t), end = part_begin(m, count, t + 1);
    if (column > end - 1 + diagonal) continue;
    TileOf<T, V, R>::run(end - i, depth, alpha, A.at(i, 0), B, stride, accumulate, columns, C + i * ldc, ldc);
  }
}

template <class T>
void any_panel_product(int64_t vectors, int64_t m, int64_t depth, T alpha, View<T> A, const T* B,
                       int64_t stride, bool accumulate, int64_t columns, T* C, int64_t ldc, int64_t column,
                       int64_t diagonal) {
  switch (vectors) {
    case 1:
      return panel_product<T, 1>(m, depth, alpha, A, B, stride, accumulate, columns, C, ldc, column,
                                 diagonal);
    case 2:
      return panel_product<T, 2>(m, depth, alpha, A, B, stride, accumulate, columns, C, ldc, column,
                                 diagonal);
    case 3:
      return panel_product<T, 3>(m, depth, alpha, A, B, stride, accumulate, columns, C, ldc, column,
                                 diagonal);
    default:
      return panel_product<T, 4>(m, depth, alpha, A, B, stride, accumulate, columns, C, ldc, column,
                                 diagonal);
  }
}

// Calls work(first column, columns, vectors) for the panels of n columns.
template <class T, class Work>
void for_each_panel(int64_t n, int64_t widest, const Work& work) {
  const int64_t vectors = vectors_of<T>(n), count = parts(vectors, widest);
  for (int64_t t = 0; t < count; ++t) {
    const int64_t begin = part_begin(vectors, count, t), end = part_begin(vectors, count, t + 1);
    const int64_t column = begin * Vec<T>::kLanes;
    const int64_t columns = t + 1 < count ? (end - begin) * Vec<T>::kLanes : n - column;
    work(column, columns, end - begin);
  }
}

// C [m, n] = C or 0 + alpha A [m, depth] B, B row-major [depth, n] with rows `stride` apart that may be read
// to the end of their last vector; see panel_product for the diagonal.
template <class T>
void product(int64_t m, int64_t n, int64_t depth, T alpha, View<T> A, const T* B, int64_t stride,
             bool accumulate, T* C, int64_t ldc, int64_t diagonal = kNoDiagonal) {
  const int64_t widest = diagonal == kNoDiagonal ? kTileVectors : kDiagonalVectors;
  for_each_panel<T>(n, widest, [&](int64_t column, int64_t columns, int64_t vectors) {
    any_panel_product(vectors, m, depth, alpha, A, B + column, stride, accumulate, columns, C + column, ldc,
                      column, diagonal);
  });
}

// B [depth, n] as panels, one after the other: rows of whole vectors, zeros behind column n.
template <class T>
struct Panels {
  T* data;
  int64_t depth, n;
  int64_t widest = kTileVectors;

  static int64_t size(int64_t depth, int64_t n) { return depth * vectors_of<T>(n) * Vec<T>::kLanes; }
};

// to [depth, width]: the columns of a [depth, columns] view, then zeros; read along the unit stride.
template <class T>
inline void pack(View<T> from, int64_t depth, int64_t columns, int64_t width, T* __restrict to) {
  int64_t first = 0;
  if (from.row == 1) {
    for (; first + 4 <= columns; first += 4) {
      const T *a = from.at(0, first).data, *b = a + from.col, *c = b + from.col, *d = c + from.col;
      T* quad = to + first;
      for (int64_t i = 0; i < depth; ++i, quad += width) {
        quad[0] = a[i];
        quad[1] = b[i];
        quad[2] = c[i];
        quad[3] = d[i];
      }
    }
  }
  for (int64_t i = 0; i < depth; ++i, to += width) {
    const T* row = from.data + i * from.row;
    if (from.col == 1) {
      for (int64_t j = first; j < columns; ++j) to[j] = row[j];
    } else {
      for (int64_t j = first; j < columns; ++j) to[j] = row[j * from.col];
    }
    for (int64_t j = columns; j < width; ++j) to[j] = 0;
  }
}

template <class T>
void pack_panels(View<T> B, const Panels<T>& to) {
  T* panel = to.data;
  for_each_panel<T>(to.n, to.widest, [&](int64_t column, int64_t columns, int64_t vectors) {
    const int64_t width = vectors * Vec<T>::kLanes;
    pack(B.at(0, column), to.depth, columns, width, panel);
    panel += to.depth * width;
  });
}

// C [m, n] = C or 0 + alpha A B
template <class T>
void product(int64_t m, T alpha, View<T> A, const Panels<T>& B, bool accumulate, T* C, int64_t ldc,
             int64_t diagonal = kNoDiagonal) {
  const T* panel = B.data;
  for_each_panel<T>(B.n, B.widest, [&](int64_t column, int64_t columns, int64_t vectors) {
    const int64_t width = vectors * Vec<T>::kLanes;
    any_panel_product(vectors, m, B.depth, alpha, A, panel, width, accumulate, columns, C + column, ldc,
                      column, diagonal);
    panel += B.depth * width;
  });
}

// C [m, n] = C or 0 + alpha A [m, k] B [k, n], C row-major with rows ldc apart.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, View<T> A, View<T> B, bool accumulate, T* C, int64_t ldc,
          Workspace& workspace, int64_t diagonal = kNoDiagonal) {
  constexpr int64_t kDepth = 256;
  if (m == 0 || n == 0) return;  // the pointer to an empty matrix may be null, which takes no offset
  if (k == 0 && !accumulate) {
    for (int64_t i = 0; i < m; ++i) fill(C + i * ldc, n, T(0));
  }
  // few rows do not pay for a copy of B
  if (B.col == 1 && n % Vec<T>::kLanes == 0 && m <= 2 * CONDLR_TILE_ROWS && k > 0) {
    return product(m, n, k, alpha, A, B.data, B.row, accumulate, C, ldc, diagonal);
  }
  Scratch scratch(workspace);
  const int64_t deepest = k < kDepth ? k : kDepth;
  T* data = scratch.take<T>(Panels<T>::size(deepest, n));
  for (int64_t p = 0; p < k; p += kDepth) {
    const int64_t depth = k - p < kDepth ? k - p : kDepth;
    const Panels<T> panels{data, depth, n, diagonal == kNoDiagonal ? kTileVectors : kDiagonalVectors};
    pack_panels(B.at(p, 0), panels);
    product(m, alpha, A.at(0, p), panels, accumulate || p > 0, C, ldc, diagonal);
  }
}

// C [m, n] = C0 + alpha A [m, k] B [k, n]; C and C0 row-major, C0 null for zero, C0 == C allowed.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, T alpha, View<T> A, View<T> B, const T* C0, T* C,
          Workspace& workspace) {
  if (C0 != nullptr && C0 != C) std::memcpy(C, C0, sizeof(T) * static_cast<std::size_t>(m * n));
  gemm(m, n, k, alpha, A, B, C0 != nullptr, C, n, workspace);
}

}  // namespace CONDLR_ISA
}  // namespace condlr
