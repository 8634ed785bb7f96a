// Work in fixed chunks of tensors: what a chunk holds never depends on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cpu/ops.h"
#include "cpu/threads.h"

namespace resm::cpu {

struct Chunk {
  int64_t group, begin, end;
};

inline void add_chunks(const Groups& groups, int64_t group, std::vector<Chunk>& chunks) {
  for (int64_t begin = 0; begin < groups.lengths[group]; begin += kChunk)
    chunks.push_back({group, begin, std::min(begin + kChunk, groups.lengths[group])});
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t blocks_for(int64_t elements) { return ceil_div(elements, kBlock); }

// Cache-line aligned scratch of whole blocks.
template <class C>
class Blocks {
 public:
  explicit Blocks(int64_t count)
      : data_(static_cast<C*>(::operator new(count * kBlock * sizeof(C), std::align_val_t(64)))) {}
  C* operator[](int64_t i) const { return data_.get() + i * kBlock; }

 private:
  struct Free {
    void operator()(C* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<C, Free> data_;
};

// Memory of the calling thread for at least `count` elements, of no particular values, until it asks again: fresh memory
// of this size would be mapped page by page in every call. What is large is not kept from call to call.
template <class C>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    constexpr int64_t kMostKept = (8 << 20) / sizeof(C);
    thread_local std::vector<C> kept;
    std::vector<C>& memory = count <= kMostKept ? kept : own_;
    if (static_cast<int64_t>(memory.size()) < count + kAlignment) memory.assign(count + kAlignment, C(0));
    const auto at = reinterpret_cast<uintptr_t>(memory.data());
    data_ = memory.data() + ((64 - at % 64) % 64) / sizeof(C);
  }
  C* data() const { return data_; }

 private:
  static constexpr int64_t kAlignment = 64 / sizeof(C);
  std::vector<C> own_;
  C* data_;
};

// Groups that sums over `pieces` are cut into: up to `most`, a power of two, of at least `fewest` pieces each. Even
// numbers of them serve threads evenly; they depend on nothing else, for the sums' bits depend on them.
inline int64_t groups_for(int64_t pieces, int64_t most, int64_t fewest) {
  int64_t groups = 1;
  while (groups < most && 2 * groups * fewest <= pieces) groups *= 2;
  return groups;
}

// Tasks of several threads that begin in order and add what they found in order.
class Turns {
 public:
  int64_t begin() { return begun_.fetch_add(1); }
  template <class Add>
  void when_due(int64_t task, Add add) {
    while (due_.load(std::memory_order_acquire) != task) std::this_thread::yield();
    add();
    due_.store(task + 1, std::memory_order_release);
  }

 private:
  std::atomic<int64_t> begun_{0}, due_{0};
};

// Calls visit(begin, n) for each block of a chunk.
template <class Visit>
void for_blocks(const Chunk& chunk, Visit visit) {
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock)
    visit(begin, static_cast<int>(std::min<int64_t>(kBlock, chunk.end - begin)));
}

}  // namespace resm::cpu
