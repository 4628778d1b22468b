// Scratch memory that a caller passes to the core: a reusable stack of blocks that grows on demand.
#pragma once

#include <cstddef>

namespace condlr {

// Defined in workspace.cpp, so that none of it is compiled for a particular instruction set.
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

  // Uninitialized memory, aligned to a cache line, valid until release() to an earlier mark.
  void* take(std::size_t bytes);
  Mark mark() const;
  void release(Mark mark);
  // Releases everything, and gives memory beyond 64 MiB back to the system.
  void shrink();

 private:
  void free_after(Block* last);

  Block head_{0, 0, nullptr};  // empty: the first take() allocates
  Block* current_ = &head_;
  Workspace* next_ = nullptr;  // in a list of idle ones
  friend class Workspaces;
};

// Workspaces for one call, one per thread, from a pool of the process: the next call reuses their memory, so
// that only the first one allocates. The pool keeps at most 64 MiB for each thread of a call.
class Workspaces {
 public:
  Workspaces() = default;
  ~Workspaces();
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  // A workspace for the calling thread until the lease ends; memory taken from it stays valid until the call
  // ends.
  class Lease {
   public:
    explicit Lease(Workspaces& from);
    ~Lease();
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    Workspace& workspace() const { return *workspace_; }

   private:
    Workspaces& from_;
    Workspace* workspace_;
  };

 private:
  Workspace* idle_ = nullptr;
};

}  // namespace condlr
