// Tasks of one call of an op, shared by torch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <string>

#include "core/workspace.h"

namespace condlr {

// Calls work(task, workspace) for every task; each thread takes the next one, with a workspace of its own.
// An exception stops the others at their next task and leaves with its text, which parallel_for would drop.
template <class Work>
void for_each_task(const char* op, int64_t tasks, Workspaces& workspaces, const Work& work) {
  const int64_t workers = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::string error;
  const auto fail = [&](const char* text) {
    next = tasks;
    if (!failed.exchange(true)) error = text;
  };
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    try {
      const Workspaces::Lease lease(workspaces);
      for (int64_t worker = begin; worker < end; ++worker) {
        for (int64_t task; (task = next.fetch_add(1)) < tasks;) work(task, lease.workspace());
      }
    } catch (const std::bad_alloc&) {
      fail("out of memory");
    } catch (const std::exception& exception) {
      fail(exception.what());
    }
  });
  STD_TORCH_CHECK(!failed, op, ": ", error);
}

}  // namespace condlr
