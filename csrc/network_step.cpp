// Tasks and order of the whole-network step.
#include "network_step.h"

#include <algorithm>
#include <utility>

namespace condlr {

namespace {

// Measured in multiply-adds; a core of rank 16 to 512 takes as long as 100 to 5 cubes at a factor's rate.
double cost_of(const Layer& layer, Role role) {
  const double rows = static_cast<double>(layer.rows[role]), rank = static_cast<double>(layer.rank);
  switch (role) {
    case kBias:
      return rows;
    case kS:
      return (1500 + 5 * rank * rank) * rank;
    default:
      return (4 * rows + 10 * rank) * rank * rank;
  }
}

}  // namespace

NetworkStep::NetworkStep(std::vector<Layer> layers, const KernelSet& kernels)
    : layers_(std::move(layers)), kernels_(kernels), outcomes_(new std::atomic<int>[layers_.size()]()) {
  tasks_.reserve(kRoles * layers_.size());
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    for (Role role : {kU, kS, kV, kBias}) {
      if (layer.grad[role] == nullptr) continue;
      tasks_.push_back({l, cost_of(layer, role),
                        {role, layer.rows[role], layer.rank, layer.param[role], layer.grad[role],
                         layer.buffer[role], layer.param[kS], layer.hyper, nullptr, nullptr}});
    }
  }
  std::stable_sort(tasks_.begin(), tasks_.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

void NetworkStep::prepare(int64_t index, Workspace& workspace) {
  Task& task = tasks_[static_cast<std::size_t>(index)];
  const bool is_double = layers_[task.layer].is_double;
  const StepOutcome outcome = is_double ? kernels_.f64.prepare(task.update, workspace)
                                    : kernels_.f32.prepare(task.update, workspace);
  if (outcome == kSkip) {
    outcomes_[task.layer] = kSkip;
  } else if (outcome == kNotOrthonormal) {
    int ready = kReady;
    outcomes_[task.layer].compare_exchange_strong(ready, kNotOrthonormal);
  }
}

void NetworkStep::apply(int64_t index, Workspace& workspace) const {
  const Task& task = tasks_[static_cast<std::size_t>(index)];
  if (outcomes_[task.layer] != kReady) return;
  if (layers_[task.layer].is_double) {
    kernels_.f64.apply(task.update, workspace);
  } else {
    kernels_.f32.apply(task.update, workspace);
  }
}

}  // namespace condlr
