// The CPU implementations of condlr_ext::* through torch's stable ABI: tensor checks, threads, registration.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <exception>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "constraint.h"
#include "isa.h"
#include "network_step.h"
#include "tasks.h"
#include "tensors.h"

namespace condlr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// dtype and shape for error texts, e.g. "Float of shape [3, 4]".
std::string describe(const Tensor& t) {
  std::string text = std::string(torch::headeronly::toString(t.scalar_type())) + " of shape [";
  for (int64_t i = 0; i < t.dim(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(t.size(i));
  return text + "]";
}

bool same_shape(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

bool is_float(const Tensor& t) {
  return t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double;
}

// A batch of matrices: the checked, contiguous input and the sizes that its outputs need.
struct Batch {
  const char* op;
  Tensor A;
  std::vector<int64_t> sizes;  // leading dimensions
  int64_t count, m, n, k;

  Batch(const char* name, const Tensor& input) : op(name), A(input) {
    STD_TORCH_CHECK(is_float(A), op, ": A must be float32 or float64, got ",
                    torch::headeronly::toString(A.scalar_type()));
    STD_TORCH_CHECK(A.dim() >= 2, op, ": A must be a matrix or a batch of matrices, got ", describe(A));
    A = dense(A);
    count = 1;
    for (int64_t i = 0; i < A.dim() - 2; ++i) {
      sizes.push_back(A.size(i));
      count *= A.size(i);
    }
    m = A.size(A.dim() - 2);
    n = A.size(A.dim() - 1);
    k = std::min(m, n);
  }

  Tensor empty(std::initializer_list<int64_t> trailing) const {
    std::vector<int64_t> shape = sizes;
    shape.insert(shape.end(), trailing);
    return torch::stable::new_empty(A, shape);
  }
  Tensor empty_info() const { return torch::stable::new_empty(A, sizes, ScalarType::Int); }
};

// Calls work(kernels of the dtype, zero of the dtype, matrix index, workspace) over the batch; its result is
// the info.
template <class Work>
Tensor run_batch(const Batch& batch, const Work& work) {
  const KernelSet& kernels = *default_isa().kernels;
  const Tensor info = batch.empty_info();
  int32_t* result = info.mutable_data_ptr<int32_t>();
  const bool is_double = batch.A.scalar_type() == ScalarType::Double;
  Workspaces workspaces;
  for_each_task(batch.op, batch.count, workspaces, [&](int64_t i, Workspace& workspace) {
    result[i] =
        is_double ? work(kernels.f64, double{}, i, workspace) : work(kernels.f32, float{}, i, workspace);
  });
  return info;
}

template <class T>
const T* matrix(const Tensor& t, int64_t index, int64_t size) {
  return static_cast<const T*>(t.const_data_ptr()) + index * size;
}

template <class T>
T* mutable_matrix(const Tensor& t, int64_t index, int64_t size) {
  return static_cast<T*>(t.mutable_data_ptr()) + index * size;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> svd(const Tensor& input) {
  const Batch b("svd", input);
  const Tensor U = b.empty({b.m, b.k}), sigma = b.empty({b.k}), V = b.empty({b.n, b.k});
  const Tensor info = run_batch(b, [&](const auto& kernels, auto zero, int64_t i, Workspace& workspace) {
    using T = decltype(zero);
    return kernels.svd(matrix<T>(b.A, i, b.m * b.n), b.m, b.n, mutable_matrix<T>(U, i, b.m * b.k),
                       mutable_matrix<T>(sigma, i, b.k), mutable_matrix<T>(V, i, b.n * b.k), workspace);
  });
  return {U, sigma, V, info};
}

std::tuple<Tensor, Tensor, Tensor> qr(const Tensor& input) {
  const Batch b("qr", input);
  const Tensor Q = b.empty({b.m, b.k}), R = b.empty({b.k, b.n});
  const Tensor info = run_batch(b, [&](const auto& kernels, auto zero, int64_t i, Workspace& workspace) {
    using T = decltype(zero);
    return kernels.qr(matrix<T>(b.A, i, b.m * b.n), b.m, b.n, mutable_matrix<T>(Q, i, b.m * b.k),
                      mutable_matrix<T>(R, i, b.k * b.n), workspace);
  });
  return {Q, R, info};
}

std::tuple<Tensor, Tensor> polar(const Tensor& input) {
  const Batch b("polar", input);
  const Tensor Q = b.empty({b.m, b.n});
  const Tensor info = run_batch(b, [&](const auto& kernels, auto zero, int64_t i, Workspace& workspace) {
    using T = decltype(zero);
    const int64_t size = b.m * b.n;
    return kernels.polar(matrix<T>(b.A, i, size), b.m, b.n, mutable_matrix<T>(Q, i, size), workspace);
  });
  return {Q, info};
}

void check_constraint(const std::string& where, double tau, double band, double sigma_max) {
  const std::string error = constraint_error(where, tau, band, sigma_max);
  STD_TORCH_CHECK(error.empty(), error);
}

std::tuple<Tensor, Tensor> clip_spectrum(const Tensor& input, double tau, int64_t band, double sigma_max) {
  check_constraint("clip_spectrum", tau, static_cast<double>(band), sigma_max);
  const Batch b("clip_spectrum", input);
  const Tensor out = b.empty({b.m, b.n});
  const Tensor info = run_batch(b, [&](const auto& kernels, auto zero, int64_t i, Workspace& workspace) {
    using T = decltype(zero);
    const int64_t size = b.m * b.n;
    return kernels.clip_spectrum(matrix<T>(b.A, i, size), b.m, b.n, tau, static_cast<int>(band), sigma_max,
                                 mutable_matrix<T>(out, i, size), workspace);
  });
  return {out, info};
}

constexpr const char* kRoleNames[kRoles] = {"U", "S", "V", "bias"};

// One tensor of the step: contiguous, of the layer's dtype, in the shape of its parameter.
void check_step_tensor(const Tensor& t, const char* list, int64_t layer, int role, const Tensor& param,
                       ScalarType dtype) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, "step: layer ", layer, ": ", list, " of ", kRoleNames[role],
                  " must be ", dtype == ScalarType::Double ? "float64" : "float32", " like U, got ",
                  describe(t));
  STD_TORCH_CHECK(same_shape(t, param), "step: layer ", layer, ": ", list, " of ", kRoleNames[role],
                  " must have the shape of its parameter, ", describe(param), ", got ", describe(t));
  STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous(), "step: layer ", layer, ": ", list, " of ",
                  kRoleNames[role], " must be contiguous and on the CPU, got ", describe(t),
                  t.is_cpu() ? ", not contiguous" : ", not on the CPU");
  STD_TORCH_CHECK(is_aligned(t), "step: layer ", layer, ": ", list, " of ", kRoleNames[role],
                  " must start at a multiple of its element size, which a clone() does, got ", describe(t));
}

Layer make_layer(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                 const std::vector<Tensor>& buffers, const Hyper* hyper, int64_t index) {
  const auto at = [index](const std::vector<Tensor>& list, int role) -> const Tensor& {
    return list[static_cast<std::size_t>(kRoles * index + role)];
  };
  const Tensor &U = at(params, kU), &S = at(params, kS), &V = at(params, kV), &bias = at(params, kBias);
  STD_TORCH_CHECK(
      U.dim() == 2 && S.dim() == 2 && V.dim() == 2 && S.size(0) == S.size(1) && U.size(1) == S.size(1) &&
          V.size(1) == S.size(1) && U.size(0) >= S.size(0) && V.size(0) >= S.size(0) && is_float(U),
      "step: layer ", index, ": U, S, V must be [m, r], [r, r], [n, r], r <= m, n, float32 or float64; got ",
      describe(U), ", ", describe(S), ", ", describe(V));
  STD_TORCH_CHECK(bias.dim() == 1, "step: layer ", index, ": bias must be a vector, got ", describe(bias));
  check_constraint("step: layer " + std::to_string(index), hyper[kS].tau, hyper[kS].band,
                   hyper[kS].sigma_max);

  Layer layer{};
  const ScalarType dtype = U.scalar_type();
  layer.is_double = dtype == ScalarType::Double;
  layer.rank = S.size(0);
  layer.hyper = hyper;
  const int64_t rows[kRoles] = {U.size(0), layer.rank, V.size(0), bias.numel()};
  for (int role = 0; role < kRoles; ++role) {
    const Tensor &param = at(params, role), &grad = at(grads, role), &buffer = at(buffers, role);
    layer.rows[role] = rows[role];
    if (param.numel() > 0) check_step_tensor(param, "params", index, role, param, dtype);
    layer.param[role] = param.mutable_data_ptr();
    if (grad.numel() == 0) continue;
    check_step_tensor(grad, "grads", index, role, param, dtype);
    layer.grad[role] = grad.const_data_ptr();
    if (hyper[role].momentum == 0) continue;
    check_step_tensor(buffer, "momentum_buffers", index, role, param, dtype);
    layer.buffer[role] = buffer.mutable_data_ptr();
  }
  return layer;
}

// What a layer that is not orthonormal adds to its counter: reference.NOT_ORTHONORMAL.
constexpr int64_t kNotOrthonormalCount = int64_t{1} << 32;

void step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
          const std::vector<Tensor>& buffers, const Tensor& hyper, const Tensor& skipped) {
  STD_TORCH_CHECK(hyper.is_cpu() && hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous() &&
                      hyper.dim() == 3 && hyper.size(1) == kRoles && hyper.size(2) == kHyperColumns,
                  "step: hyper must be a contiguous float64 CPU tensor [layers, ", kRoles, ", ",
                  kHyperColumns, "], got ", describe(hyper));
  const int64_t layers = hyper.size(0);
  const std::size_t tensors = static_cast<std::size_t>(kRoles * layers);
  STD_TORCH_CHECK(params.size() == tensors && grads.size() == tensors && buffers.size() == tensors,
                  "step: params, grads and momentum_buffers must hold 4 tensors for each of the ", layers,
                  " layers of hyper, got ", params.size(), ", ", grads.size(), " and ", buffers.size());
  STD_TORCH_CHECK(skipped.is_cpu() && skipped.scalar_type() == ScalarType::Long && skipped.is_contiguous() &&
                      skipped.dim() == 1 && skipped.size(0) == layers,
                  "step: skipped must be a contiguous int64 CPU tensor [", layers, "], got ",
                  describe(skipped));

  const Hyper* rows = static_cast<const Hyper*>(hyper.const_data_ptr());
  std::vector<Layer> list;
  for (int64_t l = 0; l < layers; ++l)
    list.push_back(make_layer(params, grads, buffers, rows + kRoles * l, l));

  NetworkStep network(std::move(list), *default_isa().kernels);
  Workspaces workspaces;
  for_each_task("step", network.tasks(), workspaces,
                [&](int64_t task, Workspace& workspace) { network.prepare(task, workspace); });
  for_each_task("step", network.tasks(), workspaces,
                [&](int64_t task, Workspace& workspace) { network.apply(task, workspace); });
  int64_t* counter = skipped.mutable_data_ptr<int64_t>();
  for (int64_t l = 0; l < layers; ++l) {
    const StepOutcome outcome = network.outcome(l);
    counter[l] += outcome == kReady ? 0 : outcome == kSkip ? 1 : kNotOrthonormalCount;
  }
}

}  // namespace
}  // namespace condlr

STABLE_TORCH_LIBRARY_IMPL(condlr_ext, CPU, m) {
  m.impl("svd", TORCH_BOX(&condlr::svd));
  m.impl("qr", TORCH_BOX(&condlr::qr));
  m.impl("polar", TORCH_BOX(&condlr::polar));
  m.impl("clip_spectrum", TORCH_BOX(&condlr::clip_spectrum));
  m.impl("step", TORCH_BOX(&condlr::step));
}
