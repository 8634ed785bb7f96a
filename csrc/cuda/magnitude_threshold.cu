// magnitude_threshold on the GPU: the exact k-th largest |d|, reading the inputs about once.
//
// |d| is compared by its key, an integer in the same order (common/key.h). Of each tensor and expert:
//
// 1. Sample: a block draws n keys, one at a hashed place in each of n equal parts of the tensor (all of them where it
//    has no more: then the answer is among them), and takes two of their order statistics as a bracket.
// 2. Bracket: one read of the tensor counts the keys above the bracket, at its upper and at its lower end (where the
//    many ties of half-precision weights mostly are), and collects those strictly between in a buffer.
// 3. Decide: the counts say where the answer lies: at an end; in the buffer; or, if the bracket missed it or the buffer
//    overflowed, anywhere in the tensor.
// 4. Count, Choose: digit by digit of eleven bits, from histograms of the buffer, or of the whole tensor. What is
//    decided already returns at once; the host waits for nothing.
//
// The number found depends on neither the sample nor the order of the buffer. Sizes, for a share p = k/N:
// - The rank of the answer in the sample, how many of its keys are above, is a sum of independent trials, one for each
//   part; its mean is n·p and its variance at most n·p(1 − p). The bracket lies z standard deviations on either side,
//   and a few more ranks where the share is so small that the rank is no normal variable.
// - A collected key costs about 14 bytes of traffic (written once, read two or three times), and 2·z·sqrt(p(1 − p)/n)
//   of all keys are collected; a miss costs three reads of the tensor, about 8 bytes a key of bf16, and has the
//   probability that a normal variable is off by more than z. With n = 8192, p = 0.2 the sum of both is least at
//   z = 2.8; z = 3 misses one time in 370.
// - n is what 32 KiB of shared memory hold: 8192 keys, 4096 in float64.
// - The keys between two sampled ranks 2m apart are a share of 2m/n of all, give or take sqrt(2m)/n: at the most
//   (p = 1/2) 3.4 % ± 0.2 %, in float64 4.8 % ± 0.3 %. Buffers have room for 1/16, 6.25 %.
#include <cmath>

#include "cuda/ops.h"
#include "cuda/select.h"

namespace resm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSampleBytes = 32768;
constexpr double kDeviations = 3;  // z
constexpr int kMoreRanks = 3;
constexpr int kBufferShare = 16;

template <class C>
constexpr int kSample = kSampleBytes / sizeof(C);

// What all kernels know.
template <class C>
struct Problem {
  Table table;
  Dtypes<C, kMixed> dtypes;
  int32_t n_experts;
  const int64_t* k;       // (L, T)
  Selection* selections;  // (L, T)
  int64_t* frequencies;   // (L, T, kDigits), zeros but between Count and Choose
  double* thresholds;     // (L, T)
  int64_t* nonfinite;     // (L, T)

  RESM_DEVICE static int64_t capacity(int64_t length) { return length / kBufferShare; }
  RESM_DEVICE Key<C>* buffer(const int64_t* addresses, int64_t length, int t) const {
    return reinterpret_cast<Key<C>*>(addresses[1 + n_experts]) + t * capacity(length);
  }
  // A tensor that is sampled whole has its answer at once.
  RESM_DEVICE static bool is_small(int64_t length) { return length <= kSample<C>; }
};

template <class C>
RESM_DEVICE double value_of(Key<C> key) {
  return static_cast<double>(bits_as<C>(key));
}

template <class C>
struct Sample : Problem<C> {
  using P = Problem<C>;
  static constexpr int kThreads = 1024, kResident = 1;  // one block a tensor: as many reads at once as can be
  struct Shared {
    Key<C> keys[kSample<C>];
    uint32_t frequencies[kDigits];
    DigitSearch<kThreads> search;
  };

  // The rank-th largest of `count` keys in shared memory, from 1.
  RESM_DEVICE Key<C> select(const Block<kThreads>& block, Shared& shared, int count, int64_t rank) const {
    Key<C> prefix = 0;
    for (int number = 0; number * kDigitBits < kKeyBits<C>; ++number) {
      const Digit digit = Digit::of(kKeyBits<C>, number);
      block.each([&](int thread) {
        for (int i = thread; i < kDigits; i += kThreads) shared.frequencies[i] = 0;
      });
      block.each([&](int thread) {
        for (int i = thread; i < count; i += kThreads) {
          const Key<C> rest = shared.keys[i] >> digit.low;
          if (rest >> digit.bits == prefix)
            atomic_add(&shared.frequencies[rest & ((Key<C>(1) << digit.bits) - 1)], uint32_t(1));
        }
      });
      find_digit(block, shared.frequencies, rank, shared.search);
      prefix = prefix << digit.bits | static_cast<Key<C>>(shared.search.digit);
      rank = shared.search.rank;
    }
    return prefix;
  }

  // The place of the i-th of `count` samples: somewhere in the i-th of as many parts, all where there are no more.
  RESM_DEVICE static int64_t place(int64_t i, int64_t count, int64_t length) {
    const int64_t whole = length / count, rest = length % count;
    const int64_t begin = i * whole + (i < rest ? i : rest), size = whole + (i < rest ? 1 : 0);
    return begin + static_cast<int64_t>(hash(0x9e3779b97f4a7c15u * uint64_t(i + 1)) % uint64_t(size));
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const int64_t tensor = block.index() / P::n_experts, length = P::table.length(tensor);
    const int t = static_cast<int>(block.index() % P::n_experts);
    const int64_t* addresses = P::table.addresses(tensor);
    const Array base{reinterpret_cast<char*>(addresses[0]), P::dtypes.base()};
    const Array expert{reinterpret_cast<char*>(addresses[1 + t]), P::dtypes.expert()};
    const bool small = P::is_small(length);
    const int count = small ? static_cast<int>(length) : kSample<C>;
    PerThread<int64_t, kThreads> nonfinite;
    block.each([&](int thread) {
      for (int i = thread; i < count; i += kThreads) {
        const int64_t at = place(i, count, length);
        const Key<C> key = key_of(load_one<C>(expert, at) - load_one<C>(base, at));
        shared.keys[i] = key;
        nonfinite[thread] += key >= kInfinityKey<C> ? 1 : 0;
      }
    });
    const int64_t bad = sum_of(block, nonfinite, shared.search.sums), k = P::k[block.index()];
    Selection found = {};
    if (small) {
      const Key<C> answer = select(block, shared, count, k);
      block.each([&](int thread) {
        if (thread != 0) return;
        P::nonfinite[block.index()] = bad;
        P::thresholds[block.index()] = k == 0 ? value_of<C>(kInfinityKey<C>) : value_of<C>(answer);
      });
    } else {
      const double share = static_cast<double>(k) / static_cast<double>(length);
      const double margin = kDeviations * sqrt(count * share * (1 - share)) + kMoreRanks;
      const auto upper = static_cast<int64_t>(share * count - margin);
      const auto lower = static_cast<int64_t>(share * count + margin) + 1;
      // Past the ends of the sample the bracket is open.
      found.high = upper >= 1 ? select(block, shared, count, upper) : kLargestKey<C>;
      found.low = lower <= count ? select(block, shared, count, lower) : 0;
    }
    block.each([&](int thread) {
      if (thread == 0) P::selections[block.index()] = found;
    });
  }
};

template <class Kind>
struct Bracket : Problem<typename Kind::Compute> {
  using C = typename Kind::Compute;
  using P = Problem<C>;
  static constexpr int kThreads = cuda::kThreads, kResident = 3;
  static constexpr int kStage = 2048;  // an eighth of a chunk; what does not fit goes to the buffer at once
  struct Shared {
    Key<C> keys[kStage];
    uint32_t staged;
    uint64_t begin;
    int64_t sums[kWarps];
  };
  Kind kind;

  // How many keys lie below the bracket's ends, and up to them.
  struct Counts {
    int32_t below_low = 0, to_low = 0, below_high = 0, to_high = 0, nonfinite = 0;
  };

  // 1 if key < bound, else 0: the sign of the difference, as keys have one bit less than their words. Fewer
  // instructions than a comparison.
  RESM_DEVICE static int32_t is_below(Key<C> key, Key<C> bound) {
    return static_cast<int32_t>(static_cast<Key<C>>(key - bound) >> kKeyBits<C>);
  }

  template <int kCount>
  RESM_DEVICE void take(const C (&delta)[kCount], Key<C> low, Key<C> high, Counts& counts, Shared& shared,
                        Selection& selection, Key<C>* buffer, int64_t capacity) const {
    int32_t to_low = 0, below_high = 0;
    for (int j = 0; j < kCount; ++j) {
      const Key<C> key = key_of(delta[j]);
      counts.below_low += is_below(key, low);
      to_low += is_below(key, low + 1);
      below_high += is_below(key, high);
      counts.to_high += is_below(key, high + 1);
    }
    counts.to_low += to_low;
    counts.below_high += below_high;
    counts.nonfinite += count_nonfinite(delta);
    const int32_t inside = below_high - to_low;  // less than 0 where both ends are one key
    if (inside <= 0) return;
    uint32_t slot = atomic_add(&shared.staged, uint32_t(inside));
    const auto collect = [&](auto put) {
      for (int j = 0; j < kCount; ++j) {
        const Key<C> key = key_of(delta[j]);
        if (low < key && key < high) put(slot++, key);
      }
    };
    if (slot + inside <= kStage) return collect([&](uint32_t at, Key<C> key) { shared.keys[at] = key; });
    collect([&](uint32_t at, Key<C> key) {
      if (at < kStage) {
        shared.keys[at] = key;
        return;
      }
      const int64_t place = atomic_add(&selection.between, int64_t(1));
      if (place < capacity) buffer[place] = key;
    });
  }

  template <class Get>
  RESM_DEVICE void add(const Block<kThreads>& block, Shared& shared, int64_t* to, Get get) const {
    PerThread<int64_t, kThreads> own;
    block.each([&](int thread) { own[thread] = get(thread); });
    const int64_t total = sum_of(block, own, shared.sums);
    block.each([&](int thread) {
      if (thread == 0 && total != 0) atomic_add(to, total);
    });
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Table::Chunk chunk = P::table.chunk_of(block.index());
    if (P::is_small(chunk.length)) return;
    const int64_t wide_end = Kind::kWide ? chunk.wide_end(1 + P::n_experts) : chunk.begin;
    const int64_t capacity = P::capacity(chunk.length);
    const Array base = chunk.array(0, kind.base());
    for (int t = 0; t < P::n_experts; ++t) {
      const Array expert = chunk.array(1 + t, kind.expert());
      const int64_t place = chunk.tensor * P::n_experts + t;
      Selection& selection = P::selections[place];
      Key<C>* buffer = P::buffer(chunk.addresses, chunk.length, t);
      const auto low = static_cast<Key<C>>(selection.low), high = static_cast<Key<C>>(selection.high);
      block.each([&](int thread) {
        if (thread == 0) shared.staged = 0;
      });
      PerThread<Counts, kThreads> counts;
      block.each([&](int thread) {
        for_deltas<Kind, kThreads>(chunk, wide_end, base, expert, thread, [&](const auto& delta, int64_t) {
          take(delta, low, high, counts[thread], shared, selection, buffer, capacity);
        });
      });
      const int64_t staged = shared.staged < kStage ? shared.staged : kStage;
      block.each([&](int thread) {
        if (thread == 0 && staged > 0) shared.begin = atomic_add(&selection.between, staged);
      });
      block.each([&](int thread) {
        for (int64_t i = thread; i < staged && int64_t(shared.begin) + i < capacity; i += kThreads)
          buffer[shared.begin + i] = shared.keys[i];
      });
      add(block, shared, &selection.below_low, [&](int thread) { return counts[thread].below_low; });
      add(block, shared, &selection.to_low, [&](int thread) { return counts[thread].to_low; });
      add(block, shared, &selection.below_high, [&](int thread) { return counts[thread].below_high; });
      add(block, shared, &selection.to_high, [&](int thread) { return counts[thread].to_high; });
      add(block, shared, P::nonfinite + place, [&](int thread) { return counts[thread].nonfinite; });
    }
  }
};

// A thread for each tensor and expert.
template <class C>
struct Decide : Problem<C> {
  using P = Problem<C>;
  static constexpr int kThreads = cuda::kThreads, kResident = 1;
  struct Shared {};

  RESM_DEVICE void decide(int64_t place) const {
    const int64_t length = P::table.length(place / P::n_experts), k = P::k[place];
    if (P::is_small(length)) return;
    Selection& s = P::selections[place];
    const int64_t above = length - s.to_high, from_high = length - s.below_high;
    const int64_t above_low = length - s.to_low, from_low = length - s.below_low;
    s.source = Source::none;
    if (k == 0) {
      P::thresholds[place] = value_of<C>(kInfinityKey<C>);
    } else if (above < k && k <= from_high) {
      P::thresholds[place] = value_of<C>(static_cast<Key<C>>(s.high));
    } else if (above_low < k && k <= from_low) {
      P::thresholds[place] = value_of<C>(static_cast<Key<C>>(s.low));
    } else if (from_high < k && k <= above_low && s.between <= P::capacity(length)) {
      s.source = Source::buffer;
      s.rank = k - from_high;
    } else {
      s.source = Source::tensor;
      s.rank = k;
    }
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    block.each([&](int thread) {
      const int64_t place = block.index() * kThreads + thread;
      if (place < P::table.n_tensors * P::n_experts) decide(place);
    });
  }
};

template <class C>
struct Count : Problem<C> {
  using P = Problem<C>;
  static constexpr int kThreads = cuda::kThreads, kResident = 3;
  struct Shared {
    uint32_t frequencies[kDigits];
  };

  int32_t number;  // of the digit

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Table::Chunk chunk = P::table.chunk_of(block.index());
    if (P::is_small(chunk.length)) return;
    const Array base = chunk.array(0, P::dtypes.base());
    for (int t = 0; t < P::n_experts; ++t) {
      const int64_t place = chunk.tensor * P::n_experts + t;
      const Selection& s = P::selections[place];
      const Digit digit = Digit::of(bits_of<C>(s), number);
      const int64_t keys = s.source == Source::buffer ? s.between : chunk.length;
      if (s.source == Source::none || digit.bits == 0 || chunk.begin >= keys) continue;
      const int64_t end = chunk.begin + P::table.chunk < keys ? chunk.begin + P::table.chunk : keys;
      const Source source = s.source;
      const auto prefix = static_cast<Key<C>>(s.prefix);
      const Key<C> origin = origin_of<C>(s), *buffer = P::buffer(chunk.addresses, chunk.length, t);
      const Array expert = chunk.array(1 + t, P::dtypes.expert());
      block.each([&](int thread) {
        for (int i = thread; i < kDigits; i += kThreads) shared.frequencies[i] = 0;
      });
      block.each([&](int thread) {
        const auto count = [&](Key<C> key) {
          const Key<C> rest = (key - origin) >> digit.low;
          if (rest >> digit.bits == prefix)
            atomic_add(&shared.frequencies[rest & ((Key<C>(1) << digit.bits) - 1)], uint32_t(1));
        };
        if (source == Source::buffer) {
          for (int64_t i = chunk.begin + thread; i < end; i += kThreads) count(buffer[i]);
          return;
        }
        for_deltas<Dtypes<C, kMixed>, kThreads>(chunk, chunk.begin, base, expert, thread,
                                                [&](const auto& delta, int64_t) { count(key_of(delta[0])); });
      });
      block.each([&](int thread) {
        for (int i = thread; i < kDigits; i += kThreads)
          if (shared.frequencies[i] != 0)
            atomic_add(P::frequencies + place * kDigits + i, int64_t(shared.frequencies[i]));
      });
    }
  }
};

// A block for each tensor and expert.
template <class C>
struct Choose : Problem<C> {
  using P = Problem<C>;
  static constexpr int kThreads = cuda::kThreads, kResident = 1;
  struct Shared {
    DigitSearch<kThreads> search;
  };

  int32_t number;

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    Selection& s = P::selections[block.index()];
    if (s.source == Source::none) return;
    const int bits = bits_of<C>(s);
    const Digit digit = Digit::of(bits, number);
    if (digit.bits == 0) return;
    int64_t* frequencies = P::frequencies + block.index() * kDigits;
    find_digit(block, frequencies, s.rank, shared.search);
    block.each([&](int thread) {
      for (int i = thread; i < kDigits; i += kThreads) frequencies[i] = 0;
      if (thread != 0) return;
      s.prefix = s.prefix << digit.bits | uint64_t(shared.search.digit);
      s.rank = shared.search.rank;
      if (digit.low == 0)
        P::thresholds[block.index()] = value_of<C>(origin_of<C>(s) + static_cast<Key<C>>(s.prefix));
    });
  }
};

}  // namespace
}  // namespace resm::cuda

const char* magnitude_threshold_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                                     int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double,
                                     int64_t longest, int64_t k, int64_t selections, int64_t frequencies,
                                     int64_t thresholds, int64_t nonfinite, int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  constexpr const char* kName = "magnitude_threshold";
  const auto experts = static_cast<int32_t>(n_experts);
  const Table tensors{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps), 2 + experts,
                      chunk};
  return with_dtypes(base_dtype, expert_dtype, in_double != 0, [&](auto dtypes) -> const char* {
    using Kind = decltype(dtypes);
    using C = typename Kind::Compute;
    const Problem<C> problem{tensors,
                             {dtypes.base_code, dtypes.expert_code},
                             experts,
                             reinterpret_cast<const int64_t*>(k),
                             reinterpret_cast<Selection*>(selections),
                             reinterpret_cast<int64_t*>(frequencies),
                             reinterpret_cast<double*>(thresholds),
                             reinterpret_cast<int64_t*>(nonfinite)};
    const int64_t places = n_tensors * n_experts;
    const char* error = launch(kName, Sample<C>{problem}, places, stream);
    if (error != nullptr || longest <= kSample<C>) return error;
    error = launch(kName, Bracket<Kind>{problem, dtypes}, blocks, stream);
    if (error == nullptr) error = launch(kName, Decide<C>{problem}, (places + kThreads - 1) / kThreads, stream);
    for (int number = 0; error == nullptr && number * kDigitBits < kKeyBits<C>; ++number) {
      error = launch(kName, Count<C>{problem, number}, blocks, stream);
      if (error == nullptr) error = launch(kName, Choose<C>{problem, number}, places, stream);
    }
    return error;
  });
}
