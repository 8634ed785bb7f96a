// Memory for large outputs. Fresh pages cost more than a merge's arithmetic: the system clears each when it is first
// written, and takes longer for it than the kernel for its element-wise work. So what an output lay in is kept for the
// next, and what is fresh begins at a 2 MiB boundary and asks for pages of that size: 512 times fewer faults, and
// threads that work on runs of 2 MiB do not wait for one another's.
#pragma once

#include <cstddef>

namespace resm::cpu {

// A block of at least `bytes`, of no particular contents, until it is destroyed. Mapped blocks, those kept for the next
// included, are at no time more than have been in use at once; kMostKept of them outlast the last use, and those the
// system may take back when it runs short. Not thread-safe: Python's lock guards it.
class Memory {
 public:
  static constexpr size_t kMostKept = size_t(256) << 20;

  explicit Memory(size_t bytes);
  ~Memory();
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  void* data_;
  size_t bytes_, capacity_;
};

}  // namespace resm::cpu
