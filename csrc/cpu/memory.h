// Memory for large outputs. Fresh pages cost more than a merge's arithmetic: the system clears each page when it is first
// written, which takes longer than the kernel's element-wise work. So the next output reuses the memory of a freed one.
// Fresh memory begins at a 2 MiB boundary and asks for pages of that size: there are 512 times fewer page faults, and
// threads that work on runs of 2 MiB do not wait for each other's faults.
#pragma once

#include <cstddef>

namespace resm::cpu {

// An uninitialised block of at least `bytes`. All mapped blocks together, unused ones included, are never larger than the
// blocks that were in use at the same time. At most kMostKept bytes remain mapped after use, and the system may take them
// back when memory runs short. This class is not thread-safe: Python's lock guards it.
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
