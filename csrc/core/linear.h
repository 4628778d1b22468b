// A factorized linear layer, W = U S Vᵀ, as the kernels take it: row-major and contiguous.
#pragma once

#include <cstdint>

namespace condlr {

template <class T>
struct Linear {
  int64_t rows, m, n, r;
  const T *U, *S, *V;  // [m, r], [r, r], [n, r]
};

template <class T>
struct LinearGradients {
  T *dX, *dU, *dS, *dV, *db;  // null where not asked for
};

}  // namespace condlr
