// One row of the step's table of hyperparameters.
#pragma once

#include <cstdint>

namespace condlr {

enum Role : int { kU = 0, kS = 1, kV = 2, kBias = 3, kRoles = 4 };

// The columns of `hyper` in order; tau, band and sigma_max are read in the row of S only.
struct Hyper {
  double lr, momentum, dampening, weight_decay, nesterov, maximize, fresh, tau, band, sigma_max;
};
constexpr int64_t kHyperColumns = sizeof(Hyper) / sizeof(double);

}  // namespace condlr
