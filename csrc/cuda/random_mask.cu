// random_mask on the GPU: Philox in registers. A thread's eight counters at a time make four bytes of a mask.
//
// A run's 32 counters hold the random words of its 128 elements: counter c those of the elements c, 32 + c, 64 + c and
// 96 + c. Eight neighbouring counters decide on eight neighbours in each quarter of the run. The caller computes ranks.
#include <type_traits>

#include "cuda/elements.h"

namespace resm::cuda {
namespace {

constexpr int kCounters = 8;                      // counters that a thread uses at a time
constexpr int kParts = kRunCounters / kCounters;  // threads that share a run
constexpr int kPartBytes = kRunBytes / kParts;    // bytes of a mask that a thread makes at a time
constexpr int kWords = 4;                         // random words of a counter
constexpr int kWordBytes = kRunCounters / 8;      // bytes of a mask that come from one word of a run's counters
constexpr int kThreads = 256;                     // threads of a block, each of which makes one part of a mask
static_assert(kCounters == 8 && kPartBytes == kWords, "a thread makes one byte of each word");

// Rank: the type of the doubled ranks; void where one limit holds for all elements.
template <class Rank>
struct Draw {
  static constexpr int kThreads = cuda::kThreads, kResident = 4;
  struct Shared {};

  RandomMaskOptions options;
  const Rank* ranks;
  uint8_t* mask;
  int64_t parts;

  RESM_DEVICE uint64_t limit([[maybe_unused]] int64_t i) const {
    if constexpr (std::is_void<Rank>::value)
      return options.law.limit(0);
    else
      return options.law.limit(constant(ranks + i));
  }

  // Part number `part`, counted over all runs.
  RESM_DEVICE void draw(int64_t part) const {
    const int64_t run = part / kParts, position = part % kParts;
    uint32_t bits[kWords] = {};
    RESM_UNROLL_TWICE  // two counters hide each other's latency; eight do not fit the registers
        for (int j = 0; j < kCounters; ++j) {
      const uint64_t counter = static_cast<uint64_t>(part) * kCounters + j;
      uint64_t x[kWords] = {counter, counter >> 32, options.expert, static_cast<uint64_t>(RandomStream::mask)};
      philox(x, options.seed);
      RESM_UNROLL
      for (int w = 0; w < kWords; ++w) {
        const int64_t i = run * kRun + w * kRunCounters + position * kCounters + j;
        // Bits past the tensor are 0.
        if (i < options.length) bits[w] |= (uint32_t(x[w]) < limit(i) ? 1u : 0u) << j;
      }
    }
    RESM_UNROLL
    for (int w = 0; w < kWords; ++w) mask[run * kRunBytes + position + w * kWordBytes] = static_cast<uint8_t>(bits[w]);
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    block.each([&](int thread) {
      const int64_t part = block.index() * kThreads + thread;
      if (part < parts) draw(part);
    });
  }
};

}  // namespace

void random_mask(const RandomMaskOptions& options, const Ranks& ranks, uint8_t* mask, Stream stream) {
  const int64_t parts = mask_bytes(options.length) / kPartBytes;
  const auto draw = [&](auto rank) {
    using Rank = std::remove_pointer_t<decltype(rank)>;
    const Draw<Rank> kernel{options, reinterpret_cast<const Rank*>(ranks.doubled), mask, parts};
    launch("random_mask", kernel, (parts + kThreads - 1) / kThreads, stream);
  };
  if (ranks.doubled == nullptr) return draw(static_cast<void*>(nullptr));
  return ranks.bytes == 4 ? draw(static_cast<uint32_t*>(nullptr)) : draw(static_cast<uint64_t*>(nullptr));
}

}  // namespace resm::cuda
