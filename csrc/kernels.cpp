// The core compiled for one instruction set: built once per level, each in its own namespace CONDLR_ISA.
#include "kernels.h"

#include "core/eigen.h"
#include "core/layer.h"
#include "core/qr.h"
#include "core/step.h"
#include "core/svd.h"

namespace condlr {
namespace CONDLR_ISA {

extern const KernelSet kernels;
template <class T>
constexpr Kernels<T> kernels_of = {
    svd<T>,
    qr<T>,
    polar<T>,
    clip_spectrum<T>,
    eigh<T>,
    prepare<T>,
    apply<T>,
    linear_fold<T>,
    linear_forward<T>,
    linear_backward_rows<T>,
    linear_backward_sums<T>,
    linear_backward_core<T>,
};
const KernelSet kernels = {kernels_of<float>, kernels_of<double>};

}  // namespace CONDLR_ISA
}  // namespace condlr
