// Work in chunks of tensors, whose bounds never depend on the number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cpu/ops.h"
#include "cpu/poison.h"
#include "cpu/threads.h"

namespace resm::cpu {

// Elements begin … end of the flattened tensors, all of one row.
struct Chunk {
  int64_t row, begin, end;
};

// Row by row, in order.
inline std::vector<Chunk> chunks_of(const Group& group) {
  std::vector<Chunk> chunks;
  for (int64_t row = 0; row < group.rows; ++row) {
    const int64_t end = (row + 1) * group.length;
    for (int64_t begin = row * group.length; begin < end; begin += kChunk)
      chunks.push_back({row, begin, std::min(begin + kChunk, end)});
  }
  return chunks;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t blocks_for(int64_t elements) { return ceil_div(elements, kBlock); }

// Cache-line aligned memory of whole blocks.
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

// Uninitialised memory of the calling thread for at least `count` elements, valid until the thread asks again. Up to
// 8 MiB are reused from call to call, because fresh memory of this size would be mapped page by page in every call.
template <class C>
class ThreadMemory {
 public:
  explicit ThreadMemory(int64_t count) {
    constexpr int64_t kMostKept = (8 << 20) / sizeof(C);
    thread_local std::vector<C> reused;
    std::vector<C>& memory = count <= kMostKept ? reused : large_;
    permit(memory.data(), memory.size() * sizeof(C));
    if (static_cast<int64_t>(memory.size()) < count + kAlignment) memory.assign(count + kAlignment, C(0));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    data_ = memory.data() + ((64 - address % 64) % 64) / sizeof(C);
    forbid(data_ + count, (memory.data() + memory.size() - data_ - count) * sizeof(C));
  }
  C* data() const { return data_; }

 private:
  static constexpr int64_t kAlignment = 64 / sizeof(C);
  std::vector<C> large_;
  C* data_;
};

// How many parts a sum over `pieces` is cut into: a power of two up to `most`, so that each part has at least `fewest`
// pieces. Even numbers of parts serve threads evenly. Nothing else may matter here, for the sum's bits depend on it.
inline int64_t parts_for(int64_t pieces, int64_t most, int64_t fewest) {
  int64_t parts = 1;
  while (parts < most && 2 * parts * fewest <= pieces) parts *= 2;
  return parts;
}

// Tasks of several threads that begin in order and add their results in order.
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
