// Work in fixed chunks of tensors: what a chunk holds never depends on the number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <vector>

#include "cpu/ops.h"

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

// Calls work(i, scratch) for every i below n, on `threads` threads with one `Scratch(make())` each. An exception (no
// memory) must not leave a parallel region: the first one is kept and thrown at its end.
template <class Make, class Work>
void parallel_for(int64_t n, int threads, Make make, Work work) {
  std::exception_ptr failure;
  // Runs of chunks, so that threads seldom touch the same (huge) page of an output for the first time together.
  const auto grain = static_cast<int>(std::clamp<int64_t>(n / (int64_t(8) * threads), 1, 16));
#pragma omp parallel num_threads(threads) if (threads > 1 && n > 1)
  {
    std::exception_ptr own;
    try {
      auto scratch = make();
#pragma omp for schedule(dynamic, grain)
      for (int64_t i = 0; i < n; ++i) {
        try {
          work(i, scratch);
        } catch (...) {
          own = std::current_exception();
        }
      }
    } catch (...) {
      own = std::current_exception();
    }
    if (own) {
#pragma omp critical(resm_failure)
      failure = own;
    }
  }
  if (failure) std::rethrow_exception(failure);
}

}  // namespace resm::cpu
