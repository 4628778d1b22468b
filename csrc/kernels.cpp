// The core compiled for one instruction set: built once per level, each in its own namespace CONDLR_ISA.
#include "kernels.h"

#include "core/qr.h"
#include "core/step.h"
#include "core/svd.h"

namespace condlr {
namespace CONDLR_ISA {

template <class T>
static bool step(Role role, const T* param, const T* grad, const T* buffer, T* new_param, T* new_buffer,
                 int64_t rows, int64_t rank, const T* S, const Hyper* hyper, Workspace& workspace) {
  const Update<T> update{param, grad, buffer, new_param, new_buffer};
  switch (role) {
    case kU:
      return step_factor(update, rows, rank, S, /*transposed=*/false, hyper[kS], hyper[role], workspace);
    case kV:
      return step_factor(update, rows, rank, S, /*transposed=*/true, hyper[kS], hyper[role], workspace);
    case kS:
      return step_core(update, rank, hyper[role], workspace);
    default:
      return step_bias(update, rows, hyper[role], workspace);
  }
}

extern const KernelSet kernels;
const KernelSet kernels = {
    {svd<float>, qr<float>, polar<float>, clip_spectrum<float>, step<float>},
    {svd<double>, qr<double>, polar<double>, clip_spectrum<double>, step<double>},
};

}  // namespace CONDLR_ISA
}  // namespace condlr
