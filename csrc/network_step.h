// One step of many layers: tasks that may fail and write nothing, then tasks that write the layers of which
// none did.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"

namespace condlr {

// Arrays by Role. A role with a null gradient does not change; a null buffer means that its momentum is 0.
struct Layer {
  bool is_double;
  int64_t rows[kRoles];  // of U, S and V; the length of the bias
  int64_t rank;
  void* param[kRoles];
  const void* grad[kRoles];
  void* buffer[kRoles];
  const Hyper* hyper;  // kRoles rows
};

class NetworkStep {
 public:
  NetworkStep(std::vector<Layer> layers, const KernelSet& kernels);

  int64_t tasks() const { return static_cast<int64_t>(tasks_.size()); }
  // One role of one layer; the most expensive tasks come first and different ones may run at once. What a
  // task keeps is in its workspace, which must live until the end.
  void prepare(int64_t task, Workspace& workspace);
  // Writes a task's result, unless its layer failed; call it after all tasks have been prepared.
  void apply(int64_t task, Workspace& workspace) const;
  StepOutcome outcome(int64_t layer) const {
    return static_cast<StepOutcome>(outcomes_[static_cast<std::size_t>(layer)].load());
  }

 private:
  struct Task {
    std::size_t layer;
    double cost;
    Update update;
  };

  std::vector<Layer> layers_;
  const KernelSet& kernels_;
  std::vector<Task> tasks_;
  std::unique_ptr<std::atomic<int>[]> outcomes_;  // by layer; kSkip if any of its tasks says so
};

}  // namespace condlr
