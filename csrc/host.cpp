// _core.so: build information, CPU features and the C++ core on plain arrays, as C functions. It links neither torch
// nor Python; condlr_ext/_native.py and the tests call it through ctypes.
//
// Matrices are row-major, contiguous and aligned, of float or double. `isa` names an instruction set, null stands for
// the default. The functions return null, or an error text that the thread's next error replaces.
#include <algorithm>
#include <cstdint>
#include <exception>
#include <string>

#include "constraint.h"
#include "isa.h"
#include "network_step.h"

#define CONDLR_EXPORT extern "C" __attribute__((visibility("default")))

namespace condlr {
namespace {

const char* keep(std::string text) {
  thread_local std::string kept;
  kept = std::move(text);
  return kept.c_str();
}

template <class Work>
const char* guarded(const Work& work) {
  try {
    work();
    return nullptr;
  } catch (const std::exception& error) {
    return keep(error.what());
  }
}

// Calls work(zero of the type, its kernels, workspace).
template <class Work>
const char* with_kernels(const char* isa, int is_double, const Work& work) {
  return guarded([&] {
    const KernelSet& kernels = *(isa ? isa_level(isa) : default_isa()).kernels;
    Workspace workspace;
    if (is_double) {
      work(double{}, kernels.f64, workspace);
    } else {
      work(float{}, kernels.f32, workspace);
    }
  });
}

std::string level_names(bool supported_only) {
  std::string names;
  for (const IsaLevel& level : isa_levels()) {
    if (level.supported || !supported_only) names += (names.empty() ? "" : " ") + std::string(level.name);
  }
  return names;
}

}  // namespace
}  // namespace condlr

using namespace condlr;

// Lines of a name, a tab and a value; valid for the life of the process.
CONDLR_EXPORT const char* condlr_build_info() {
#if defined(__clang__)
#define CONDLR_COMPILER "clang " __clang_version__
#else
#define CONDLR_COMPILER "gcc " __VERSION__
#endif
  static const std::string text = "compiler\t" CONDLR_COMPILER "\ncxx_standard\t" + std::to_string(__cplusplus) +
                                  "\nbuild_type\t" CONDLR_BUILD_TYPE "\ncxx_flags\t" CONDLR_CXX_FLAGS
                                  "\ntorch_built_against\t" CONDLR_TORCH_VERSION
                                  "\ntorch_target\t" CONDLR_TORCH_TARGET "\nisa_levels\t" +
                                  level_names(/*supported_only=*/false);
  return text.c_str();
}

// The features that the instruction sets ask for: lines of a name, a tab and 0 or 1.
CONDLR_EXPORT const char* condlr_cpu_features() {
  static const std::string text = [] {
    std::string lines;
    for (const auto& [name, present] : cpu_features()) lines += name + (present ? "\t1\n" : "\t0\n");
    return lines;
  }();
  return text.c_str();
}

// The instruction sets that this CPU can run, separated by spaces.
CONDLR_EXPORT const char* condlr_isa_levels() {
  static const std::string text = level_names(/*supported_only=*/true);
  return text.c_str();
}

// The instruction set in use; CONDLR_EXT_ISA lowers it.
CONDLR_EXPORT const char* condlr_isa(const char** name) {
  return guarded([&] { *name = default_isa().name; });
}

CONDLR_EXPORT const char* condlr_svd(const char* isa, int is_double, const void* A, int64_t m, int64_t n, void* U,
                                     void* sigma, void* V, int* info) {
  return with_kernels(isa, is_double, [&](auto zero, const auto& kernels, Workspace& workspace) {
    using T = decltype(zero);
    *info = kernels.svd(static_cast<const T*>(A), m, n, static_cast<T*>(U), static_cast<T*>(sigma),
                        static_cast<T*>(V), workspace);
  });
}

CONDLR_EXPORT const char* condlr_qr(const char* isa, int is_double, const void* A, int64_t m, int64_t n, void* Q,
                                    void* R, int* info) {
  return with_kernels(isa, is_double, [&](auto zero, const auto& kernels, Workspace& workspace) {
    using T = decltype(zero);
    *info =
        kernels.qr(static_cast<const T*>(A), m, n, static_cast<T*>(Q), static_cast<T*>(R), workspace);
  });
}

CONDLR_EXPORT const char* condlr_polar(const char* isa, int is_double, const void* A, int64_t m, int64_t n, void* Q,
                                       int* info) {
  return with_kernels(isa, is_double, [&](auto zero, const auto& kernels, Workspace& workspace) {
    using T = decltype(zero);
    *info = kernels.polar(static_cast<const T*>(A), m, n, static_cast<T*>(Q), workspace);
  });
}

CONDLR_EXPORT const char* condlr_clip_spectrum(const char* isa, int is_double, const void* A, int64_t m, int64_t n,
                                               double tau, int band, double sigma_max, void* out, int* info) {
  const std::string error = constraint_error("clip_spectrum", tau, band, sigma_max);
  if (!error.empty()) return keep(error);
  return with_kernels(isa, is_double, [&](auto zero, const auto& kernels, Workspace& workspace) {
    using T = decltype(zero);
    *info = kernels.clip_spectrum(static_cast<const T*>(A), m, n, tau, band, sigma_max, static_cast<T*>(out),
                                  workspace);
  });
}

// The eigenvalues lambda [n] of a symmetric A [n, n], descending, and the eigenvectors of the first `head` and the last
// `tail` of them as rows of V. The lower half of A is read.
CONDLR_EXPORT const char* condlr_eigh(const char* isa, int is_double, const void* A, int64_t n, int64_t head,
                                      int64_t tail, void* lambda, void* V, int* converged) {
  return with_kernels(isa, is_double, [&](auto zero, const auto& kernels, Workspace& workspace) {
    using T = decltype(zero);
    *converged = kernels.eigh(static_cast<const T*>(A), n, head, tail, static_cast<T*>(lambda),
                              static_cast<T*>(V), workspace);
  });
}

// One constrained SGD step of a layer, in place: arrays by Role, hyper [kRoles, kHyperColumns].
CONDLR_EXPORT const char* condlr_step_layer(const char* isa, int is_double, const int64_t* rows, int64_t rank,
                                            void* const* params, const void* const* grads, void* const* buffers,
                                            const double* hyper, int* skipped) {
  const Hyper* options = reinterpret_cast<const Hyper*>(hyper);
  const std::string error =
      constraint_error("step_layer", options[kS].tau, options[kS].band, options[kS].sigma_max);
  if (!error.empty()) return keep(error);
  return guarded([&] {
    Layer layer{is_double != 0, {}, rank, {}, {}, {}, options};
    std::copy_n(rows, kRoles, layer.rows);
    std::copy_n(params, kRoles, layer.param);
    std::copy_n(grads, kRoles, layer.grad);
    std::copy_n(buffers, kRoles, layer.buffer);
    NetworkStep network({layer}, *(isa ? isa_level(isa) : default_isa()).kernels);
    Workspace workspace;
    for (int64_t task = 0; task < network.tasks(); ++task) network.prepare(task, workspace);
    for (int64_t task = 0; task < network.tasks(); ++task) network.apply(task, workspace);
    *skipped = network.outcome(0) != kReady;
  });
}
