// A factorized linear layer, W = U S Vᵀ, as the kernels take it: row-major and contiguous.
#pragma once

#include <cstdint>

namespace condlr {

template <class T>
struct Linear {
  int64_t rows, m, n, r;
  const T *U, *S, *V;  // [m, r], [r, r], [n, r]
  const T* US;         // U S [m, r], which saves work where there are more rows than m; null for fewer

  bool is_folded() const { return rows > m; }
};

// What a backward needs in between. Folded: dC = Gᵀ P [m, r], the gradient of U S, and QS = G U S. Otherwise
// Q = G U, QS = Q S and PS = P Sᵀ.
template <class T>
struct LinearProducts {
  T *Q, *QS, *PS, *dC;  // [rows, r], [rows, r], [rows, r], [m, r]; null where not needed
};

// One of several equal parts of some rows. Parts of fewer than 32 rows are not made: the first takes them all.
struct Share {
  int64_t index, count;
};

template <class T>
struct LinearGradients {
  T *dX, *dU, *dS, *dV, *db;  // null where not asked for
};

}  // namespace condlr
