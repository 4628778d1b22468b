// Spectral clip by the correction form A + Σ_{i out of band} (f_i - sigma_i) u_i v_iᵀ.
#pragma once

#include "band.h"
#include "svd.h"

namespace condlr {
namespace CONDLR_ISA {

// Half a unit in the last place, relative to 1: what storing one entry costs at most.
template <class T>
constexpr double kRounding = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

// out [m, n] may be A itself. In-band, all-zero, non-finite and unconverged matrices come back bit for bit.
template <class T>
int clip_spectrum(const T* A, int64_t m, int64_t n, double tau, int band, double sigma_max, T* out,
                  Workspace& workspace) {
  const int64_t k = m < n ? m : n;
  if (out != A) std::memcpy(out, A, sizeof(T) * static_cast<std::size_t>(m * n));
  if (k == 0) return kOk;
  if (!all_finite(A, m * n)) return kNotFinite;

  Scratch scratch(workspace);
  Svd svd = take_svd(m, n, scratch);
  if (!svd_columns(A, m, n, svd, workspace)) return kNotConverged;
  double* sigma = svd.sigma;
  if (sigma[0] == 0) return kAllZero;
  Edges edges = band_edges(sigma, k, tau, band, sigma_max * svd.scaling.down, scratch);

  // the sigma are known to a few rounding errors of the largest one: closer than that to an edge is in band
  const double slack = 16 * kRounding<double> * sigma[0];
  if (sigma[0] <= edges.hi + slack && sigma[k - 1] >= edges.lo - slack) return kOk;

  // Storing the result moves each of its singular values by at most `stored`. Where that would be felt in
  // kappa (a lower edge far below the upper one) the lower edge rises by as much.
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

  int64_t above = 0, below = k;  // [0, above) and [below, k) are out of band
  while (above < k && sigma[above] > edges.hi) ++above;
  while (below > above && sigma[below - 1] < edges.lo) --below;
  for (int64_t i = 0; i < k; ++i) {
    const double target = i < above ? edges.hi : edges.lo;
    if (i < above || i >= below) scale(n, target - sigma[i], svd.V + i * n);
  }
  double* sum = scratch.take<double>(m * n);
  for (int64_t i = 0; i < m * n; ++i) sum[i] = svd.scaling.down * static_cast<double>(A[i]);
  const View<double> U{svd.U, 1, m}, V{svd.V, n, 1};
  gemm<double>(m, n, above, 1, U, V, sum, sum, workspace);
  gemm<double>(m, n, k - below, 1, U.at(0, below), V.at(below, 0), sum, sum, workspace);
  for (int64_t i = 0; i < m * n; ++i) out[i] = static_cast<T>(svd.scaling.up * sum[i]);
  return kOk;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
