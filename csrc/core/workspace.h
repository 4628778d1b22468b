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

  // Uninitialized memory, aligned to a cache line, valid until release() to an earlier mark.
  void* take(std::size_t bytes);
  Mark mark() const;
  void release(Mark mark);

 private:
  Block head_{0, 0, nullptr};  // holds nothing: memory is asked for with the first take()
  Block* current_ = &head_;
  Workspace* next_ = nullptr;  // in a list of idle ones
  friend class Workspaces;
};

// Workspaces for one call, a thread each, from a pool of the process: their memory is used again by the next
// call, so that only the first one allocates.
class Workspaces {
 public:
  Workspaces() = default;
  ~Workspaces();
  Workspaces(const Workspaces&) = delete;
  Workspaces& operator=(const Workspaces&) = delete;

  // One for the calling thread until the lease ends; what was taken from it stays until the call ends.
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
