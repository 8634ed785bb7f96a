// random_mask on the GPU: Philox in registers, a thread's eight counters at a time make four bytes of a mask.
//
// A run's 32 counters hold the random words of its 128 elements, counter c those of the elements c, 32 + c, 64 + c and
// 96 + c: eight neighbouring counters decide on eight neighbours in each quarter of the run. Ranks are given.
#include <type_traits>

#include "common/masks.h"
#include "cuda/ops.h"
#include "cuda/table.h"

namespace resm::cuda {
namespace {

constexpr int kCounters = 8;                      // of a thread at a time
constexpr int kParts = kRunCounters / kCounters;  // threads that share a run
constexpr int kPartBytes = kRunBytes / kParts;    // of a mask that a thread makes at a time
constexpr int kWords = 4;                         // of a counter
constexpr int kWordBytes = kRunCounters / 8;      // of a mask, for one word of a run's counters
static_assert(kCounters == 8 && kPartBytes == kWords, "a thread makes one byte of each word");

// Rank: the type of the doubled ranks; void where one limit is for all.
template <class Rank>
struct Draw {
  static constexpr int kThreads = 256, kResident = 4;
  struct Shared {};

  Table table;  // of the masks' bytes
  int64_t length;
  uint64_t seed;
  uint32_t expert;
  MaskLaw law;

  RESM_DEVICE uint64_t limit([[maybe_unused]] const Table::Chunk& chunk, [[maybe_unused]] int64_t i) const {
    if constexpr (std::is_void<Rank>::value)
      return law.limit(0);
    else
      return law.limit(constant(reinterpret_cast<const Rank*>(constant(chunk.addresses + 1)) + i));
  }

  // Part number `part`, counted over all runs.
  RESM_DEVICE void draw(const Table::Chunk& chunk, int64_t part) const {
    const int64_t run = part / kParts, place = part % kParts;
    uint32_t bits[kWords] = {};
    RESM_UNROLL_TWICE  // two hide each other's latency; eight do not fit the registers
    for (int j = 0; j < kCounters; ++j) {
      const uint64_t counter = static_cast<uint64_t>(part) * kCounters + j;
      uint64_t x[kWords] = {counter, counter >> 32, expert, static_cast<uint64_t>(RandomStream::mask)};
      philox(x, seed);
      RESM_UNROLL
      for (int w = 0; w < kWords; ++w) {
        const int64_t i = run * kRun + w * kRunCounters + place * kCounters + j;
        // Nothing lies past the tensor.
        if (i < length) bits[w] |= (uint32_t(x[w]) < limit(chunk, i) ? 1u : 0u) << j;
      }
    }
    auto* mask = reinterpret_cast<uint8_t*>(constant(chunk.addresses)) + run * kRunBytes + place;
    RESM_UNROLL
    for (int w = 0; w < kWords; ++w) mask[w * kWordBytes] = static_cast<uint8_t>(bits[w]);
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    block.each([&](int thread) {
      for (int64_t part = chunk.begin / kPartBytes + thread; part < chunk.end / kPartBytes; part += kThreads)
        draw(chunk, part);
    });
  }
};

}  // namespace
}  // namespace resm::cuda

const char* random_mask_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                             int64_t length, int64_t rank_bytes, int64_t seed, int64_t expert, int64_t lowest,
                             int64_t step, int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  const Table masks{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps),
                    rank_bytes == 0 ? 1 : 2, chunk};
  const MaskLaw law{static_cast<uint64_t>(lowest), static_cast<uint64_t>(step)};
  const auto draw = [&](auto rank) {
    const Draw<std::remove_pointer_t<decltype(rank)>> kernel{masks, length, static_cast<uint64_t>(seed),
                                                             static_cast<uint32_t>(expert), law};
    return launch("random_mask", kernel, blocks, stream);
  };
  switch (rank_bytes) {
    case 4: return draw(static_cast<uint32_t*>(nullptr));
    case 8: return draw(static_cast<uint64_t*>(nullptr));
    default: return draw(static_cast<void*>(nullptr));
  }
}
