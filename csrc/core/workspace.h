// Scratch memory that a caller hands to the core: a stack of blocks which grows on demand and is reused.
#pragma once

#include <cstddef>

namespace condlr {

// Defined out of line in workspace.cpp, so that no code of it is compiled for a particular instruction set.
class Workspace {
 public:
  struct Block {
    std::size_t size;
    std::size_t used;
    Block* next;
  };
  struct Mark {
    Block* block;
    std::size_t used;
  };

  Workspace() = default;
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // Uninitialised memory, aligned to a cache line, valid until release() to an earlier mark.
  void* take(std::size_t bytes);
  Mark mark() const;
  void release(Mark mark);

 private:
  Block head_{0, 0, nullptr};  // holds nothing: memory is asked for with the first take()
  Block* current_ = &head_;
};

}  // namespace condlr
