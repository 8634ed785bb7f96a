#include "cpu/memory.h"

#include <cstdint>
#include <new>
#include <vector>

#include "cpu/poison.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace resm::cpu {
namespace {

constexpr size_t kPage = 4096, kHugePage = size_t(2) << 20;

struct Block {
  void* data;
  size_t capacity;
};

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

#if defined(__linux__)
void unmap(void* data, size_t bytes) {
  if (bytes > 0) munmap(data, bytes);
}

void* map(size_t capacity) {
  void* whole = mmap(nullptr, capacity + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole == MAP_FAILED) throw std::bad_alloc();
  const auto begin = reinterpret_cast<uintptr_t>(whole), aligned = round_up(begin, kHugePage);
  unmap(whole, aligned - begin);
  unmap(reinterpret_cast<void*>(aligned + capacity), begin + kHugePage - aligned);
  void* data = reinterpret_cast<void*>(aligned);
  madvise(data, capacity, MADV_HUGEPAGE);  // a hint: where there are no such pages, small ones do
  return data;
}

// The system may drop the block's contents, and take its memory when it runs short.
void lend_to_system(const Block& block) { madvise(block.data, block.capacity, MADV_FREE); }
#else
void unmap(void* data, size_t) { ::operator delete(data, std::align_val_t(kPage)); }
void* map(size_t capacity) { return ::operator new(capacity, std::align_val_t(kPage)); }
void lend_to_system(const Block&) {}
#endif

// Blocks that are not in use, the oldest first. Never destroyed: tensors may outlive it at exit.
std::vector<Block>& unused() {
  static auto* blocks = new std::vector<Block>;
  return *blocks;
}

size_t unused_bytes() {
  size_t sum = 0;
  for (const Block& block : unused()) sum += block.capacity;
  return sum;
}

void drop_oldest() {
  const Block oldest = unused().front();
  unused().erase(unused().begin());
  permit(oldest.data, oldest.capacity);  // another mapping may lie there next
  unmap(oldest.data, oldest.capacity);
}

// The smallest unused block that is large enough, but not much larger, or a fresh one, for which others are dropped.
Block take(size_t bytes) {
  constexpr size_t kMostWaste = 4;
  const size_t capacity = round_up(bytes + kGuard, kPage);
  auto best = unused().end();
  for (auto block = unused().begin(); block != unused().end(); ++block)
    if (capacity <= block->capacity && block->capacity <= kMostWaste * capacity &&
        (best == unused().end() || block->capacity < best->capacity))
      best = block;
  if (best != unused().end()) {
    const Block reused = *best;
    unused().erase(best);
    return reused;
  }
  for (size_t dropped = 0; dropped < capacity && !unused().empty(); drop_oldest()) dropped += unused().front().capacity;
  return {map(capacity), capacity};
}

}  // namespace

Memory::Memory(size_t bytes) : bytes_(bytes) {
  const Block block = take(bytes);
  data_ = block.data;
  capacity_ = block.capacity;
  permit(data_, bytes);
  forbid(static_cast<char*>(data_) + bytes, capacity_ - bytes);
}

Memory::~Memory() {
  const Block block{data_, capacity_};
  forbid(data_, capacity_);
  unused().push_back(block);
  while (unused_bytes() > kMostKept) drop_oldest();
  if (!unused().empty() && unused().back().data == data_) lend_to_system(block);
}

}  // namespace resm::cpu
