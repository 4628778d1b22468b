// The band [lo, hi] of singular values with hi / lo <= 1 + tau.
#pragma once

#include "info.h"
#include "vec.h"

namespace condlr {
namespace CONDLR_ISA {

struct Edges {
  double lo, hi;
};

// The root a of Σ_{σ<a} (a - σ) = c Σ_{σ>ca} (σ - c a), sigma descending. The difference of the two sides
// grows with a and is linear between the breakpoints σ_i and σ_i / c, which are visited in ascending order.
inline double optimal_lower_edge(const double* sigma, int64_t k, double c, Scratch& scratch) {
  if (sigma[0] <= c * sigma[k - 1]) return sigma[k - 1];
  double* high_sum = scratch.take<double>(k + 1);  // Σ of the i largest
  high_sum[0] = 0;
  for (int64_t i = 0; i < k; ++i) high_sum[i + 1] = high_sum[i] + sigma[i];
  int64_t low = 0, high = k;  // how many σ lie below a, how many above c a
  double low_sum = 0;
  for (;;) {
    const double next_low = sigma[k - 1 - low];
    const double next_high = sigma[high - 1] / c;
    const double a = next_low < next_high ? next_low : next_high;
    // both sides over c, to avoid c²
    const double weight = static_cast<double>(low) / c + c * static_cast<double>(high);
    const double target = low_sum / c + high_sum[high];
    // the left side reaches the right one at this breakpoint, at the latest where no σ exceeds c a
    const bool last = high == 1 && next_high <= next_low;
    if (last || a * weight >= target) return target / weight;
    if (next_low < next_high) {
      low_sum += next_low;
      ++low;
    } else {
      --high;
    }
  }
}

// sigma descending, k >= 1. A single singular value has kappa 1: only the cap acts on it.
inline Edges band_edges(const double* sigma, int64_t k, double tau, int band, double sigma_max,
                        Scratch& scratch) {
  Edges edges{0, __builtin_inf()};
  if (k > 1 && tau < __builtin_inf()) {
    if (band == kOptimal) {
      edges.lo = optimal_lower_edge(sigma, k, 1 + tau, scratch);
      edges.hi = (1 + tau) * edges.lo;
    } else {
      double sum = 0;
      for (int64_t i = 0; i < k; ++i) sum += band == kMean ? sigma[i] : sigma[i] * sigma[i];
      const double mean = sum / static_cast<double>(k);
      const double s = band == kMean ? mean : __builtin_sqrt(mean);
      edges.lo = 2 * s / (2 + tau);
      edges.hi = (1 + tau) * edges.lo;
    }
  }
  if (edges.hi > sigma_max) {
    edges.lo *= sigma_max / edges.hi;
    edges.hi = sigma_max;
  }
  return edges;
}

}  // namespace CONDLR_ISA
}  // namespace condlr
