// One constrained SGD step of one role of a layer (U, V, the core S or the bias) in two parts: prepare() does
// everything that may fail and keeps what apply() needs to write the parameter and its momentum buffer.
#pragma once

#include "clip.h"
#include "orthonormalize.h"
#include "update.h"

namespace condlr {
namespace CONDLR_ISA {

// ---------------------------------------------------------------------------------------- SGD's direction

// The direction of torch.optim.SGD: d = from_grad g + from_buffer B with g = sign grad + decay param and the
// new buffer B = keep buffer + gain g.
template <class T>
struct Direction {
  T sign, decay, keep, gain, from_grad, from_buffer;
  const T* param;
  const T* grad;
  const T* buffer;

  // Without momentum, or when the buffer starts, B = g and the old buffer is not read.
  Direction(const Hyper& h, bool decays, const T* param_, const T* grad_, const T* buffer_)
      : sign(h.maximize != 0 ? T(-1) : T(1)),
        decay(decays ? static_cast<T>(h.weight_decay) : T(0)),
        param(decay != 0 ? param_ : grad_),
        grad(grad_) {
    const bool reads = h.momentum != 0 && h.fresh == 0;
    keep = reads ? static_cast<T>(h.momentum) : T(0);
    gain = reads ? static_cast<T>(1 - h.dampening) : T(1);
    buffer = reads ? buffer_ : grad_;
    const bool looks_ahead = h.momentum != 0 && h.nesterov != 0;
    from_grad = looks_ahead ? T(1) : T(0);
    from_buffer = looks_ahead ? static_cast<T>(h.momentum) : T(1);
  }

  // d = the direction's entries [begin, begin + size); B is written to new_buffer unless that is null.
  void run(int64_t begin, int64_t size, T* __restrict d, T* new_buffer) const {
    const T *p = param + begin, *g = grad + begin, *b = buffer + begin;
    if (new_buffer == nullptr) {
      for (int64_t i = 0; i < size; ++i) {
        const T step = sign * g[i] + decay * p[i];
        d[i] = from_grad * step + from_buffer * (keep * b[i] + gain * step);
      }
    } else {
      T* out = new_buffer + begin;
      CONDLR_INDEPENDENT  // out is b itself or far from it
      for (int64_t i = 0; i < size; ++i) {
        const T step = sign * g[i] + decay * p[i];
        const T sum = keep * b[i] + gain * step;
        out[i] = sum;
        d[i] = from_grad * step + from_buffer * sum;
      }
    }
  }
};

// ------------------------------------------------------------------------------------------ preconditioner

// inverse [r, r] = (C Cᵀ)⁻¹ in precision T. Returns false if ‖C Cᵀ‖_F ‖(C Cᵀ)⁻¹‖_F, which is r at
// kappa(C) = 1, exceeds the limit.
template <class T>
bool invert_gram(View<T> C, int64_t r, double limit, T* inverse, Workspace& workspace) {
  Scratch scratch(workspace);
  T* gram = scratch.take<T>(r * r);
  gemm<T>(r, r, r, 1, C, C.transpose(), false, gram, r, workspace, 0);
  mirror(gram, r, r);
  const double norm2 = static_cast<double>(sum_of_squares(gram, r * r));
  return invert_positive(gram, r, inverse, workspace) &&
         norm2 * static_cast<double>(sum_of_squares(inverse, r * r)) <= limit * limit;
}

// inverse [r, r] = (C Cᵀ)⁻¹, for tau = inf (C Cᵀ + δ² I)⁻¹ with δ = 1e-6 sigma_1. A singular C, which a
// clipped one never is, is clipped first. Returns false if C is all zero or not finite.
template <class T>
bool gram_inverse(View<T> C, int64_t r, const Hyper& constraint, T* inverse, Workspace& workspace) {
  const bool bounded = constraint.tau < __builtin_inf();
  // the rounding error is that of T times kappa², here at most a few
  if (bounded && invert_gram(C, r, 16 * static_cast<double>(r), inverse, workspace)) return true;
  Scratch scratch(workspace);
  double* core = scratch.take<double>(r * r);
  double* result = scratch.take<double>(r * r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) core[i * r + j] = static_cast<double>(C.data[i * C.row + j * C.col]);
  }
  if (!all_finite(core, r * r)) return false;
  const View<double> c = row_major<double>(core, r);
  // singular to rounding: Cholesky breaks down or the product of norms comes out above 1e15 √r, while single
  // pivots may look healthy. With kappa(C Cᵀ) = 1e12 it stays below 1e12 (1 + r / 2).
  const double regular = 1e14 * __builtin_sqrt(static_cast<double>(r));
  if (!bounded) {
    double* gram = scratch.take<double>(r * r);
    gemm<double>(r, r, r, 1, c, c.transpose(), nullptr, gram, workspace);
    Svd svd = take_svd(r, r, scratch);
    if (!svd_columns(core, r, r, svd, workspace)) return false;
    const double delta = 1e-6 * svd.sigma[0] * svd.scaling.up;
    for (int64_t i = 0; i < r; ++i) gram[i * r + i] += delta * delta;
    if (!invert_positive(gram, r, result, workspace)) return false;
  } else if (!invert_gram(c, r, regular, result, workspace)) {
    const int info = clip_spectrum(core, r, r, constraint.tau, static_cast<int>(constraint.band),
                                   constraint.sigma_max, core, workspace);
    if (info != kOk || !invert_gram(c, r, __builtin_inf(), result, workspace)) return false;
  }
  for (int64_t i = 0; i < r * r; ++i) inverse[i] = static_cast<T>(result[i]);
  return true;
}

// ------------------------------------------------------------------------------------------- U and V

// The rows [X d] of a factor X [m, r] and its direction, in blocks that fit the cache; the stride keeps rows
// off the same cache sets.
template <class T>
struct Rows {
  int64_t m, r, stride, block;
  T* data;  // [block, stride]
  T* flat;  // d, contiguous

  Rows(int64_t m_, int64_t r_, Scratch& scratch) : m(m_), r(r_) {
    constexpr int64_t kBytes = 1 << 18;
    stride = (vectors_of<T>(2 * r) | 1) * Vec<T>::kLanes;
    block = kBytes / (stride * static_cast<int64_t>(sizeof(T)));
    block = block < 32 ? 32 : block > 256 ? 256 : block;
    block = block < m ? block : m;
    data = scratch.take<T>(block * stride);
    flat = scratch.take<T>(block * r);
  }

  // Calls work(first row, rows) for every block, with [X d] of these rows in data.
  template <class Work>
  bool each(const T* X, const Direction<T>& direction, T* new_buffer, const Work& work) const {
    for (int64_t begin = 0; begin < m; begin += block) {
      const int64_t rows = m - begin < block ? m - begin : block;
      direction.run(begin * r, rows * r, flat, new_buffer);
      interleave(X + begin * r, rows, data);
      interleave(flat, rows, data + r);
      if (!work(begin, rows)) return false;
    }
    return true;
  }

 private:
  void interleave(const T* from, int64_t rows, T* to) const {
    using V = Vec<T>;
    const int64_t rest = r % V::kLanes, whole = r - rest;
    for (int64_t i = 0; i < rows; ++i, from += r, to += stride) {
      for (int64_t j = 0; j < whole; j += V::kLanes) V::store(to + j, V::load(from + j));
      if (rest > 0) V::store(to + whole, V::load(from + whole, rest), rest);
    }
  }
};

// Products of two such F with squares of d that are flushed to zero are below rounding.
template <class T>
constexpr T kLargestFactor = sizeof(T) == 4 ? T(0x1p40) : T(0x1p400);

// E = [E1 E2] [r, 2 r] with X_new = [X d] Eᵀ = X E1ᵀ + d E2ᵀ = qf(X - D F) for the tangent D = d - X O,
// O = Xᵀ d, and F as in find_transform. gram: [X d]ᵀ [X d], lower half, rows `stride` apart; overwritten.
// With Δ = Xᵀ X - I, N = O F, M = dᵀ d - Oᵀ O:
// G = Yᵀ Y = I + Δ + Δ N + Nᵀ (Δ + Δ N) + F M F = L Lᵀ, E1 = L⁻¹ (I + Nᵀ), E2 = -L⁻¹ F.
// Returns false for a long step, for which G from these products has lost digits.
template <class T>
bool short_step(T* gram, int64_t stride, int64_t r, const T* F, T* E, Workspace& workspace) {
  Scratch scratch(workspace);
  T *A = gram, *Ot = gram + r * stride, *M = Ot + r;
  T row_sum = 0, longest = 0, overlap = 0, drift2 = 0;  // ‖F‖_∞, max_j ‖d_j‖², ‖O‖_F², ‖Δ‖_F²
  for (int64_t i = 0; i < r; ++i) {
    const T sum = sum_of_magnitudes(F + i * r, r);
    row_sum = sum > row_sum ? sum : row_sum;
    longest = M[i * (stride + 1)] > longest ? M[i * (stride + 1)] : longest;
    overlap += sum_of_squares(Ot + i * stride, r);
    const T off = A[i * (stride + 1)] - 1;
    drift2 += off * off + 2 * sum_of_squares(A + i * stride, i);
  }
  // no column of d F is longer than this, unless squares of d underflow, which a large F would bring back
  if (!(row_sum <= kLargestFactor<T> && row_sum * __builtin_sqrt(longest) <= 1)) return false;

  T* work = scratch.take<T>(r * r);
  T* G = scratch.take<T>(r * r);
  const View<T> f = row_major<T>(F, r), ot = row_major<T>(Ot, stride);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j <= i; ++j) G[i * r + j] = A[i * stride + j];
  }
  // otherwise Δ N is at the level of rounding and dies out over the next steps
  const T N_norm = row_sum * __builtin_sqrt(overlap);
  if (N_norm > T(0.25) || N_norm * __builtin_sqrt(drift2) > kEps<T> * static_cast<T>(r) / 2) {
    T* N = scratch.take<T>(r * r);
    T* drift = scratch.take<T>(r * r);
    for (int64_t i = 0; i < r; ++i) A[i * (stride + 1)] -= 1;
    mirror(A, r, stride);
    gemm<T>(r, r, r, 1, ot.transpose(), f, false, N, r, workspace);
    gemm<T>(r, r, r, 1, {A, stride, 1}, row_major<T>(N, r), false, drift, r, workspace);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < r; ++j) {
        work[i * r + j] = A[i * stride + j] + drift[i * r + j];
        if (j <= i) G[i * r + j] += drift[i * r + j];
      }
    }
    gemm<T>(r, r, r, 1, row_major<T>(N, r).transpose(), row_major<T>(work, r), true, G, r, workspace, 0);
  }
  gemm<T>(r, r, r, -1, ot, ot.transpose(), true, M, stride, workspace, 0);
  mirror(M, r, stride);
  gemm<T>(r, r, r, 1, {M, stride, 1}, f, false, work, r, workspace);
  gemm<T>(r, r, r, 1, f, row_major<T>(work, r), true, G, r, workspace, 0);
  T *E1 = E, *E2 = E + r;
  if (!inverse_cholesky(G, r, E1, 2 * r, workspace)) return false;
  gemm<T>(r, r, r, -1, {E1, 2 * r, 1}, f, false, E2, 2 * r, workspace);
  gemm<T>(r, r, r, -1, {E2, 2 * r, 1}, ot, true, E1, 2 * r, workspace);
  return true;
}

enum class Found { kNothing, kStill, kStep, kTrial, kNotOrthonormal };

// Entries of Xᵀ X - I above this mean that X was written from outside: reference.ORTHONORMAL_INPUT.
constexpr double kOrthonormalInput = 1e-4;

// Up to here X is orthonormal to the rounding of steps, so that one that moves nothing leaves it as it is.
template <class T>
constexpr double kOrthonormalStep = sizeof(T) == 4 ? 2e-6 : 1e-12;

// The transform Eᵀ of one factor, with F = lr (core coreᵀ)⁻¹ or, without a preconditioner, lr I. Returns
// kStep with E as in short_step; kTrial with E1 = I + Nᵀ, E2 = -F, which makes the trial point; kStill if
// nothing moves; kNotOrthonormal if X is not; kNothing if X or the gradient is not finite or the preconditioner
// needs a zero core.
template <class T>
Found find_transform(const T* X, const Direction<T>& direction, int64_t m, int64_t r, View<T> core,
                     const Hyper& constraint, const Hyper& own, const Panels<T>& panels,
                     Workspace& workspace) {
  Scratch scratch(workspace);
  const int64_t stride = vectors_of<T>(2 * r) * Vec<T>::kLanes;
  T* gram = scratch.take<T>(2 * r * stride);
  double* total = scratch.take<double>(2 * r * stride);
  fill(total, 2 * r * stride, 0.0);
  T* F = scratch.take<T>(r * r);
  T* E = scratch.take<T>(2 * r * r);
  const Rows<T> rows(m, r, scratch);
  bool moves = false;
  const bool finite = rows.each(X, direction, nullptr, [&](int64_t, int64_t count) {
    if (!all_finite(rows.flat, count * r)) return false;
    for (int64_t i = 0; !moves && i < count * r; ++i) moves = rows.flat[i] != 0;
    for (int64_t at = 0; at < count; at += kShortSum) {
      const T* data = rows.data + at * rows.stride;
      const int64_t few = count - at < kShortSum ? count - at : kShortSum;
      product<T>(2 * r, 2 * r, few, 1, {data, 1, rows.stride}, data, rows.stride, false, gram, stride, 0);
      for (int64_t i = 0; i < 2 * r; ++i) {
        for (int64_t j = 0; j <= i; ++j) total[i * stride + j] += static_cast<double>(gram[i * stride + j]);
      }
    }
    return true;
  });
  if (!finite) return Found::kNothing;
  for (int64_t i = 0; i < 2 * r; ++i) {
    for (int64_t j = 0; j <= i; ++j) gram[i * stride + j] = static_cast<T>(total[i * stride + j]);
  }
  T off = 0;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      const T e = __builtin_fabs(gram[i * stride + j] - (i == j ? 1 : 0));
      off = e > off || e != e ? e : off;
    }
  }
  if (!(off <= T(kOrthonormalInput))) return all_finite(X, m * r) ? Found::kNotOrthonormal : Found::kNothing;
  if ((!moves || own.lr == 0) && off <= T(kOrthonormalStep<T>)) return Found::kStill;
  if (own.precondition != 0) {
    if (!gram_inverse(core, r, constraint, F, workspace)) return Found::kNothing;
  } else {
    fill(F, r * r, T(0));
    for (int64_t i = 0; i < r; ++i) F[i * (r + 1)] = 1;
  }
  const T lr = static_cast<T>(own.lr);
  for (int64_t i = 0; i < r * r; ++i) F[i] *= lr;
  const bool is_short = short_step(gram, stride, r, F, E, workspace);
  if (!is_short) {
    fill(E, 2 * r * r, T(0));
    for (int64_t i = 0; i < r; ++i) {
      E[i * (2 * r + 1)] = 1;
      for (int64_t j = 0; j < r; ++j) E[i * 2 * r + r + j] = -F[i * r + j];
    }
    gemm<T>(r, r, r, 1, row_major<T>(F, r), {gram + r * stride, stride, 1}, true, E, 2 * r, workspace);
  }
  pack_panels({E, 1, 2 * r}, panels);
  return is_short ? Found::kStep : Found::kTrial;
}

// out = [X d] Eᵀ
template <class T>
void transform_rows(const T* X, const Direction<T>& direction, int64_t m, int64_t r,
                    const Panels<T>& transform, T* new_buffer, T* out, Workspace& workspace) {
  Scratch scratch(workspace);
  const Rows<T> rows(m, r, scratch);
  rows.each(X, direction, new_buffer, [&](int64_t begin, int64_t count) {
    product<T>(count, T(1), {rows.data, rows.stride, 1}, transform, false, out + begin * r, r);
    return true;
  });
}

// ------------------------------------------------------------------------------------ the two parts, by role

template <class T>
T* keep(int64_t size, Workspace& workspace) {
  return static_cast<T*>(workspace.take(sizeof(T) * static_cast<std::size_t>(size)));
}

template <class T>
Direction<T> direction_of(const Update& u) {
  const bool decays = u.role == kS || u.role == kBias;  // a tangent step would cancel the decay of U and V
  return {u.hyper[u.role], decays, static_cast<const T*>(u.param), static_cast<const T*>(u.grad),
          static_cast<const T*>(u.buffer)};
}

template <class T>
Panels<T> transform_of(const Update& u) {
  return {static_cast<T*>(u.transform), 2 * u.rank, u.rank};
}

// X [m, r] is U (core = S) or V (core = Sᵀ): X <- qf(X - lr (I - X Xᵀ) d (core coreᵀ)⁻¹), without the inverse
// if precondition is 0.
template <class T>
StepOutcome prepare_factor(Update& u, Workspace& workspace) {
  const int64_t m = u.rows, r = u.rank;
  const T* X = static_cast<const T*>(u.param);
  const View<T> S = row_major(static_cast<const T*>(u.S), r);
  const Direction<T> direction = direction_of<T>(u);
  u.transform = keep<T>(Panels<T>::size(2 * r, r), workspace);
  const Found found =
      find_transform(X, direction, m, r, u.role == kU ? S : S.transpose(), u.hyper[kS],
                     u.hyper[u.role], transform_of<T>(u), workspace);
  if (found == Found::kNotOrthonormal) return kNotOrthonormal;
  if (found == Found::kNothing) return kSkip;
  if (found == Found::kStep) return kReady;
  T* result = keep<T>(m * r, workspace);
  u.result = result;
  if (found == Found::kStill) {
    std::memcpy(result, X, sizeof(T) * static_cast<std::size_t>(m * r));
    return kReady;
  }
  Scratch scratch(workspace);
  T* trial = scratch.take<T>(m * r);
  transform_rows(X, direction, m, r, transform_of<T>(u), static_cast<T*>(nullptr), trial, workspace);
  if (!all_finite(trial, m * r)) return kSkip;
  orthonormalize(trial, m, r, result, workspace);
  return all_finite(result, m * r) ? kReady : kSkip;
}

// Whether a core meets the bound and the cap to rounding, as reference.meets_bound.
template <class T>
bool meets_bound(const T* S, int64_t r, const Hyper& h, Workspace& workspace) {
  Scratch scratch(workspace);
  Svd svd = take_svd(r, r, scratch);
  if (!svd_columns(S, r, r, svd, workspace)) return false;
  const double largest = svd.sigma[0], smallest = svd.sigma[r - 1], bound = (1 + h.tau) * (1 + 5e-6);
  const bool bounded = bound == __builtin_inf() ? largest > 0 : smallest > 0 && largest <= bound * smallest;
  return bounded && largest * svd.scaling.up <= h.sigma_max * (1 + 2e-6);
}

// S <- clip_spectrum(S - lr d), b <- b - lr d
template <class T>
StepOutcome prepare_entries(Update& u, Workspace& workspace) {
  const int64_t r = u.rank, size = u.role == kS ? r * r : u.rows;
  const T* param = static_cast<const T*>(u.param);
  const Hyper& h = u.hyper[u.role];
  T* result = keep<T>(size, workspace);
  u.result = result;
  direction_of<T>(u).run(0, size, result, nullptr);
  const T lr = static_cast<T>(h.lr);
  int bad = 0, moved = 0;
  for (int64_t i = 0; i < size; ++i) {
    bad |= !(result[i] - result[i] == 0);
    result[i] = param[i] - lr * result[i];
    moved |= result[i] != param[i];
  }
  if (bad != 0) return kSkip;
  // the bands "rms" and "mean" shrink a core a little, but a step that moves nothing is the identity
  if (u.role != kS || (moved == 0 && meets_bound(result, r, h, workspace)))
    return all_finite(result, size) ? kReady : kSkip;
  const int info = clip_spectrum(result, r, r, h.tau, static_cast<int>(h.band), h.sigma_max, result, workspace);
  return info == kOk && all_finite(result, size) ? kReady : kSkip;
}

template <class T>
StepOutcome prepare(Update& u, Workspace& workspace) {
  u.result = u.transform = nullptr;
  return u.role == kU || u.role == kV ? prepare_factor<T>(u, workspace) : prepare_entries<T>(u, workspace);
}

template <class T>
void apply(const Update& u, Workspace& workspace) {
  const Direction<T> direction = direction_of<T>(u);
  T* param = static_cast<T*>(u.param);
  T* buffer = u.hyper[u.role].momentum != 0 ? static_cast<T*>(u.buffer) : nullptr;
  const int64_t size = u.role == kS ? u.rank * u.rank : u.role == kBias ? u.rows : u.rows * u.rank;
  if (u.result == nullptr) {
    transform_rows(param, direction, u.rows, u.rank, transform_of<T>(u), buffer, param, workspace);
    return;
  }
  if (buffer != nullptr) {
    constexpr int64_t kBlock = 4096;
    Scratch scratch(workspace);
    T* d = scratch.take<T>(kBlock);
    for (int64_t i = 0; i < size; i += kBlock)
      direction.run(i, size - i < kBlock ? size - i : kBlock, d, buffer);
  }
  std::memcpy(param, u.result, sizeof(T) * static_cast<std::size_t>(size));
}

}  // namespace CONDLR_ISA
}  // namespace condlr
