// Tasks, scratch and commit of the whole-network step.
#include "network_step.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace condlr {

namespace {

// Measured in multiply-adds; a core's Jacobi sweeps cost about a hundred cubes.
double cost_of(const Layer& layer, Role role) {
  const double rows = static_cast<double>(layer.rows[role]), rank = static_cast<double>(layer.rank);
  switch (role) {
    case kBias:
      return rows;
    case kS:
      return 100 * rank * rank * rank;
    default:
      return 5 * rows * rank * rank;
  }
}

// Whole cache lines: every result is aligned, whatever the type of the one before it.
std::size_t space_of(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

NetworkStep::NetworkStep(std::vector<Layer> layers, const KernelSet& kernels)
    : layers_(std::move(layers)), kernels_(kernels), failed_(new std::atomic<bool>[layers_.size()]()) {
  std::size_t total = 0;
  for (std::size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = layers_[l];
    for (Role role : {kU, kS, kV, kBias}) {
      if (layer.grad[role] == nullptr) continue;
      const int64_t size = layer.rows[role] * (role == kBias ? 1 : layer.rank);
      const std::size_t bytes =
          static_cast<std::size_t>(size) * (layer.is_double ? sizeof(double) : sizeof(float));
      tasks_.push_back({l, role, cost_of(layer, role), bytes, nullptr, nullptr});
      total += space_of(bytes) * (layer.hyper[role].momentum != 0 ? 2 : 1);
    }
  }
  char* next = static_cast<char*>(results_.take(total));
  for (Task& task : tasks_) {
    task.new_param = next;
    next += space_of(task.bytes);
  }
  for (Task& task : tasks_) {
    if (layers_[task.layer].hyper[task.role].momentum == 0) continue;
    task.new_buffer = next;
    next += space_of(task.bytes);
  }
  std::stable_sort(tasks_.begin(), tasks_.end(),
                   [](const Task& a, const Task& b) { return a.cost > b.cost; });
}

template <class T>
bool NetworkStep::run_as(const Task& task, Workspace& workspace) const {
  const Layer& layer = layers_[task.layer];
  const Role role = task.role;
  return kernels_.get<T>().step(
      role, static_cast<const T*>(layer.param[role]), static_cast<const T*>(layer.grad[role]),
      static_cast<const T*>(layer.buffer[role]), static_cast<T*>(task.new_param),
      static_cast<T*>(task.new_buffer), layer.rows[role], layer.rank,
      static_cast<const T*>(layer.param[kS]), layer.hyper, workspace);
}

void NetworkStep::run(int64_t index, Workspace& workspace) {
  const Task& task = tasks_[static_cast<std::size_t>(index)];
  const bool ok =
      layers_[task.layer].is_double ? run_as<double>(task, workspace) : run_as<float>(task, workspace);
  if (!ok) failed_[task.layer] = true;
}

void NetworkStep::commit(int64_t index) const {
  const Task& task = tasks_[static_cast<std::size_t>(index)];
  const Layer& layer = layers_[task.layer];
  if (failed_[task.layer]) return;
  std::memcpy(layer.param[task.role], task.new_param, task.bytes);
  if (task.new_buffer != nullptr) std::memcpy(layer.buffer[task.role], task.new_buffer, task.bytes);
}

}  // namespace condlr
