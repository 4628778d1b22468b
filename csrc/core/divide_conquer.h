// Eigenvalues and eigenvectors of a symmetric tridiagonal matrix by divide and conquer (Cuppen; Gu and
// Eisenstat).
#pragma once

#include "gemm.h"

namespace condlr {
namespace CONDLR_ISA {

template <class T>
constexpr T kUnit = sizeof(T) == 4 ? T(0x1p-24) : T(0x1p-53);

// ---- leaves: Jacobi on as many small matrices as a vector has lanes

constexpr int kLeaf = 8;

// A: the lower half of kLeaf x kLeaf matrices, one in each lane, destroyed (its diagonal becomes the
// eigenvalues); Q: eigenvectors as rows. Entries up to `tolerance` count as zero.
template <class T>
bool jacobi_leaves(typename Vec<T>::type (*A)[kLeaf], typename Vec<T>::type (*Q)[kLeaf], T tolerance) {
  using S = typename Vec<T>::type;
  const S zero = {}, one = broadcast(T(1));
  for (int i = 0; i < kLeaf; ++i) {
    for (int j = 0; j < kLeaf; ++j) Q[i][j] = i == j ? one : zero;
  }
  S* entry[kLeaf][kLeaf];  // of the symmetric matrix
  for (int i = 0; i < kLeaf; ++i) {
    for (int j = 0; j <= i; ++j) entry[i][j] = entry[j][i] = &A[i][j];
  }
  for (int sweep = 0; sweep < 30; ++sweep) {
    S largest = zero;
    for (int i = 1; i < kLeaf; ++i) {
      for (int j = 0; j < i; ++j) {
        const S a = magnitude<T>(A[i][j]);
        largest = a > largest ? a : largest;
      }
    }
    if (!any(largest > tolerance)) return true;
    for (int round = 0; round < kLeaf - 1; ++round) {
      // each round pairs all indices (a tournament in which the last one stays in place)
      S sine[kLeaf / 2], tangent_half[kLeaf / 2];
      int low[kLeaf / 2], high[kLeaf / 2];
      for (int pair = 0; pair < kLeaf / 2; ++pair) {
        const int a = pair == 0 ? kLeaf - 1 : (round + pair) % (kLeaf - 1);
        const int b = (round + kLeaf - 1 - pair) % (kLeaf - 1);
        const int p = a < b ? a : b, q = a < b ? b : a;
        low[pair] = p;
        high[pair] = q;
        const S x = A[q][p], difference = A[q][q] - A[p][p];
        const auto active = magnitude<T>(x) > tolerance;
        const S twice = difference < 0 ? -2 * x : 2 * x;
        const S length = magnitude<T>(difference) + square_root<T>(difference * difference + 4 * x * x);
        const S t = active ? twice / length : zero;
        const S c = one / square_root<T>(one + t * t);
        sine[pair] = c * t;
        tangent_half[pair] = sine[pair] / (one + c);
        A[p][p] -= t * x;
        A[q][q] += t * x;
        A[q][p] = active ? zero : x;
      }
      for (int pair = 0; pair < kLeaf / 2; ++pair) {
        const int p = low[pair], q = high[pair];
        const S s = sine[pair], h = tangent_half[pair];
        CONDLR_UNROLL
        for (int k = 0; k < kLeaf; ++k) {
          if (k != p && k != q) {
            S& u = *entry[p][k];
            S& v = *entry[q][k];
            const S a = u, b = v;
            u = a - s * (b + h * a);
            v = b + s * (a - h * b);
          }
          const S a = Q[p][k], b = Q[q][k];
          Q[p][k] = a - s * (b + h * a);
          Q[q][k] = b + s * (a - h * b);
        }
      }
    }
  }
  return false;
}

// The diagonal blocks [bounds[l], bounds[l + 1]) of T, at most kLeaf long: eigenvalues ascending in place of
// their diagonals, eigenvectors as rows of the same diagonal blocks of Q.
template <class T>
bool solve_leaves(const int64_t* bounds, int64_t leaves, const T* e, T* lambda, T* Q, int64_t stride,
                  T tolerance) {
  constexpr int kLanes = Vec<T>::kLanes;
  using S = typename Vec<T>::type;
  S A[kLeaf][kLeaf], vectors[kLeaf][kLeaf];
  for (int64_t first = 0; first < leaves; first += kLanes) {
    const int count = leaves - first < kLanes ? static_cast<int>(leaves - first) : kLanes;
    for (int i = 0; i < kLeaf; ++i) {
      for (int j = 0; j <= i; ++j) A[i][j] = S{};
    }
    for (int lane = 0; lane < count; ++lane) {
      const int64_t start = bounds[first + lane], size = bounds[first + lane + 1] - start;
      for (int64_t i = 0; i < size; ++i) {
        A[i][i][lane] = lambda[start + i];
        if (i > 0) A[i][i - 1][lane] = e[start + i - 1];
      }
    }
    if (!jacobi_leaves<T>(A, vectors, tolerance)) return false;
    for (int lane = 0; lane < count; ++lane) {
      const int64_t start = bounds[first + lane], size = bounds[first + lane + 1] - start;
      int64_t order[kLeaf];
      for (int64_t i = 0; i < size; ++i) {
        int64_t j = i;
        for (; j > 0 && A[order[j - 1]][order[j - 1]][lane] > A[i][i][lane]; --j) order[j] = order[j - 1];
        order[j] = i;
      }
      for (int64_t i = 0; i < size; ++i) {
        lambda[start + i] = A[order[i]][order[i]][lane];
        T* row = Q + (start + i) * stride + start;
        for (int64_t j = 0; j < size; ++j) row[j] = vectors[order[i]][j][lane];
      }
    }
  }
  return true;
}

// ---- the secular equation 1 / rho + Σ z_j² / (d_j - x) = 0

// Lane by lane: f at x = origin + tau, its derivative, half the second one, and Σ |z_j² / (d_j - x)|.
template <class T>
struct Secular {
  using S = typename Vec<T>::type;
  S f, slope, bend, size;

  Secular(int64_t k, const T* d, const T* z2, T rho_inverse, const S& origin, const S& tau)
      : f(broadcast(rho_inverse)), slope{}, bend{}, size(broadcast(rho_inverse)) {
    for (int64_t j = 0; j < k; ++j) {
      const S inverse = T(1) / ((d[j] - origin) - tau);
      const S term = z2[j] * inverse;
      const S term1 = term * inverse;
      f += term;
      size += magnitude<T>(term);
      slope += term1;
      bend += term1 * inverse;
    }
  }
};

// The root (a - √(a² - 4 b c)) / 2c of c x² - a x + b = 0 without cancellation: the step to the root of a
// function that lies between its two poles.
template <class T>
inline typename Vec<T>::type two_pole_root(const typename Vec<T>::type& a, const typename Vec<T>::type& b,
                                           const typename Vec<T>::type& c) {
  using S = typename Vec<T>::type;
  const S square = a * a - 4 * b * c;
  const S root = square_root<T>(square < 0 ? S{} : square);
  return a > 0 ? 2 * b / (a + root) : (a - root) / (2 * c);
}

// The k roots of the secular equation, one between each two poles, as origin (the nearest pole) + tau; d
// ascending with 2 * lanes more entries behind, rho > 0. Iterates Gragg's scheme (two poles that match f and
// two derivatives, cubic convergence), kept in a bracket, on as many roots as a vector has lanes.
template <class T>
bool solve_secular(int64_t k, T* d, const T* z2, T rho, T* origins, T* taus) {
  constexpr int kLanes = Vec<T>::kLanes;
  using V = Vec<T>;
  using S = typename V::type;
  T norm2 = 0;
  for (int64_t j = 0; j < k; ++j) norm2 += z2[j];
  // the last root is at most rho |z|² to the right of its pole: twice as far are poles without weight
  for (int64_t j = k; j < k + 2 * kLanes; ++j) d[j] = d[j - 1] + 2 * rho * norm2;
  T lanes[kLanes], weights[kLanes + 1];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<T>(i);
  const T rho_inverse = 1 / rho;
  bool converged = true;
  for (int64_t first = 0; first < k; first += kLanes) {
    for (int64_t i = 0; i <= kLanes; ++i) weights[i] = first + i < k ? z2[first + i] : T(0);
    const S left = V::load(d + first), right = V::load(d + first + 1);
    const S left2 = V::load(weights), right2 = V::load(weights + 1);
    const S gap = right - left, half = gap / 2;
    const Secular<T> middle(k, d, z2, rho_inverse, left, half);
    const auto in_right = middle.f < 0;
    const S origin = in_right ? right : left;
    S low = in_right ? -half : S{}, high = in_right ? S{} : half;
    // start: the two poles beside the root exact, the sum of the others as in the middle
    const S rest = middle.f + (left2 - right2) / half;
    const S signed_gap = in_right ? -gap : gap;
    S tau =
        two_pole_root<T>(rest * signed_gap + left2 + right2, (in_right ? right2 : left2) * signed_gap, rest);
    tau = ((tau > low) & (tau < high)) ? tau : (low + high) / 2;
    auto active = V::load(lanes) < static_cast<T>(k - first);
    for (int iteration = 0; iteration < 100 && any(active); ++iteration) {
      const Secular<T> at(k, d, z2, rho_inverse, origin, tau);
      high = at.f > 0 ? tau : high;
      low = at.f > 0 ? low : tau;
      active &= magnitude<T>(at.f) > 4 * kUnit<T> * at.size;
      if (!any(active)) break;
      const S l = (left - origin) - tau, r = (right - origin) - tau;
      S next = tau + two_pole_root<T>((l + r) * at.f - l * r * at.slope, l * r * at.f,
                                      at.f - (l + r) * at.slope + l * r * at.bend);
      next = ((next > low) & (next < high)) ? next : (low + high) / 2;
      active &= magnitude<T>(next - tau) > 2 * kUnit<T> * magnitude<T>(tau);
      tau = active ? next : tau;
    }
    converged = converged && !any(active);
    V::store(origins + first, origin);
    V::store(taus + first, tau);
  }
  return converged;
}

// The z for which the computed roots are exact, up to its sign and length: it makes the eigenvectors
// orthogonal.
template <class T>
void exact_weights(int64_t k, const T* d, const T* origins, const T* taus, T* z) {
  constexpr int kLanes = Vec<T>::kLanes;
  using V = Vec<T>;
  using S = typename V::type;
  T lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<T>(i);
  const S one = broadcast(T(1));
  for (int64_t first = 0; first < k; first += kLanes) {
    const S pole = V::load(d + first), lane = V::load(lanes);
    S product = one;
    for (int64_t j = 0; j < k; ++j) {
      const S gap = lane == static_cast<T>(j - first) ? one : pole - d[j];
      product *= ((pole - origins[j]) - taus[j]) / gap;
    }
    V::store(z + first, square_root<T>(magnitude<T>(product)));
  }
}

// ---- two halves joined

// diag(D1, D2) + rho z zᵀ after deflation. Its eigenvectors are combinations of the rows of the halves that
// belong to the k poles, and rows that stay as they are.
template <class T>
struct Merge {
  int64_t n1, n2;               // sizes of the halves
  int64_t k;                    // poles left
  int64_t in_first, in_second;  // poles whose row has entries in the first, the second half
  T* d;                         // [k] poles ascending
  T* origins;                   // [k] roots ascending, relative to the nearest pole
  T* taus;                      // [k]
  T* grouped_d;                 // [k] poles: first half only, both, second half only
  T* grouped_z;                 // [k] the z for which the roots are exact
  T* first;                     // [in_first, row_stride(n1)] rows of the poles
  T* second;                    // [in_second, row_stride(n2)]
  T* deflated;                  // [n - k, n] rows
  int64_t* order;               // [n] eigenvalues ascending: root j as j, deflated row i as k + i
};

template <class T>
Merge<T> take_merge(int64_t n, Scratch& scratch) {
  const int64_t padded = n + 2 * Vec<T>::kLanes, half = row_stride<T>(n / 2 + 1);
  Merge<T> merge{};
  merge.d = scratch.take<T>(padded);
  merge.origins = scratch.take<T>(padded);
  merge.taus = scratch.take<T>(padded);
  merge.grouped_d = scratch.take<T>(n);
  merge.grouped_z = scratch.take<T>(n);
  merge.first = scratch.take<T>(n * half);
  merge.second = scratch.take<T>(n * half);
  merge.deflated = scratch.take<T>(n * n);
  merge.order = scratch.take<int64_t>(n);
  return merge;
}

// The rows of Q as poles and deflated rows, both by ascending eigenvalue.
template <class T>
struct Deflation {
  int64_t poles, kept;
  int64_t* pole_row;
  int64_t* kept_row;
  int64_t* half;  // where a row has entries: 0 first half, 1 both, 2 second half
  T* z;           // by row
};

template <class T>
Deflation<T> take_deflation(int64_t n, Scratch& scratch) {
  return {
      0, 0, scratch.take<int64_t>(n), scratch.take<int64_t>(n), scratch.take<int64_t>(n), scratch.take<T>(n)};
}

// A row without weight is an eigenvector already; so is, of two rows with nearly equal eigenvalues, the one
// that a rotation of the pair leaves without weight. Neglected entries are at most `tolerance`.
template <class T>
void deflate(int64_t n1, int64_t n2, T e, T tolerance, T* lambda, T* Q, int64_t stride, Deflation<T>& out,
             Workspace& workspace) {
  const int64_t n = n1 + n2;
  Scratch scratch(workspace);
  int64_t* sorted = scratch.take<int64_t>(n);
  for (int64_t i = 0, a = 0, b = n1; i < n; ++i)
    sorted[i] = b == n || (a < n1 && lambda[a] <= lambda[b]) ? a++ : b++;
  T* z = out.z;
  for (int64_t i = 0; i < n; ++i) {
    out.half[i] = i < n1 ? 0 : 2;
    z[i] = i < n1 ? Q[i * stride + n1 - 1] : e < 0 ? -Q[i * stride + n1] : Q[i * stride + n1];
  }
  const auto keep = [&](int64_t row) {
    int64_t i = out.kept++;
    for (; i > 0 && lambda[out.kept_row[i - 1]] > lambda[row]; --i) out.kept_row[i] = out.kept_row[i - 1];
    out.kept_row[i] = row;
  };
  const T rho = __builtin_fabs(e);
  int64_t pending = -1;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t row = sorted[i];
    if (!(rho * __builtin_fabs(z[row]) > tolerance)) {
      keep(row);
      continue;
    }
    if (pending >= 0) {
      const T length = __builtin_sqrt(z[row] * z[row] + z[pending] * z[pending]);
      const T c = z[row] / length, s = z[pending] / length, difference = lambda[row] - lambda[pending];
      if (__builtin_fabs(difference * c * s) > tolerance) {
        out.pole_row[out.poles++] = pending;
      } else {
        T* x = Q + pending * stride;
        T* y = Q + row * stride;
        for (int64_t j = 0; j < n; ++j) {
          const T a = x[j], b = y[j];
          x[j] = c * a - s * b;
          y[j] = s * a + c * b;
        }
        z[row] = length;
        lambda[row] -= difference * s * s;
        lambda[pending] += difference * s * s;
        if (out.half[row] != out.half[pending]) out.half[row] = 1;
        keep(pending);
      }
    }
    pending = row;
  }
  if (pending >= 0) out.pole_row[out.poles++] = pending;
}

// Joins two halves with the coupling e between them. In: their eigenvalues, ascending each, in lambda, and
// their eigenvectors in the two diagonal blocks of Q (rows, zeros in the other blocks). Out: all eigenvalues
// ascending in lambda, and in `merge` what forms the eigenvectors; Q is overwritten.
template <class T>
bool join(Merge<T>& merge, int64_t n1, int64_t n2, T e, T tolerance, T* lambda, T* Q, int64_t stride,
          Workspace& workspace) {
  const int64_t n = n1 + n2;
  Scratch scratch(workspace);
  Deflation<T> rows = take_deflation<T>(n, scratch);
  T* z2 = scratch.take<T>(n);
  T* weights = scratch.take<T>(n + Vec<T>::kLanes);
  T* values = scratch.take<T>(n);
  deflate(n1, n2, e, tolerance, lambda, Q, stride, rows, workspace);
  const int64_t k = rows.poles;
  for (int64_t j = 0; j < k; ++j) {
    merge.d[j] = lambda[rows.pole_row[j]];
    z2[j] = rows.z[rows.pole_row[j]] * rows.z[rows.pole_row[j]];
  }
  if (k > 0) {
    if (!solve_secular(k, merge.d, z2, T(__builtin_fabs(e)), merge.origins, merge.taus)) return false;
    exact_weights(k, merge.d, merge.origins, merge.taus, weights);
  }

  merge.n1 = n1;
  merge.n2 = n2;
  merge.k = k;
  merge.in_first = merge.in_second = 0;
  const int64_t stride1 = row_stride<T>(n1), stride2 = row_stride<T>(n2);
  for (int64_t group = 0, at = 0; group < 3; ++group) {
    for (int64_t j = 0; j < k; ++j) {
      const int64_t row = rows.pole_row[j];
      if (rows.half[row] != group) continue;
      merge.grouped_d[at] = merge.d[j];
      merge.grouped_z[at++] = rows.z[row] < 0 ? -weights[j] : weights[j];
      const T* q = Q + row * stride;
      if (group < 2)
        std::memcpy(merge.first + merge.in_first++ * stride1, q, sizeof(T) * static_cast<std::size_t>(n1));
      if (group > 0)
        std::memcpy(merge.second + merge.in_second++ * stride2, q + n1,
                    sizeof(T) * static_cast<std::size_t>(n2));
    }
  }
  for (int64_t i = 0; i < rows.kept; ++i) {
    const int64_t row = rows.kept_row[i];
    values[i] = lambda[row];
    std::memcpy(merge.deflated + i * n, Q + row * stride, sizeof(T) * static_cast<std::size_t>(n));
  }
  for (int64_t i = 0, root = 0, row = 0; i < n; ++i) {
    const T value = root < k ? merge.origins[root] + merge.taus[root] : T(0);
    if (row == rows.kept || (root < k && value <= values[row])) {
      lambda[i] = value;
      merge.order[i] = root++;
    } else {
      lambda[i] = values[row];
      merge.order[i] = k + row++;
    }
  }
  return true;
}

// U [k, stride]: the eigenvectors of these roots, as columns, in the basis of the grouped poles.
template <class T>
void root_vectors(const Merge<T>& merge, const int64_t* roots, int64_t count, T* U, int64_t stride) {
  using V = Vec<T>;
  using S = typename V::type;
  T origins[V::kLanes], taus[V::kLanes];
  for (int64_t first = 0; first < count; first += V::kLanes) {
    for (int64_t lane = 0; lane < V::kLanes; ++lane) {
      const int64_t root = roots[first + lane < count ? first + lane : count - 1];
      origins[lane] = merge.origins[root];
      taus[lane] = merge.taus[root];
    }
    const S origin = V::load(origins), tau = V::load(taus);
    S square = {};
    for (int64_t i = 0; i < merge.k; ++i) {
      const S u = merge.grouped_z[i] / ((merge.grouped_d[i] - origin) - tau);
      square += u * u;
      V::store(U + i * stride + first, u);
    }
    const S inverse = T(1) / square_root<T>(square);
    for (int64_t i = 0; i < merge.k; ++i) {
      T* u = U + i * stride + first;
      V::store(u, inverse * V::load(u));
    }
  }
}

// The joined eigenvectors as rows of the block Q.
template <class T>
void form_rows(const Merge<T>& merge, T* Q, int64_t stride, Workspace& workspace) {
  const int64_t n1 = merge.n1, n2 = merge.n2, n = n1 + n2, k = merge.k;
  Scratch scratch(workspace);
  const int64_t width = row_stride<T>(k);
  T* U = scratch.take<T>(k * width);
  T* rows = scratch.take<T>(k * n);
  int64_t* roots = scratch.take<int64_t>(k);
  for (int64_t j = 0; j < k; ++j) roots[j] = j;
  root_vectors(merge, roots, k, U, width);
  const View<T> basis = row_major(U, width).transpose();
  product(k, n1, merge.in_first, T(1), basis, merge.first, row_stride<T>(n1), false, rows, n);
  product(k, n2, merge.in_second, T(1), basis.at(0, k - merge.in_second), merge.second, row_stride<T>(n2),
          false, rows + n1, n);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t source = merge.order[i];
    const T* row = source < k ? rows + source * n : merge.deflated + (source - k) * n;
    std::memcpy(Q + i * stride, row, sizeof(T) * static_cast<std::size_t>(n));
  }
}

// X [n, stride]: the eigenvectors at these positions of the ascending order; `column` holds the column of
// each.
template <class T>
void form_columns(const Merge<T>& merge, const int64_t* positions, int64_t count, T* X, int64_t stride,
                  int64_t* column, Workspace& workspace) {
  const int64_t n1 = merge.n1, n2 = merge.n2, n = n1 + n2, k = merge.k;
  Scratch scratch(workspace);
  int64_t* roots = scratch.take<int64_t>(count);
  int64_t found = 0, rest = count;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t source = merge.order[positions[c]];
    if (source < k) {
      column[c] = found;
      roots[found++] = source;
    } else {
      column[c] = --rest;
    }
  }
  const int64_t width = row_stride<T>(found);
  T* U = scratch.take<T>(k * width);
  root_vectors(merge, roots, found, U, width);
  product(n1, found, merge.in_first, T(1), row_major(merge.first, row_stride<T>(n1)).transpose(), U, width,
          false, X, stride);
  product(n2, found, merge.in_second, T(1), row_major(merge.second, row_stride<T>(n2)).transpose(),
          U + (k - merge.in_second) * width, width, false, X + n1 * stride, stride);
  for (int64_t c = 0; c < count; ++c) {
    if (column[c] < found) continue;
    const T* row = merge.deflated + (merge.order[positions[c]] - k) * n;
    for (int64_t i = 0; i < n; ++i) X[i * stride + column[c]] = row[i];
  }
}

// T has diagonal lambda and couplings e [n - 1]. Out: all eigenvalues ascending in lambda, and in `merge`
// what forms the eigenvectors.
template <class T>
bool divide_conquer(int64_t n, T* lambda, T* e, Merge<T>& merge, Workspace& workspace) {
  Scratch scratch(workspace);
  T* Q = scratch.take<T>(n * n);
  fill(Q, n * n, T(0));
  T norm = 0;
  for (int64_t i = 0; i < n; ++i) {
    const T row = __builtin_fabs(lambda[i]) + (i > 0 ? __builtin_fabs(e[i - 1]) : T(0)) +
                  (i + 1 < n ? __builtin_fabs(e[i]) : T(0));
    norm = row > norm ? row : norm;
  }
  int64_t leaves = 1;
  while (leaves * kLeaf < n) leaves *= 2;
  int64_t* bounds = scratch.take<int64_t>(leaves + 1);
  for (int64_t l = 0; l <= leaves; ++l) bounds[l] = l * n / leaves;
  // T = diag(leaves) + Σ |e| z zᵀ, z = (..., 1, sign e, ...) at each bound
  for (int64_t l = 1; l < leaves; ++l) {
    const T coupling = __builtin_fabs(e[bounds[l] - 1]);
    lambda[bounds[l] - 1] -= coupling;
    lambda[bounds[l]] -= coupling;
  }
  if (!solve_leaves(bounds, leaves, e, lambda, Q, n, kUnit<T> * norm)) return false;
  if (leaves == 1) {
    merge.n1 = n;
    merge.n2 = merge.k = merge.in_first = merge.in_second = 0;
    std::memcpy(merge.deflated, Q, sizeof(T) * static_cast<std::size_t>(n * n));
    for (int64_t i = 0; i < n; ++i) merge.order[i] = i;
    return true;
  }
  for (int64_t step = 1; step < leaves; step *= 2) {
    for (int64_t l = 0; l < leaves; l += 2 * step) {
      const int64_t start = bounds[l], middle = bounds[l + step], end = bounds[l + 2 * step];
      T* block = Q + start * (n + 1);
      if (!join(merge, middle - start, end - middle, e[middle - 1], 4 * kUnit<T> * norm, lambda + start,
                block, n, workspace))
        return false;
      if (2 * step < leaves) form_rows(merge, block, n, workspace);
    }
  }
  return true;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
