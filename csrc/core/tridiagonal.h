// A = Q T Qᵀ with T tridiagonal and Q a product of reflections: the reduction, and the way back for vectors.
#pragma once

#include "gemm.h"

namespace condlr {
namespace CONDLR_ISA {

// The reduction works on rows of diagonal tiles: whole vectors, and at least four rows.
template <class T>
constexpr int64_t kDiagonalTile = Vec<T>::kLanes < 4 ? 4 : Vec<T>::kLanes;

template <class T>
inline int64_t round_to_tile(int64_t n) {
  return (n + kDiagonalTile<T> - 1) / kDiagonalTile<T> * kDiagonalTile<T>;
}

// Row i holds the entries up to the end of its diagonal tile; H_i = I - tau_i v vᵀ, with v in row i: it acts
// on the first i entries, v_{i-1} = 1, zeros follow. A = H_{n-1} ... H_2 T H_2 ... H_{n-1}.
template <class T>
struct Tridiagonal {
  int64_t n, stride;
  T* A;
  T* tau;
  T* d;  // diagonal of T
  T* e;  // e[i] couples i and i + 1
};

template <class T>
Tridiagonal<T> take_tridiagonal(int64_t n, Scratch& scratch) {
  // an odd number of tiles: rows do not all fall on the same sets of the cache
  const int64_t stride = (round_to_tile<T>(n) / kDiagonalTile<T> | 1) * kDiagonalTile<T>;
  return {n, stride, scratch.take<T>(n * stride), scratch.take<T>(n), scratch.take<T>(n), scratch.take<T>(n)};
}

// Rows [i, i + R): A -= v wᵀ + w vᵀ, and in the same pass their share of y = A x. Columns before `square`
// stand for both halves of the symmetric matrix, those from there on are the diagonal tile. Each row stores
// the sum over its columns in `part`.
template <class T, int R>
inline void update_rows(T* A, int64_t stride, int64_t i, int64_t square, const T* v, const T* w, const T* x,
                        T* y, T* part) {
  using V = Vec<T>;
  using S = typename V::type;
  T* row = A + i * stride;
  S sum[R] = {};
  for (int64_t j = 0; j < square; j += V::kLanes) {
    const S vj = V::load(v + j), wj = V::load(w + j), xj = V::load(x + j);
    S yj = V::load(y + j);
    CONDLR_UNROLL
    for (int r = 0; r < R; ++r) {
      const S a = V::load(row + r * stride + j) - v[i + r] * wj - w[i + r] * vj;
      V::store(row + r * stride + j, a);
      sum[r] += a * xj;
      yj += a * x[i + r];
    }
    V::store(y + j, yj);
  }
  for (int64_t j = square; j < square + kDiagonalTile<T>; j += V::kLanes) {
    const S vj = V::load(v + j), wj = V::load(w + j), xj = V::load(x + j);
    CONDLR_UNROLL
    for (int r = 0; r < R; ++r) {
      const S a = V::load(row + r * stride + j) - v[i + r] * wj - w[i + r] * vj;
      V::store(row + r * stride + j, a);
      sum[r] += a * xj;
    }
  }
  CONDLR_UNROLL
  for (int r = 0; r < R; ++r) store_part<T>(sum[r], part + (i + r) * Part<T>::kLanes);
}

template <class T>
inline T dot_padded(const T* x, const T* y, int64_t n) {
  using V = Vec<T>;
  typename V::type sum = {};
  for (int64_t i = 0; i < n; i += V::kLanes) sum += V::load(x + i) * V::load(y + i);
  return total<T>(sum);
}

// Eliminates from the last row up. The rank-two update of one step is applied in the pass that multiplies by
// the vector of the next one, so that the matrix goes through the cache once per step. Entries are at most
// about 1.
template <class T>
void tridiagonalize(Tridiagonal<T>& t, Workspace& workspace) {
  using V = Vec<T>;
  constexpr int64_t kTile = kDiagonalTile<T>, kLanes = V::kLanes;
  // a column whose square is below this has no accurate norm; it is far below the rounding errors of A
  const T null_square = sizeof(T) == 4 ? T(1e-30) : T(1e-290);
  Scratch scratch(workspace);
  const int64_t width = round_to_tile<T>(t.n + 1);
  T* none = scratch.take<T>(width);
  T* w = scratch.take<T>(width);
  T* y = scratch.take<T>(width);
  T* part = scratch.take<T>(width * Part<T>::kLanes);
  fill(none, width, T(0));
  fill(w, width, T(0));
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<T>(i);
  const typename V::type lane = V::load(lanes);
  const T* v = none;
  for (int64_t m = t.n - 1; m >= 0; --m) {
    T* x = t.A + m * t.stride;
    const int64_t padded = round_to_tile<T>(m + 1);
    t.d[m] = x[m] - v[m] * w[m] - w[m] * v[m];
    t.tau[m] = 0;
    if (m == 0) break;
    const T head = x[m - 1] - v[m] * w[m - 1] - w[m] * v[m - 1];
    typename V::type sum = {};
    for (int64_t j = 0; j < padded; j += kLanes) {
      const typename V::type updated = V::load(x + j) - v[m] * V::load(w + j) - w[m] * V::load(v + j);
      const typename V::type tail = lane < static_cast<T>(m - 1 - j) ? updated : typename V::type{};
      V::store(x + j, tail);
      sum += tail * tail;
    }
    const T tail2 = total<T>(sum);
    T inverse = 0;
    t.e[m - 1] = head;
    if (tail2 >= null_square) {
      const T norm = __builtin_sqrt(head * head + tail2);
      const T beta = head > 0 ? -norm : norm;
      inverse = 1 / (head - beta);
      t.e[m - 1] = beta;
      t.tau[m] = (beta - head) / beta;
    }
    for (int64_t j = 0; j < padded; j += kLanes) {
      V::store(x + j, inverse * V::load(x + j));
      V::store(y + j, typename V::type{});
    }
    x[m - 1] = t.tau[m] == 0 ? T(0) : T(1);

    for (int64_t square = 0; square < m; square += kTile) {
      const int64_t end = m < square + kTile ? m : square + kTile;
      int64_t i = square;
      for (; i + 4 <= end; i += 4) update_rows<T, 4>(t.A, t.stride, i, square, v, w, x, y, part);
      for (; i < end; ++i) update_rows<T, 1>(t.A, t.stride, i, square, v, w, x, y, part);
    }
    for (int64_t i = 0; i < m; ++i) {
      CONDLR_UNROLL
      for (int p = 0; p < Part<T>::kLanes; ++p) y[i] += part[i * Part<T>::kLanes + p];
    }
    const T shift = t.tau[m] / 2 * dot_padded(x, y, padded);
    for (int64_t j = 0; j < padded; j += kLanes)
      V::store(y + j, t.tau[m] * (V::load(y + j) - shift * V::load(x + j)));
    v = x;
    T* swap = w;
    w = y;
    y = swap;
  }
}

// X [n, columns] <- H_{n-1} ... H_2 X by blocks of reflections, X with rows of whole vectors `stride` apart.
template <class T>
void back_transform(const Tridiagonal<T>& t, int64_t columns, T* X, int64_t stride, Workspace& workspace) {
  constexpr int64_t kBlock = 32;
  Scratch scratch(workspace);
  T* reflections = scratch.take<T>(kBlock * t.n);
  T* gram = scratch.take<T>(kBlock * kBlock);
  T* factor = scratch.take<T>(kBlock * kBlock);
  T* projected = scratch.take<T>(kBlock * stride);
  T* scaled = scratch.take<T>(kBlock * stride);
  for (int64_t first = 2; first < t.n; first += kBlock) {
    const int64_t size = t.n - first < kBlock ? t.n - first : kBlock;
    const int64_t length = first + size - 1;
    for (int64_t i = 0; i < size; ++i) {
      T* v = reflections + i * length;
      std::memcpy(v, t.A + (first + i) * t.stride, sizeof(T) * static_cast<std::size_t>(first + i));
      fill(v + first + i, size - 1 - i, T(0));
    }
    const View<T> V = row_major(reflections, length);
    gemm<T>(size, size, length, 1, V, V.transpose(), nullptr, gram, workspace);
    // H_first ... H_last = I - Vᵀ F V with F upper triangular; here the rows of Fᵀ
    for (int64_t j = 0; j < size; ++j) {
      const T tau = t.tau[first + j];
      typename Vec<T>::type row[kBlock / Vec<T>::kLanes] = {};
      for (int64_t i = 0; i < j; ++i) {
        const T a = -tau * gram[i * size + j];
        CONDLR_UNROLL
        for (int c = 0; c < kBlock / Vec<T>::kLanes; ++c)
          row[c] += a * Vec<T>::load(factor + i * kBlock + c * Vec<T>::kLanes);
      }
      std::memcpy(factor + j * kBlock, row, sizeof row);
      factor[j * kBlock + j] = tau;
    }
    product(size, columns, length, T(1), V, X, stride, false, projected, stride);
    product(size, columns, size, T(1), row_major(factor, kBlock), projected, stride, false, scaled, stride);
    product(length, columns, size, T(-1), V.transpose(), scaled, stride, true, X, stride);
  }
}

}  // namespace CONDLR_ISA
}  // namespace condlr
