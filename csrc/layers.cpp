// low_rank_linear and its backward on CPUs: float32 and float64 by the core; other dtypes by torch's products,
// that is by the reference op.
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "isa.h"
#include "tasks.h"
#include "tensors.h"

namespace condlr {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Multiply-adds that are worth a thread.
constexpr double kShare = 5e5;

template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* write(const Tensor& t) {
  return t.numel() > 0 ? static_cast<T*>(t.mutable_data_ptr()) : nullptr;
}

// The sizes of a layer and its rows, checked to fit together.
struct Call {
  int64_t rows, m, n, r;
  ScalarType dtype;
  bool served;  // by the core

  // like: X or the gradient of Y, whose last dimension is n or m
  Call(const Tensor& like, bool is_input, const Tensor& U, const Tensor& S, const Tensor& V)
      : dtype(U.scalar_type()) {
    STD_TORCH_CHECK(U.dim() == 2 && S.dim() == 2 && V.dim() == 2 && S.size(0) == U.size(1) &&
                        S.size(1) == U.size(1) && V.size(1) == U.size(1),
                    "low_rank_linear: U, S, V must be [m, r], [r, r], [n, r]");
    m = U.size(0), n = V.size(0), r = U.size(1);
    const int64_t width = is_input ? n : m;
    STD_TORCH_CHECK(like.dim() > 0 && like.size(like.dim() - 1) == width, "low_rank_linear: the ",
                    is_input ? "input" : "gradient", " must be [*, ", width, "]");
    rows = 1;
    for (int64_t i = 0; i < like.dim() - 1; ++i) rows *= like.size(i);
    STD_TORCH_CHECK(like.scalar_type() == dtype && S.scalar_type() == dtype && V.scalar_type() == dtype,
                    "low_rank_linear: all tensors must have one dtype");
    served = dtype == ScalarType::Float || dtype == ScalarType::Double;
  }

  // Multiply-adds of the forward, in double: the product of the sizes of expanded tensors may be beyond int64.
  double work() const {
    return static_cast<double>(rows) * static_cast<double>(r) * static_cast<double>(m + n);
  }

  // Checks the number of elements and the dtype of a tensor.
  void check(const Tensor& t, int64_t elements, const char* name) const {
    STD_TORCH_CHECK(t.numel() == elements && t.scalar_type() == dtype, "low_rank_linear: ", name,
                    " must have ", elements, " elements and the dtype of U");
  }

  // Calls work(kernels, zero of the dtype).
  template <class Work>
  void run(const Work& work) const {
    const KernelSet& kernels = *default_isa().kernels;
    dtype == ScalarType::Double ? work(kernels.f64, double{}) : work(kernels.f32, float{});
  }

  template <class T>
  Linear<T> layer(const Tensor& U, const Tensor& S, const Tensor& V) const {
    return {rows, m, n, r, read<T>(U), read<T>(S), read<T>(V), nullptr};
  }

  // Calls work(share, workspace) for each of the shares that are worth a thread.
  template <class Work>
  void in_parts(Workspaces& workspaces, const Work& work) const {
    const double threads = torch::stable::get_num_threads();
    const auto parts = static_cast<int64_t>(std::max(1.0, std::min(threads, this->work() / kShare)));
    for_each_task("low_rank_linear", parts, workspaces,
                  [&](int64_t i, Workspace& workspace) { work(Share{i, parts}, workspace); });
  }
};

// Uninitialized, in the shape of t with another last dimension.
Tensor empty_rows(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return torch::stable::new_empty(t, sizes);
}

std::tuple<Tensor, Tensor> forward(const Tensor& input, const Tensor& U, const Tensor& S, const Tensor& V,
                                   const std::optional<Tensor>& bias) {
  const Call call(input, /*is_input=*/true, U, S, V);
  if (bias) call.check(*bias, call.m, "bias");
  if (!call.served) {
    std::array<StableIValue, 5> stack{from(input), from(U), from(S), from(V), from(bias)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("condlr_ext::_reference_low_rank_linear", "", stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1])};
  }
  const Tensor X = dense(input), u = dense(U), s = dense(S), v = dense(V);
  const Tensor b = bias ? dense(*bias) : U;
  const Tensor Y = empty_rows(X, call.m), P = empty_rows(X, call.r);
  call.run([&](const auto& kernels, auto zero) {
    using T = decltype(zero);
    Linear<T> layer = call.layer<T>(u, s, v);
    Workspaces workspaces;
    const Workspaces::Lease lease(workspaces);
    if (layer.is_folded()) {
      T* US = static_cast<T*>(lease.workspace().take(sizeof(T) * call.m * call.r));
      kernels.linear_fold(layer, US, lease.workspace());
      layer.US = US;
    }
    call.in_parts(workspaces, [&](Share part, Workspace& workspace) {
      kernels.linear_forward(layer, read<T>(X), bias ? read<T>(b) : nullptr, write<T>(Y), write<T>(P), part,
                             workspace);
    });
  });
  return {Y, P};
}

StableIValue from_mask(const std::vector<bool>& mask) {
  StableListHandle list;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_new_list_reserve_size(mask.size(), &list));
  for (const bool needed : mask)
    STABLE_TORCH_ERROR_CODE_CHECK(torch_list_push_back(list, torch::stable::detail::from(needed)));
  return torch::stable::detail::from(list);
}

Gradients backward(const Tensor& grad, const std::optional<Tensor>& input, const std::optional<Tensor>& P,
                   const Tensor& U, const Tensor& S, const Tensor& V, const std::vector<bool>& mask) {
  const Call call(grad, /*is_input=*/false, U, S, V);
  const bool needs_P = mask[1] || mask[2], needs_X = mask[3];
  STD_TORCH_CHECK(input || !(needs_X || (needs_P && !P)),
                  "low_rank_linear_backward: the gradients asked for need the input");
  if (input) call.check(*input, call.rows * call.n, "input");
  if (P) call.check(*P, call.rows * call.r, "P");
  if (!call.served || (needs_P && !P)) {
    std::array<StableIValue, 7> stack{from(grad), from(input), from(P),        from(U),
                                      from(S),    from(V),     from_mask(mask)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("condlr_ext::_reference_low_rank_linear_backward", "",
                                                        stack.data(), TORCH_ABI_VERSION));
    return {to<Tensor>(stack[0]), to<Tensor>(stack[1]), to<Tensor>(stack[2]), to<Tensor>(stack[3]),
            to<Tensor>(stack[4])};
  }
  const Tensor G = dense(grad), u = dense(U), s = dense(S), v = dense(V);
  const Tensor X = needs_X ? dense(*input) : G, p = needs_P ? dense(*P) : G;
  const auto gradient = [&](int i, std::initializer_list<int64_t> shape) {
    return torch::stable::new_empty(U, mask[i] ? std::vector<int64_t>(shape) : std::vector<int64_t>{0});
  };
  const Tensor dX = mask[0] ? empty_rows(G, call.n) : gradient(0, {}), dU = gradient(1, {call.m, call.r}),
               dS = gradient(2, {call.r, call.r}), dV = gradient(3, {call.n, call.r}),
               db = gradient(4, {call.m});
  call.run([&](const auto& kernels, auto zero) {
    using T = decltype(zero);
    Linear<T> layer = call.layer<T>(u, s, v);
    const LinearGradients<T> out{write<T>(dX), write<T>(dU), write<T>(dS), write<T>(dV), write<T>(db)};
    Workspaces workspaces;
    const Workspaces::Lease lease(workspaces);
    const auto scratch = [&](bool needed, int64_t rows) {
      return needed ? static_cast<T*>(lease.workspace().take(sizeof(T) * rows * call.r)) : nullptr;
    };
    const bool folded = layer.is_folded(), needs_QS = mask[0] || mask[3];
    if (folded && needs_QS) {
      T* US = scratch(true, call.m);
      kernels.linear_fold(layer, US, lease.workspace());
      layer.US = US;
    }
    const LinearProducts<T> products{
        scratch(!folded && (needs_QS || mask[2]), call.rows), scratch(needs_QS, call.rows),
        scratch(!folded && mask[1], call.rows), scratch(folded && needs_P, call.m)};
    call.in_parts(workspaces, [&](Share part, Workspace& workspace) {
      kernels.linear_backward_rows(layer, read<T>(G), read<T>(p), products, out.dX, part, workspace);
    });
    call.in_parts(workspaces, [&](Share part, Workspace& workspace) {
      kernels.linear_backward_sums(layer, read<T>(G), read<T>(X), read<T>(p), products, out, part, workspace);
    });
    if (folded && mask[2]) kernels.linear_backward_core(layer, products.dC, out.dS, lease.workspace());
  });
  return {dX, dU, dS, dV, db};
}

}  // namespace
}  // namespace condlr

STABLE_TORCH_LIBRARY_IMPL(condlr_ext, CPU, m) {
  m.impl("low_rank_linear", TORCH_BOX(&condlr::forward));
  m.impl("low_rank_linear_backward", TORCH_BOX(&condlr::backward));
}
