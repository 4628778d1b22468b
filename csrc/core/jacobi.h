// One-sided Jacobi: plane rotations of pairs of rows until all rows are orthogonal.
#pragma once

#include <utility>

#include "vec.h"

namespace condlr {
namespace CONDLR_ISA {

constexpr int kMaxSweeps = 60;
// Entries are at most about 1; a row with a smaller square counts as zero.
constexpr double kNullSquare = 1e-120;

using Lanes = Vec<double>::type;
constexpr int kLanes = Vec<double>::kLanes;

// Rows are padded with zeros to whole vectors.
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// The sums of neighboring lanes of (a, b): first those of a, then those of b.
template <int... I>
inline Lanes pair_sums(const Lanes& a, const Lanes& b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
  typedef int64_t Mask __attribute__((vector_size(CONDLR_VECTOR_BYTES)));
  return __builtin_shuffle(a, b, Mask{(2 * I)...}) + __builtin_shuffle(a, b, Mask{(2 * I + 1)...});
#endif
}

// In lane i the sum of the lanes of v[i], i < kLanes; v is overwritten.
inline Lanes sum_each(Lanes* v) {
  CONDLR_UNROLL
  for (int count = kLanes; count > 1; count /= 2) {
    CONDLR_UNROLL
    for (int i = 0; i < count / 2; ++i)
      v[i] = pair_sums(v[2 * i], v[2 * i + 1], std::make_integer_sequence<int, kLanes>());
  }
  return v[0];
}

// x · y, not yet summed over lanes
inline Lanes dot_lanes(const double* x, const double* y, int64_t width) {
  using V = Vec<double>;
  Lanes a{}, b{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= width; i += 2 * kLanes) {
    a += V::load(x + i) * V::load(y + i);
    b += V::load(x + i + kLanes) * V::load(y + i + kLanes);
  }
  if (i < width) a += V::load(x + i) * V::load(y + i);
  return a + b;
}

// (x, y) <- (c x - s y, s x + c y) with c = 1 - s h, h = s / (1 + c): in this form the lengths do not drift
// over many small rotations.
inline void rotate(int64_t width, double s, double h, double* x, double* y) {
  using V = Vec<double>;
  for (int64_t i = 0; i < width; i += kLanes) {
    const Lanes a = V::load(x + i), b = V::load(y + i);
    V::store(x + i, a - s * (b + h * a));
    V::store(y + i, b + s * (a - h * b));
  }
}

// order: the rows by descending norm (insertion sort: nearly sorted after the first sweep).
inline void sort_descending(const double* square, int64_t n, int64_t* order) {
  for (int64_t i = 1; i < n; ++i) {
    const int64_t row = order[i];
    int64_t j = i;
    for (; j > 0 && square[order[j - 1]] < square[row]; --j) order[j] = order[j - 1];
    order[j] = row;
  }
}

// One round of a tournament: pair i is (top[i], bottom[i]), with the squared norms of these rows. Every array
// is longer by a vector than the pairs need, and zero past them.
struct Round {
  int64_t pairs;
  int64_t *top, *bottom;
  double *top_square, *bottom_square;
  double *product, *s, *h;

  Round(int64_t n, Scratch& scratch) : pairs((n + 1) / 2) {
    const int64_t size = padded(pairs) + kLanes;
    for (int64_t** rows : {&top, &bottom}) {
      *rows = scratch.take<int64_t>(size);
      fill(*rows, size, int64_t{0});
    }
    for (double** values : {&top_square, &bottom_square, &product, &s, &h}) {
      *values = scratch.take<double>(size);
      fill(*values, size, 0.0);
    }
  }

  // The first round, from the rows in order. If n is odd, the empty row n completes the last pair.
  void seat(const int64_t* order, const double* square, int64_t n) {
    for (int64_t i = 0; i < pairs; ++i) {
      top[i] = order[i];
      top_square[i] = square[order[i]];
      const int64_t j = 2 * pairs - 1 - i;
      bottom[i] = j < n ? order[j] : n;
      bottom_square[i] = j < n ? square[order[j]] : 0;
    }
  }

  // All seats but the first move on by one: 2 pairs - 1 rounds pair every two rows once.
  void move() {
    turn(top, bottom);
    turn(top_square, bottom_square);
  }

 private:
  // Moves whole vectors, then corrects the entries past the last pair.
  template <class S>
  void turn(S* upper, S* lower) const {
    using V = Vec<S>;
    static_assert(V::kLanes == kLanes, "rows and squares are of one size");
    if (pairs == 1) return;
    const S last = upper[pairs - 1], first = lower[0];
    for (int64_t i = padded(pairs) - kLanes; i >= 0; i -= kLanes) V::store(upper + i + 1, V::load(upper + i));
    for (int64_t i = 0; i < pairs; i += kLanes) V::store(lower + i, V::load(lower + i + 1));
    upper[1] = first;
    upper[pairs] = 0;
    lower[pairs - 1] = last;
  }
};

// product[i] = x_i . y_i
inline void find_products(const Round& round, const double* X, int64_t width) {
  for (int64_t p = 0; p < round.pairs; p += kLanes) {
    Lanes lanes[kLanes];
    const int64_t count = round.pairs - p < kLanes ? round.pairs - p : kLanes;
    for (int64_t i = 0; i < count; ++i)
      lanes[i] = dot_lanes(X + round.top[p + i] * width, X + round.bottom[p + i] * width, width);
    for (int64_t i = count; i < kLanes; ++i) lanes[i] = Lanes{};
    Vec<double>::store(round.product + p, sum_each(lanes));
  }
}

// The rotations that make the pairs orthogonal. Returns how many are needed; s is 0 for the others.
inline int find_rotations(const Round& round, double tolerance) {
  int needed = 0;
  for (int64_t p = 0; p < round.pairs; p += kLanes) {
    double* xx = round.top_square + p;
    double* yy = round.bottom_square + p;
    double xy[kLanes], t[kLanes];
    std::memcpy(xy, round.product + p, sizeof xy);
    for (int i = 0; i < kLanes; ++i) {
      const double bound = tolerance * __builtin_sqrt(xx[i]) * __builtin_sqrt(yy[i]);
      // tan 2a = twice / gap; squares of rows that are not null do not underflow
      const double gap = yy[i] - xx[i], twice = 2 * xy[i];
      const double tangent = twice / (__builtin_fabs(gap) + __builtin_sqrt(gap * gap + twice * twice));
      const bool turn = (__builtin_fabs(xy[i]) > bound) & (xx[i] >= kNullSquare) & (yy[i] >= kNullSquare);
      t[i] = turn ? (gap < 0 ? -tangent : tangent) : 0;
      needed += turn;
    }
    for (int i = 0; i < kLanes; ++i) {
      const double secant = __builtin_sqrt(1 + t[i] * t[i]);
      round.s[p + i] = t[i] / secant;
      round.h[p + i] = t[i] / (1 + secant);
      xx[i] -= t[i] * xy[i];
      yy[i] += t[i] * xy[i];
    }
  }
  return needed;
}

// X: n rows, and room for one more if n is odd; G: n rows that rotate with those of X; widths are multiples
// of the vector length. Pairs count as orthogonal if the cosine of their angle is below `tolerance`. Returns
// whether it converged, the rows by descending norm in order, and their squared norms in square.
inline bool jacobi(double* X, int64_t width, int64_t n, double* G, int64_t width_of_G, double tolerance,
                   double* square, int64_t* order, Workspace& workspace) {
  Scratch scratch(workspace);
  Round round(n, scratch);
  if (n % 2 == 1) fill(X + n * width, width, 0.0);
  for (int64_t j = 0; j < n; ++j) order[j] = j;
  bool converged = false;
  for (int sweep = 0; sweep <= kMaxSweeps; ++sweep) {
    for (int64_t j = 0; j < n; ++j) square[j] = dot(X + j * width, X + j * width, width);
    // large rows first: graded spectra then take few sweeps
    sort_descending(square, n, order);
    if (converged || sweep == kMaxSweeps) break;
    converged = true;
    round.seat(order, square, n);
    for (int64_t k = 1; k < 2 * round.pairs; ++k, round.move()) {
      find_products(round, X, width);
      if (find_rotations(round, tolerance) == 0) continue;
      converged = false;
      for (int64_t i = 0; i < round.pairs; ++i) {
        const double s = round.s[i], h = round.h[i];
        if (s == 0) continue;
        const int64_t x = round.top[i], y = round.bottom[i];
        rotate(width, s, h, X + x * width, X + y * width);
        rotate(width_of_G, s, h, G + x * width_of_G, G + y * width_of_G);
      }
    }
  }
  return converged;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
