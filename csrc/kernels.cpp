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
const KernelSet kernels = {
    {svd<float>, qr<float>, polar<float>, clip_spectrum<float>, eigh<float>, prepare<float>, apply<float>,
     linear_forward<float>, linear_backward<float>},
    {svd<double>, qr<double>, polar<double>, clip_spectrum<double>, eigh<double>, prepare<double>,
     apply<double>, linear_forward<double>, linear_backward<double>},
};

}  // namespace CONDLR_ISA
}  // namespace condlr
