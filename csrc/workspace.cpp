// The block list of Workspace, and the pool of the process.
#include "core/workspace.h"

#include <algorithm>
#include <mutex>
#include <new>

namespace condlr {

namespace {
constexpr std::size_t kLine = 64;
constexpr std::size_t kFirstBlock = std::size_t{1} << 16;
constexpr std::size_t kKept = std::size_t{1} << 26;  // 64 MiB

static_assert(sizeof(Workspace::Block) <= kLine, "the header fits before the first aligned byte");

Workspace::Block* make_block(std::size_t size) {
  return new (::operator new(kLine + size, std::align_val_t{kLine})) Workspace::Block{size, 0, nullptr};
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
  bytes = (std::max<std::size_t>(bytes, 1) + kLine - 1) / kLine * kLine;
  while (current_->size - current_->used < bytes) {
    if (current_->next == nullptr)
      current_->next = make_block(std::max({bytes, 2 * current_->size, kFirstBlock}));
    current_ = current_->next;
    current_->used = 0;
  }
  void* data = reinterpret_cast<char*>(current_) + kLine + current_->used;
  current_->used += bytes;
  return data;
}

Workspace::Mark Workspace::mark() const { return {current_, current_->used}; }

void Workspace::release(Mark mark) {
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
