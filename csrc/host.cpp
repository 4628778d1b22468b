// The pybind11 module _host: build information, CPU features and the C++ core on NumPy arrays, without torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "constraint.h"
#include "isa.h"
#include "network_step.h"

namespace py = pybind11;

namespace condlr {
namespace {

// In C order and aligned, as the core reads it: otherwise NumPy makes a copy.
template <class T>
using Array = py::array_t<T, py::array::c_style | py::detail::npy_api::NPY_ARRAY_ALIGNED_>;

const KernelSet& kernels_of(const std::optional<std::string>& isa) {
  return *(isa ? isa_level(*isa) : default_isa()).kernels;
}

[[noreturn]] void reject(const std::string& what, const py::array& got) {
  throw py::value_error(what + ", got " + py::str(got.dtype()).cast<std::string>() + " of shape " +
                        py::str(got.attr("shape")).cast<std::string>());
}

bool is_double(const py::array& a, const std::string& name) {
  if (py::isinstance<py::array_t<double>>(a)) return true;
  if (!py::isinstance<py::array_t<float>>(a)) reject(name + " must be float32 or float64", a);
  return false;
}

// Calls work(zero of the dtype) for a float32 or float64 matrix.
template <class Work>
py::tuple for_matrix(const char* op, const py::array& A, const Work& work) {
  if (A.ndim() != 2) reject(std::string(op) + ": A must be a matrix", A);
  if (is_double(A, std::string(op) + ": A")) return work(double{});
  return work(float{});
}

py::tuple svd(const py::array& input, const std::optional<std::string>& isa) {
  return for_matrix("svd", input, [&](auto zero) {
    using T = decltype(zero);
    const Array<T> A(input);
    const int64_t m = A.shape(0), n = A.shape(1), k = std::min(m, n);
    Array<T> U({m, k}), sigma(k), V({n, k});
    Workspace workspace;
    const int info = kernels_of(isa).get<T>().svd(A.data(), m, n, U.mutable_data(), sigma.mutable_data(),
                                                  V.mutable_data(), workspace);
    return py::make_tuple(U, sigma, V, info);
  });
}

py::tuple qr(const py::array& input, const std::optional<std::string>& isa) {
  return for_matrix("qr", input, [&](auto zero) {
    using T = decltype(zero);
    const Array<T> A(input);
    const int64_t m = A.shape(0), n = A.shape(1), k = std::min(m, n);
    Array<T> Q({m, k}), R({k, n});
    Workspace workspace;
    const int info =
        kernels_of(isa).get<T>().qr(A.data(), m, n, Q.mutable_data(), R.mutable_data(), workspace);
    return py::make_tuple(Q, R, info);
  });
}

py::tuple polar(const py::array& input, const std::optional<std::string>& isa) {
  return for_matrix("polar", input, [&](auto zero) {
    using T = decltype(zero);
    const Array<T> A(input);
    Array<T> Q({A.shape(0), A.shape(1)});
    Workspace workspace;
    const int info =
        kernels_of(isa).get<T>().polar(A.data(), A.shape(0), A.shape(1), Q.mutable_data(), workspace);
    return py::make_tuple(Q, info);
  });
}

void check_constraint(const char* where, double tau, double band, double sigma_max) {
  const std::string error = constraint_error(where, tau, band, sigma_max);
  if (!error.empty()) throw py::value_error(error);
}

py::tuple clip_spectrum(const py::array& input, double tau, int band, double sigma_max,
                        const std::optional<std::string>& isa) {
  check_constraint("clip_spectrum", tau, band, sigma_max);
  return for_matrix("clip_spectrum", input, [&](auto zero) {
    using T = decltype(zero);
    const Array<T> A(input);
    Array<T> out({A.shape(0), A.shape(1)});
    Workspace workspace;
    const int info = kernels_of(isa).get<T>().clip_spectrum(A.data(), A.shape(0), A.shape(1), tau, band,
                                                            sigma_max, out.mutable_data(), workspace);
    return py::make_tuple(out, info);
  });
}

py::tuple eigh(const py::array& input, std::optional<int64_t> head, int64_t tail,
               const std::optional<std::string>& isa) {
  return for_matrix("eigh", input, [&](auto zero) {
    using T = decltype(zero);
    const Array<T> A(input);
    const int64_t n = A.shape(0), first = head.value_or(n);
    if (A.shape(1) != n) reject("eigh: A must be square", input);
    if (first < 0 || tail < 0 || first > n || tail > n - first) {
      throw py::value_error("eigh: head and tail must be >= 0 and at most n = " + std::to_string(n) +
                            " together, got " + std::to_string(first) + " and " + std::to_string(tail));
    }
    Array<T> lambda(n), V({first + tail, n});
    Workspace workspace;
    const bool converged = kernels_of(isa).get<T>().eigh(A.data(), n, first, tail, lambda.mutable_data(),
                                                         V.mutable_data(), workspace);
    return py::make_tuple(lambda, V, converged);
  });
}

// Copies in C order of four arrays of one dtype; empty arrays of any dtype stand for missing ones.
template <class T>
std::vector<Array<T>> copy_roles(const std::vector<py::array>& arrays, const char* name) {
  if (arrays.size() != kRoles) {
    throw py::value_error("step_layer: " + std::string(name) +
                          " must be the arrays of U, S, V and bias, got " + std::to_string(arrays.size()) +
                          " arrays");
  }
  std::vector<Array<T>> copies;
  for (const py::array& a : arrays) {
    if (a.size() > 0 && !py::isinstance<py::array_t<T>>(a)) {
      reject("step_layer: " + std::string(name) + " must have the dtype of U", a);
    }
    Array<T> copy(std::vector<py::ssize_t>(a.shape(), a.shape() + a.ndim()));
    if (a.size() > 0) copy[py::ellipsis()] = a;
    copies.push_back(copy);
  }
  return copies;
}

template <class T>
py::tuple step_layer_as(const std::vector<py::array>& params, const std::vector<py::array>& grads,
                        const std::vector<py::array>& buffers, const Array<double>& hyper,
                        const KernelSet& kernels) {
  std::vector<Array<T>> param = copy_roles<T>(params, "params"), grad = copy_roles<T>(grads, "grads"),
                        buffer = copy_roles<T>(buffers, "momentum_buffers");
  if (hyper.ndim() != 2 || hyper.shape(0) != kRoles || hyper.shape(1) != kHyperColumns) {
    reject("step_layer: hyper must be [" + std::to_string(kRoles) + ", " + std::to_string(kHyperColumns) +
               "]",
           hyper);
  }
  const Hyper* rows = reinterpret_cast<const Hyper*>(hyper.data());
  check_constraint("step_layer", rows[kS].tau, rows[kS].band, rows[kS].sigma_max);
  const Array<T>&U = param[kU], &S = param[kS], &V = param[kV];
  if (U.ndim() != 2 || S.ndim() != 2 || V.ndim() != 2 || S.shape(0) != S.shape(1) ||
      U.shape(1) != S.shape(1) || V.shape(1) != S.shape(1) || U.shape(0) < S.shape(0) ||
      V.shape(0) < S.shape(0)) {
    throw py::value_error("step_layer: U, S, V must be [m, r], [r, r], [n, r] with r <= m, n");
  }
  Layer layer{sizeof(T) == sizeof(double),
              {U.shape(0), S.shape(0), V.shape(0), param[kBias].size()},
              S.shape(0),
              {},
              {},
              {},
              rows};
  for (std::size_t role = 0; role < kRoles; ++role) {
    layer.param[role] = param[role].mutable_data();
    if (grad[role].size() == 0) continue;
    if (grad[role].size() != param[role].size())
      reject("step_layer: grads must have the shapes of params", grad[role]);
    layer.grad[role] = grad[role].data();
    if (rows[role].momentum == 0) continue;
    if (buffer[role].size() != param[role].size()) {
      reject("step_layer: momentum_buffers must have the shapes of params", buffer[role]);
    }
    layer.buffer[role] = buffer[role].mutable_data();
  }
  NetworkStep network({layer}, kernels);
  Workspace workspace;
  for (int64_t task = 0; task < network.tasks(); ++task) network.prepare(task, workspace);
  for (int64_t task = 0; task < network.tasks(); ++task) network.apply(task, workspace);
  return py::make_tuple(param, buffer, network.outcome(0) != kReady);
}

py::tuple step_layer(const std::vector<py::array>& params, const std::vector<py::array>& grads,
                     const std::vector<py::array>& buffers, const Array<double>& hyper,
                     const std::optional<std::string>& isa) {
  if (params.empty())
    throw py::value_error("step_layer: params must be the arrays of U, S, V and bias, got none");
  const KernelSet& kernels = kernels_of(isa);
  if (is_double(params[0], "step_layer: U"))
    return step_layer_as<double>(params, grads, buffers, hyper, kernels);
  return step_layer_as<float>(params, grads, buffers, hyper, kernels);
}

std::vector<std::string> level_names(bool supported_only) {
  std::vector<std::string> names;
  for (const IsaLevel& level : isa_levels()) {
    if (level.supported || !supported_only) names.push_back(level.name);
  }
  return names;
}

py::dict build_info() {
  using py::literals::operator""_a;
#if defined(__clang__)
  const char* compiler = "clang " __clang_version__;
#else
  const char* compiler = "gcc " __VERSION__;
#endif
  return py::dict("compiler"_a = compiler, "cxx_standard"_a = static_cast<int64_t>(__cplusplus),
                  "build_type"_a = CONDLR_BUILD_TYPE, "cxx_flags"_a = CONDLR_CXX_FLAGS,
                  "torch_built_against"_a = CONDLR_TORCH_VERSION, "torch_target"_a = CONDLR_TORCH_TARGET,
                  "isa_levels"_a = level_names(/*supported_only=*/false));
}

py::dict features() {
  py::dict result;
  for (const auto& [name, present] : cpu_features()) result[py::str(name)] = present;
  return result;
}

PYBIND11_MODULE(_host, m) {
  using py::literals::operator""_a;
  const auto isa = py::arg_v("isa", std::optional<std::string>{}, "None");
  const double inf = __builtin_inf();
  m.doc() =
      "Build information, CPU features and the C++ core on NumPy arrays (float32 or float64, any strides).";
  m.def("build_info", &build_info, "Compiler, flags, torch versions and the instruction sets compiled.");
  m.def("cpu_features", &features, "The features of this CPU that the instruction sets ask for.");
  m.def("isa", [] { return default_isa().name; }, "The instruction set in use; CONDLR_EXT_ISA lowers it.");
  m.def(
      "isa_levels", [] { return level_names(/*supported_only=*/true); },
      "The instruction sets this CPU can run.");
  m.def("svd", &svd, "A"_a, isa, "A = U diag(sigma) V^T, reduced: (U, sigma, V, info).");
  m.def("qr", &qr, "A"_a, isa, "A = Q R, reduced, diag(R) >= 0: (Q, R, info).");
  m.def("polar", &polar, "A"_a, isa, "The orthonormal polar factor: (Q, info).");
  m.def("clip_spectrum", &clip_spectrum, "A"_a, "tau"_a, "band"_a = 0, "sigma_max"_a = inf, isa,
        "A with its singular values clipped to the band: (out, info).");
  m.def("eigh", &eigh, "A"_a, "head"_a = py::none(), "tail"_a = 0, isa,
        "The eigenvalues of a symmetric A, descending, and the eigenvectors of the first head (default: all) "
        "and the last tail of them as rows: (lambda, V, converged). The lower half of A is read.");
  m.def("step_layer", &step_layer, "params"_a, "grads"_a, "momentum_buffers"_a, "hyper"_a, isa,
        "One constrained SGD step of a layer: (params, momentum_buffers, skipped), new arrays.");
}

}  // namespace
}  // namespace condlr
