// Work in fixed chunks of tensors: what a chunk holds never depends on the number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
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

// Calls visit(begin, n) for each block of a chunk.
template <class Visit>
void for_blocks(const Chunk& chunk, Visit visit) {
  for (int64_t begin = chunk.begin; begin < chunk.end; begin += kBlock)
    visit(begin, static_cast<int>(std::min<int64_t>(kBlock, chunk.end - begin)));
}

}  // namespace resm::cpu
