// One role of a layer in a step: hyperparameters, arrays and what prepare() keeps for apply().
#pragma once

#include <cstdint>

namespace condlr {

enum Role : int { kU = 0, kS = 1, kV = 2, kBias = 3, kRoles = 4 };

// The columns of `hyper`, in the order of reference.HYPER; precondition is read in the rows of U and V; tau,
// band and sigma_max in the row of S.
struct Hyper {
  double lr, momentum, dampening, weight_decay, nesterov, maximize, fresh, precondition, tau, band, sigma_max;
};
constexpr int64_t kHyperColumns = sizeof(Hyper) / sizeof(double);

// What became of the first part of an update: the layer changes; it must not, because a gradient or result is
// not finite, or a core is all zero or does not converge; or because its U or V is not orthonormal.
enum StepOutcome : int { kReady = 0, kSkip = 1, kNotOrthonormal = 2 };

// Arrays of float or double, row-major. U, V: param [rows, rank]; S: [rank, rank]; bias: [rows], of any length.
struct Update {
  Role role;
  int64_t rows, rank;
  void* param;
  const void* grad;
  void* buffer;        // not read if its momentum is 0
  const void* S;       // of the layer
  const Hyper* hyper;  // of the layer, by Role
  // kept from prepare() to apply(), in the workspace: the new parameter or, null, how to make it from the old
  // one
  void* result;
  void* transform;
};

}  // namespace condlr
