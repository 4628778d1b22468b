// The entry points of the core as a table of function pointers, one table per instruction set.
#pragma once

#include <cstdint>

#include "core/info.h"
#include "core/linear.h"
#include "core/update.h"
#include "core/workspace.h"

namespace condlr {

// Matrices are row-major and contiguous. The linear algebra returns an Info, the first part of a step an
// StepOutcome.
template <class T>
struct Kernels {
  int (*svd)(const T* A, int64_t m, int64_t n, T* U, T* sigma, T* V, Workspace&);
  int (*qr)(const T* A, int64_t m, int64_t n, T* Q, T* R, Workspace&);
  int (*polar)(const T* A, int64_t m, int64_t n, T* Q, Workspace&);
  int (*clip_spectrum)(const T* A, int64_t m, int64_t n, double tau, int band, double sigma_max, T* out,
                       Workspace&);
  // false: not finite or not converged, lambda and V mean nothing
  bool (*eigh)(const T* A, int64_t n, int64_t head, int64_t tail, T* lambda, T* V, Workspace&);
  StepOutcome (*prepare)(Update&, Workspace&);
  void (*apply)(const Update&, Workspace&);
  void (*linear_fold)(const Linear<T>&, T* US, Workspace&);
  void (*linear_forward)(const Linear<T>&, const T* X, const T* bias, T* Y, T* P, Share, Workspace&);
  void (*linear_backward_rows)(const Linear<T>&, const T* G, const T* P, const LinearProducts<T>&, T* dX, Share,
                               Workspace&);
  void (*linear_backward_sums)(const Linear<T>&, const T* G, const T* X, const T* P, const LinearProducts<T>&,
                               const LinearGradients<T>&, Share, Workspace&);
  void (*linear_backward_core)(const Linear<T>&, const T* dC, T* dS, Workspace&);
};

struct KernelSet {
  Kernels<float> f32;
  Kernels<double> f64;

  template <class T>
  const Kernels<T>& get() const {
    if constexpr (sizeof(T) == sizeof(float)) {
      return f32;
    } else {
      return f64;
    }
  }
};

namespace baseline {
extern const KernelSet kernels;
}
#ifdef CONDLR_X86_LEVELS
namespace avx2 {
extern const KernelSet kernels;
}
namespace avx512 {
extern const KernelSet kernels;
}
#endif

}  // namespace condlr
