// One fault of each kind for sanitize.py, which sees that each is reported before it trusts a run without reports.
#include <cstdint>
#include <cstdlib>
#include <thread>

#include "core/workspace.h"

#define FAULT extern "C" __attribute__((visibility("default"), noinline)) void

namespace {
volatile int sink;
int counter = 0;

void count(bool locked) {
#pragma omp parallel num_threads(2)
  for (int i = 0; i < 1000; ++i) {
    if (locked) {
#pragma omp critical
      ++counter;
    } else {
      ++counter;
    }
  }
}
}  // namespace

FAULT heap_overflow() {
  volatile char* data = static_cast<char*>(std::malloc(8));
  sink = data[8];
}

FAULT scratch_overflow() {
  condlr::Workspace workspace;
  volatile char* data = static_cast<char*>(workspace.take(8));
  workspace.take(8);
  sink = data[8];
}

FAULT scratch_after_release() {
  condlr::Workspace workspace;
  const auto mark = workspace.mark();
  volatile char* data = static_cast<char*>(workspace.take(8));
  workspace.release(mark);
  sink = data[0];
}

FAULT signed_overflow() {
  volatile std::int64_t large = INT64_MAX;
  large = large + 1;
}

FAULT misaligned_load() {
  alignas(8) char data[16] = {};
  char* volatile odd = data + 1;
  sink = *reinterpret_cast<int*>(odd);
}

FAULT data_race() {
  std::thread other([] { counter = 1; });
  counter = 2;
  other.join();
}

FAULT data_race_in_a_team() { count(/*locked=*/false); }

// what only a run-time library of OpenMP that ThreadSanitizer understands keeps from being reported
FAULT no_fault() {
  int local = 0;
#pragma omp parallel num_threads(2)
  {
#pragma omp critical
    local += 1;
  }
  sink = local;
  count(/*locked=*/true);
}
