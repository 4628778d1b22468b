// The block list of Workspace, and the pool of the process.
#include "core/workspace.h"

#include <algorithm>
#include <mutex>
#include <new>

#ifdef CONDLR_GUARD_SCRATCH  // in the build for AddressSanitizer
#include <sanitizer/asan_interface.h>

#include <cstring>
#endif

namespace condlr {

namespace {
constexpr std::size_t kLine = 64;
constexpr std::size_t kFirstBlock = std::size_t{1} << 16;
constexpr std::size_t kKept = std::size_t{1} << 26;  // 64 MiB

static_assert(sizeof(Workspace::Block) <= kLine, "the header fits before the first aligned byte");

char* begin_of(Workspace::Block* block) { return reinterpret_cast<char*>(block) + kLine; }

#ifdef CONDLR_GUARD_SCRATCH
// Only what is taken may be touched, the line between two arrays never; what is taken starts as NaN.
constexpr std::size_t kGap = kLine;
void open(void* data, std::size_t bytes) {
  ASAN_UNPOISON_MEMORY_REGION(data, bytes);
  std::memset(data, 0xff, bytes);
}
void close(void* data, std::size_t bytes) { ASAN_POISON_MEMORY_REGION(data, bytes); }
void close_after(Workspace::Mark mark, Workspace::Block* last) {
  for (Workspace::Block* block = mark.block; block != last->next; block = block->next, mark.used = 0) {
    if (block->used > mark.used) close(begin_of(block) + mark.used, block->used - mark.used);
  }
}
#else
constexpr std::size_t kGap = 0;
void open(void*, std::size_t) {}
void close(void*, std::size_t) {}
void close_after(Workspace::Mark, Workspace::Block*) {}
#endif

Workspace::Block* make_block(std::size_t size) {
  void* memory = ::operator new(kLine + size, std::align_val_t{kLine});
  Workspace::Block* block = new (memory) Workspace::Block{size, 0, nullptr};
  close(begin_of(block), size);
  return block;
}
}  // namespace

Workspace::~Workspace() { free_after(&head_); }

void Workspace::free_after(Block* last) {
  for (Block* block = last->next; block != nullptr;) {
    Block* next = block->next;
    ::operator delete(block, std::align_val_t{kLine});
    block = next;
  }
  last->next = nullptr;
}

void Workspace::shrink() {
  release({&head_, 0});
  Block* last = &head_;
  for (std::size_t held = 0; last->next != nullptr && (held += last->next->size) <= kKept;) last = last->next;
  free_after(last);
}

void* Workspace::take(std::size_t bytes) {
  const std::size_t lines = (std::max<std::size_t>(bytes, 1) + kLine - 1) / kLine * kLine + kGap;
  while (current_->size - current_->used < lines) {
    if (current_->next == nullptr)
      current_->next = make_block(std::max({lines, 2 * current_->size, kFirstBlock}));
    current_ = current_->next;
    current_->used = 0;
  }
  void* data = begin_of(current_) + current_->used;
  current_->used += lines;
  open(data, bytes);
  return data;
}

Workspace::Mark Workspace::mark() const { return {current_, current_->used}; }

void Workspace::release(Mark mark) {
  close_after(mark, current_);
  current_ = mark.block;
  current_->used = mark.used;
}

namespace {
std::mutex& lock() {
  static std::mutex* mutex = new std::mutex;  // never destroyed: threads may outlive static objects
  return *mutex;
}
Workspace* pool = nullptr;
}  // namespace

Workspaces::Lease::Lease(Workspaces& from) : from_(from), workspace_(nullptr) {
  const std::lock_guard<std::mutex> guard(lock());
  for (Workspace** list : {&from.idle_, &pool}) {
    if (workspace_ == nullptr && *list != nullptr) {
      workspace_ = *list;
      *list = workspace_->next_;
    }
  }
  if (workspace_ == nullptr) workspace_ = new Workspace;
}

Workspaces::Lease::~Lease() {
  const std::lock_guard<std::mutex> guard(lock());
  workspace_->next_ = from_.idle_;
  from_.idle_ = workspace_;
}

Workspaces::~Workspaces() {
  for (Workspace* each = idle_; each != nullptr; each = each->next_) each->shrink();
  const std::lock_guard<std::mutex> guard(lock());
  while (Workspace* first = idle_) {
    idle_ = first->next_;
    first->next_ = pool;
    pool = first;
  }
}

}  // namespace condlr
