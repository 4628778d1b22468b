// One step of many layers: tasks that may fail and write nothing, then tasks that write the layers without failure.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "kernels.h"

namespace condlr {

// Arrays by Role. A null gradient leaves that role alone; a null buffer means that its momentum is 0.
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
  // One role of one layer; the most expensive tasks come first. Different tasks may run at once. What a task keeps
  // lies in its workspace and is needed until the end.
  void prepare(int64_t task, Workspace& workspace);
  // After all tasks have been prepared: writes a task's result, unless its layer failed.
  void apply(int64_t task, Workspace& workspace) const;
  bool failed(int64_t layer) const { return failed_[static_cast<std::size_t>(layer)]; }

 private:
  struct Task {
    std::size_t layer;
    double cost;
    Update update;
  };

  std::vector<Layer> layers_;
  const KernelSet& kernels_;
  std::vector<Task> tasks_;
  std::unique_ptr<std::atomic<bool>[]> failed_;  // by layer
};

}  // namespace condlr
