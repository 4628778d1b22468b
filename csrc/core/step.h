// One constrained SGD step of one role of a layer (U or V, the core S, the bias), into new memory.
#pragma once

#include "clip.h"
#include "hyper.h"
#include "orthonormalize.h"

namespace condlr {
namespace CONDLR_ISA {

// buffer is not read where hyper.fresh, new_buffer is null without momentum.
template <class T>
struct Update {
  const T* param;
  const T* grad;
  const T* buffer;
  T* new_param;
  T* new_buffer;
};

// d = the direction of torch.optim.SGD, and the new momentum buffer. Returns false for a non-finite gradient.
template <class T>
bool sgd_direction(const Update<T>& u, int64_t size, const Hyper& h, bool decay, T* d) {
  if (!all_finite(u.grad, size)) return false;
  const T sign = h.maximize != 0 ? T(-1) : T(1);
  const T weight_decay = decay ? static_cast<T>(h.weight_decay) : T(0);
  if (weight_decay != 0) {
    for (int64_t i = 0; i < size; ++i) d[i] = sign * u.grad[i] + weight_decay * u.param[i];
  } else {
    for (int64_t i = 0; i < size; ++i) d[i] = sign * u.grad[i];
  }
  if (h.momentum == 0) return true;
  const T mu = static_cast<T>(h.momentum);
  const T gain = static_cast<T>(1 - h.dampening);
  T* B = u.new_buffer;
  if (h.fresh != 0) {
    std::memcpy(B, d, sizeof(T) * static_cast<std::size_t>(size));
  } else {
    for (int64_t i = 0; i < size; ++i) B[i] = mu * u.buffer[i] + gain * d[i];
  }
  if (h.nesterov != 0) {
    for (int64_t i = 0; i < size; ++i) d[i] += mu * B[i];
  } else {
    std::memcpy(d, B, sizeof(T) * static_cast<std::size_t>(size));
  }
  return true;
}

template <class T>
bool finite_result(const Update<T>& u, int64_t size, const Hyper& h) {
  return all_finite(u.new_param, size) && (h.momentum == 0 || all_finite(u.new_buffer, size));
}

// G⁻¹, or false where G is singular to rounding: then Cholesky breaks down or ‖G‖_F ‖G⁻¹‖_F comes out above
// 1e15 √r, while single pivots may look healthy. With kappa(G) = 1e12 it stays below 1e12 (1 + r / 2).
inline bool invert_regular(double* G, int64_t r, double* inverse, Workspace& workspace) {
  const double norm = __builtin_sqrt(dot(G, G, r * r));
  if (!invert_positive(G, r, inverse, workspace)) return false;
  const double inverse_norm = __builtin_sqrt(dot(inverse, inverse, r * r));
  return norm * inverse_norm <= 1e14 * __builtin_sqrt(static_cast<double>(r));
}

// inverse [r, r] = (C Cᵀ)⁻¹, for tau = inf (C Cᵀ + δ² I)⁻¹ with δ = 1e-6 sigma_1. A singular C, which a
// clipped one never is, counts as what it is on the constraint set. Returns false for an all-zero C or one with
// non-finite entries.
template <class T>
bool gram_inverse(View<T> C, int64_t r, const Hyper& constraint, T* inverse, Workspace& workspace) {
  Scratch scratch(workspace);
  double* core = scratch.take<double>(r * r);
  double* gram = scratch.take<double>(r * r);
  double* result = scratch.take<double>(r * r);
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) core[i * r + j] = static_cast<double>(C.data[i * C.row + j * C.col]);
  }
  if (!all_finite(core, r * r)) return false;
  const View<double> c = row_major<double>(core, r);
  gemm<double>(r, r, r, 1, c, c.transpose(), nullptr, gram, workspace);
  if (constraint.tau == __builtin_inf()) {
    Svd svd = take_svd(r, r, scratch);
    if (!svd_columns(core, r, r, svd, workspace)) return false;
    const double delta = 1e-6 * svd.sigma[0] * svd.scaling.up;
    for (int64_t i = 0; i < r; ++i) gram[i * r + i] += delta * delta;
    if (!invert_positive(gram, r, result, workspace)) return false;
  } else if (!invert_regular(gram, r, result, workspace)) {
    const int info = clip_spectrum(core, r, r, constraint.tau, static_cast<int>(constraint.band),
                                   constraint.sigma_max, core, workspace);
    if (info != kOk) return false;
    gemm<double>(r, r, r, 1, c, c.transpose(), nullptr, gram, workspace);
    if (!invert_positive(gram, r, result, workspace)) return false;
  }
  for (int64_t i = 0; i < r * r; ++i) inverse[i] = static_cast<T>(result[i]);
  return true;
}

// X [m, r] is U (core = S) or V (core = Sᵀ): X <- qf(X - lr (I - X Xᵀ) d (core coreᵀ)⁻¹). constraint is the
// row of S.
template <class T>
bool step_factor(const Update<T>& u, int64_t m, int64_t r, const T* S, bool transposed,
                 const Hyper& constraint, const Hyper& h, Workspace& workspace) {
  Scratch scratch(workspace);
  T* d = scratch.take<T>(m * r);
  T* trial = scratch.take<T>(m * r);
  T* overlap = scratch.take<T>(r * r);
  T* inverse = scratch.take<T>(r * r);
  if (!sgd_direction(u, m * r, h, /*decay=*/false, d)) return false;
  const View<T> core = row_major(S, r), X = row_major(u.param, r);
  if (!gram_inverse(transposed ? core.transpose() : core, r, constraint, inverse, workspace)) return false;
  gemm<T>(r, r, m, 1, X.transpose(), row_major<T>(d, r), nullptr, overlap, workspace);
  gemm<T>(m, r, r, -1, X, row_major<T>(overlap, r), d, d, workspace);
  gemm<T>(m, r, r, static_cast<T>(-h.lr), row_major<T>(d, r), row_major<T>(inverse, r), u.param, trial,
          workspace);
  if (!all_finite(trial, m * r)) return false;
  orthonormalize(trial, m, r, u.new_param, workspace);
  return finite_result(u, m * r, h);
}

// S <- clip_spectrum(S - lr d)
template <class T>
bool step_core(const Update<T>& u, int64_t r, const Hyper& h, Workspace& workspace) {
  Scratch scratch(workspace);
  T* d = scratch.take<T>(r * r);
  if (!sgd_direction(u, r * r, h, /*decay=*/true, d)) return false;
  const T lr = static_cast<T>(h.lr);
  for (int64_t i = 0; i < r * r; ++i) d[i] = u.param[i] - lr * d[i];
  const int info =
      clip_spectrum(d, r, r, h.tau, static_cast<int>(h.band), h.sigma_max, u.new_param, workspace);
  return info == kOk && finite_result(u, r * r, h);
}

// b <- b - lr d
template <class T>
bool step_bias(const Update<T>& u, int64_t size, const Hyper& h, Workspace& workspace) {
  Scratch scratch(workspace);
  T* d = scratch.take<T>(size);
  if (!sgd_direction(u, size, h, /*decay=*/true, d)) return false;
  const T lr = static_cast<T>(h.lr);
  for (int64_t i = 0; i < size; ++i) u.new_param[i] = u.param[i] - lr * d[i];
  return finite_result(u, size, h);
}

}  // namespace CONDLR_ISA
}  // namespace condlr
