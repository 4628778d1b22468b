// The block list behind Workspace.
#include "core/workspace.h"

#include <algorithm>
#include <new>

namespace condlr {

namespace {
constexpr std::size_t kLine = 64;
constexpr std::size_t kFirstBlock = std::size_t{1} << 16;
}  // namespace

struct Workspace::Block {
  std::size_t size;
  std::size_t used;
  Block* next;
  char* data() { return reinterpret_cast<char*>(this) + kLine; }

  static Block* make(std::size_t size) {
    static_assert(sizeof(Block) <= kLine, "the header fits before the first aligned byte");
    return new (::operator new(kLine + size, std::align_val_t{kLine})) Block{size, 0, nullptr};
  }
};

Workspace::Workspace() : first_(Block::make(kFirstBlock)), current_(first_) {}

Workspace::~Workspace() {
  while (first_ != nullptr) {
    Block* next = first_->next;
    ::operator delete(first_, std::align_val_t{kLine});
    first_ = next;
  }
}

void* Workspace::take(std::size_t bytes) {
  bytes = (bytes + kLine - 1) / kLine * kLine;
  while (current_->size - current_->used < bytes) {
    if (current_->next == nullptr) current_->next = Block::make(std::max(bytes, 2 * current_->size));
    current_ = current_->next;
    current_->used = 0;
  }
  void* data = current_->data() + current_->used;
  current_->used += bytes;
  return data;
}

Workspace::Mark Workspace::mark() const { return {current_, current_->used}; }

void Workspace::release(Mark mark) {
  current_ = mark.block;
  current_->used = mark.used;
}

}  // namespace condlr
