// Spectral clip by the correction form A + Σ_{i out of band} (f_i - sigma_i) u_i v_iᵀ or, where the band lies
// so far below sigma_1 that it cancels, by U diag(f) Vᵀ.
#pragma once

#include "band.h"
#include "eigen.h"
#include "svd.h"

namespace condlr {
namespace CONDLR_ISA {

// The largest relative error of storing one entry: half a unit in the last place.
template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

// Singular values computed in W are known to a few rounding errors of the largest one: those closer to an
// edge count as in the band. In float32 the slack is too small for the bound on kappa to notice.
template <class W>
constexpr double kSlack = sizeof(W) == 4 ? 0x1p-23 : 0x1p-49;

// A Gram matrix squares the condition number; above this one an SVD in double takes over.
constexpr double kWellConditioned = 3;

// The correction form is off by a few rounding errors of sigma_1: too much for a band whose upper edge is below
// this share of sigma_1.
constexpr double kCancels = 0.75;

struct Constraint {
  double tau;
  int band;
  double sigma_max;
};

// The band, and the singular values, descending, that are outside of it: [0, above) and [below, k).
struct Clip {
  Edges edges;
  int64_t above, below;
};

// sigma was computed in W, the result is stored in T.
template <class T, class W>
Clip plan_clip(const double* sigma, int64_t k, const Constraint& constraint, Scratch& scratch) {
  Clip clip{band_edges(sigma, k, constraint.tau, constraint.band, constraint.sigma_max, scratch), 0, k};
  Edges& edges = clip.edges;
  const double slack = kSlack<W> * sigma[0];
  if (sigma[0] <= edges.hi + slack && sigma[k - 1] >= edges.lo - slack) return clip;

  // Storing the result moves each singular value by at most `stored`. Where kappa would feel that (a lower
  // edge far below the upper one), the lower edge rises by as much.
  double norm2 = 0;
  for (int64_t i = 0; i < k; ++i) {
    const double s = sigma[i] < edges.lo ? edges.lo : sigma[i] > edges.hi ? edges.hi : sigma[i];
    norm2 += s * s;
  }
  const double stored = kRounding<T> * __builtin_sqrt(norm2);
  if (edges.lo > 0 && stored > 2e-6 * edges.lo) {
    edges.lo += stored;
    edges.lo = edges.lo < edges.hi ? edges.lo : edges.hi;
  }
  while (clip.above < k && sigma[clip.above] > edges.hi) ++clip.above;
  while (clip.below > clip.above && sigma[clip.below - 1] < edges.lo) --clip.below;
  return clip;
}

// The out-of-band singular values i of B [m, n] move into the band; the rows of Q are their unit singular
// vectors, right ones (length n) or left ones. Returns false where Q shows that sigma is not to be trusted.
template <class T>
bool correct(T* B, int64_t m, int64_t n, const T* Q, bool right, const double* sigma, int64_t k,
             const Clip& clip, Workspace& workspace) {
  Scratch scratch(workspace);
  const int64_t count = clip.above + k - clip.below;
  const int64_t width = right ? n : m, other = right ? m : n;
  T* images = scratch.take<T>(count * other);  // B q or Bᵀ q
  const View<T> b = row_major<T>(B, n), q = row_major(Q, width), image = row_major<T>(images, other);
  gemm<T>(count, other, width, 1, q, right ? b.transpose() : b, nullptr, images, workspace);
  for (int64_t i = 0; i < count; ++i) {
    T* row = images + i * other;
    const double square = dot(Q + i * width, Q + i * width, width);  // 1 but for rounding
    const double rayleigh = dot(row, row, other) / square;
    const double expected = sigma[i < clip.above ? i : k - count + i];
    const double error = __builtin_fabs(rayleigh - expected * expected);
    if (!(error <= 256 * kRounding<T> * sigma[0] * sigma[0])) return false;
    const double target = i < clip.above ? clip.edges.hi : clip.edges.lo;
    scale(other, static_cast<T>((target / __builtin_sqrt(rayleigh) - 1) / square), row);
  }
  gemm<T>(m, n, count, 1, (right ? image : q).transpose(), right ? q : image, B, B, workspace);
  return true;
}

enum Outcome { kInBand, kClipped, kIllConditioned };

// In the arithmetic of T, which serves condition numbers below kWellConditioned.
template <class T>
Outcome clip_well_conditioned(T* B, int64_t m, int64_t n, const Constraint& constraint,
                              Workspace& workspace) {
  Scratch scratch(workspace);
  const bool tall = m > n;
  const int64_t k = tall ? n : m, l = tall ? m : n;
  const View<T> b = row_major<T>(B, n), wide = tall ? b.transpose() : b;
  T* gram = scratch.take<T>(k * k);
  T* lambda = scratch.take<T>(k);
  double* sigma = scratch.take<double>(k);
  gemm<T>(k, k, l, 1, wide, wide.transpose(), false, gram, k, workspace, 0);
  Eigen<T> eigen = take_eigen<T>(k, scratch);
  if (!eigenvalues(gram, eigen, lambda, workspace)) return kIllConditioned;
  if (!(lambda[k - 1] > 0 && lambda[0] <= kWellConditioned * kWellConditioned * lambda[k - 1]))
    return kIllConditioned;
  for (int64_t i = 0; i < k; ++i) sigma[i] = __builtin_sqrt(static_cast<double>(lambda[i]));
  const Clip clip = plan_clip<T, T>(sigma, k, constraint, scratch);
  const int64_t above = clip.above, below = k - clip.below;
  if (above + below == 0) return kInBand;
  if (clip.edges.hi < kCancels * sigma[0]) return kIllConditioned;
  T* Q = scratch.take<T>((above + below) * k);
  eigenvectors(eigen, above, below, Q, workspace);
  return correct(B, m, n, Q, /*right=*/tall, sigma, k, clip, workspace) ? kClipped : kIllConditioned;
}

// For any spectrum, by an SVD in double.
template <class T>
int clip_ill_conditioned(const T* A, int64_t m, int64_t n, const Constraint& constraint, T* out,
                         Workspace& workspace) {
  const int64_t k = m < n ? m : n;
  Scratch scratch(workspace);
  Svd svd = take_svd(m, n, scratch);
  if (!svd_columns(A, m, n, svd, workspace)) return kNotConverged;
  double* sigma = svd.sigma;
  if (sigma[0] == 0) return kAllZero;
  const Constraint scaled{constraint.tau, constraint.band, constraint.sigma_max * svd.scaling.down};
  const Clip clip = plan_clip<T, double>(sigma, k, scaled, scratch);
  if (clip.above == 0 && clip.below == k) return kOk;
  const bool rebuild = clip.edges.hi < kCancels * sigma[0];
  for (int64_t i = 0; i < k; ++i) {
    const double f = i < clip.above ? clip.edges.hi : i < clip.below ? sigma[i] : clip.edges.lo;
    scale(n, rebuild ? f : f - sigma[i], svd.V + i * n);
  }
  double* sum = scratch.take<double>(m * n);
  const View<double> U{svd.U, 1, m}, V{svd.V, n, 1};
  if (rebuild) {
    gemm<double>(m, n, k, 1, U, V, nullptr, sum, workspace);
  } else {
    for (int64_t i = 0; i < m * n; ++i) sum[i] = svd.scaling.down * static_cast<double>(A[i]);
    gemm<double>(m, n, clip.above, 1, U, V, sum, sum, workspace);
    gemm<double>(m, n, k - clip.below, 1, U.at(0, clip.below), V.at(clip.below, 0), sum, sum, workspace);
  }
  for (int64_t i = 0; i < m * n; ++i) out[i] = static_cast<T>(svd.scaling.up * sum[i]);
  return kOk;
}

// out [m, n] may be A itself. In-band, all-zero, non-finite and unconverged matrices come back bit for bit.
template <class T>
int clip_spectrum(const T* A, int64_t m, int64_t n, double tau, int band, double sigma_max, T* out,
                  Workspace& workspace) {
  const int64_t size = m * n;
  if (out != A) std::memcpy(out, A, sizeof(T) * static_cast<std::size_t>(size));
  if (size == 0) return kOk;
  if (!all_finite(A, size)) return kNotFinite;
  Scratch scratch(workspace);
  const Scaling scaling = scaling_of(A, size);
  const Constraint scaled{tau, band, sigma_max * scaling.down};
  T* B = scratch.take<T>(size);
  for (int64_t i = 0; i < size; ++i) B[i] = static_cast<T>(scaling.down * static_cast<double>(A[i]));
  switch (clip_well_conditioned(B, m, n, scaled, workspace)) {
    case kInBand:
      return kOk;
    case kIllConditioned:
      return clip_ill_conditioned(A, m, n, {tau, band, sigma_max}, out, workspace);
    case kClipped:
      for (int64_t i = 0; i < size; ++i) out[i] = static_cast<T>(scaling.up * static_cast<double>(B[i]));
      break;
  }
  return kOk;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
