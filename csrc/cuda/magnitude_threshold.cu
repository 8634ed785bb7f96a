// magnitude_threshold on the GPU: the exact k-th largest |d|, reading the inputs about once.
//
// |d| is compared by its key, an integer in the same order (common/key.h). For each expert:
//
// 1. Sample: a block draws n keys, one at a hashed position in each of n equal parts of the tensor, and takes two of
//    their order statistics as a bracket. A tensor of at most n elements is sampled whole and has its answer now.
// 2. Bracket: one read of the tensor counts the keys above the bracket, at its upper and at its lower end (where most of
//    the many ties of half-precision weights are), and collects the keys strictly between the ends in a buffer.
// 3. Decide: the counts say where the answer lies: at an end; in the buffer; or, if the bracket missed it or the buffer
//    overflowed, anywhere in the tensor.
// 4. Count, Choose: the answer is found digit by digit of eleven bits, from histograms of the buffer or of the whole
//    tensor. Blocks of experts whose answer is known return at once; the host waits for nothing.
//
// The answer depends on neither the sample nor the order of the buffer. Sizes, for a share p = k/N:
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

// The arguments of all kernels.
template <class C>
struct Problem {
  Group group;
  const int64_t* k;       // (T,)
  Selection* selections;  // (T,)
  int64_t* frequencies;   // (T, kDigits), zeros except between Count and Choose
  Key<C>* buffers;        // (T, capacity)
  ThresholdResult result;

  RESM_DEVICE int64_t capacity() const { return group.length / kBufferShare; }
  RESM_DEVICE Key<C>* buffer(int t) const { return buffers + t * capacity(); }
};

template <class C>
RESM_DEVICE double value_of(Key<C> key) {
  return static_cast<double>(bits_as<C>(key));
}

template <class C>
struct Sample : Problem<C> {
  using P = Problem<C>;
  static constexpr int kThreads = 1024, kResident = 1;  // one block an expert: as many reads at once as possible
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

  // The position of the i-th of `count` samples, in the i-th of as many parts; every element where count = length.
  RESM_DEVICE static int64_t position(int64_t i, int64_t count, int64_t length) {
    const int64_t whole = length / count, rest = length % count;
    const int64_t begin = i * whole + (i < rest ? i : rest), size = whole + (i < rest ? 1 : 0);
    return begin + static_cast<int64_t>(hash(0x9e3779b97f4a7c15u * uint64_t(i + 1)) % uint64_t(size));
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    using Kind = Dtypes<C, kMixed>;
    const int64_t length = P::group.length;
    const auto t = static_cast<int>(block.index());
    const Array base = Kind::base(P::group), expert = Kind::expert(P::group, t);
    const bool small = length <= kSample<C>;
    const int count = small ? static_cast<int>(length) : kSample<C>;
    PerThread<int64_t, kThreads> nonfinite;
    block.each([&](int thread) {
      for (int i = thread; i < count; i += kThreads) {
        const int64_t sample = position(i, count, length);
        const Key<C> key = key_of(load_one<C>(expert, sample) - load_one<C>(base, sample));
        shared.keys[i] = key;
        nonfinite[thread] += key >= kInfinityKey<C> ? 1 : 0;
      }
    });
    const int64_t bad = sum_of(block, nonfinite, shared.search.sums), k = P::k[t];
    Selection selection = {};
    if (small) {
      const Key<C> answer = select(block, shared, count, k);
      block.each([&](int thread) {
        if (thread != 0) return;
        P::result.nonfinite[t] = bad;
        P::result.thresholds[t] = k == 0 ? value_of<C>(kInfinityKey<C>) : value_of<C>(answer);
      });
    } else {
      const double share = static_cast<double>(k) / static_cast<double>(length);
      const double margin = kDeviations * sqrt(count * share * (1 - share)) + kMoreRanks;
      const auto upper = static_cast<int64_t>(share * count - margin);
      const auto lower = static_cast<int64_t>(share * count + margin) + 1;
      // Past the ends of the sample the bracket is open.
      selection.high = upper >= 1 ? select(block, shared, count, upper) : kLargestKey<C>;
      selection.low = lower <= count ? select(block, shared, count, lower) : 0;
    }
    block.each([&](int thread) {
      if (thread == 0) P::selections[t] = selection;
    });
  }
};

template <class Kind>
struct Bracket : Problem<typename Kind::Compute> {
  using C = typename Kind::Compute;
  using P = Problem<C>;
  static constexpr int kThreads = cuda::kThreads, kResident = 3;
  static constexpr int kStage = 2048;  // an eighth of a chunk; further keys go to the buffer at once
  struct Shared {
    Key<C> keys[kStage];
    uint32_t staged;
    uint64_t begin;
    int64_t sums[kWarps];
  };

  // How many keys lie below the bracket's ends, and how many are at most as large as them.
  struct Counts {
    int32_t below_low = 0, to_low = 0, below_high = 0, to_high = 0, nonfinite = 0;
  };

  // 1 if key < bound, else 0: the sign of the difference, as keys have one bit less than their words. This takes fewer
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
    if (slot + inside <= kStage) return collect([&](uint32_t staged, Key<C> key) { shared.keys[staged] = key; });
    collect([&](uint32_t staged, Key<C> key) {
      if (staged < kStage) {
        shared.keys[staged] = key;
        return;
      }
      const int64_t position = atomic_add(&selection.between, int64_t(1));
      if (position < capacity) buffer[position] = key;
    });
  }

  template <class Get>
  RESM_DEVICE void add(const Block<kThreads>& block, Shared& shared, int64_t* to, Get get) const {
    PerThread<int64_t, kThreads> values;
    block.each([&](int thread) { values[thread] = get(thread); });
    const int64_t total = sum_of(block, values, shared.sums);
    block.each([&](int thread) {
      if (thread == 0 && total != 0) atomic_add(to, total);
    });
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Chunk chunk = chunk_of<Kind>(P::group, block.index());
    const int64_t capacity = P::capacity();
    for (int t = 0; t < P::group.n_experts; ++t) {
      Selection& selection = P::selections[t];
      Key<C>* buffer = P::buffer(t);
      const auto low = static_cast<Key<C>>(selection.low), high = static_cast<Key<C>>(selection.high);
      block.each([&](int thread) {
        if (thread == 0) shared.staged = 0;
      });
      PerThread<Counts, kThreads> counts;
      block.each([&](int thread) {
        const auto visit = [&](const auto& delta, int64_t) {
          take(delta, low, high, counts[thread], shared, selection, buffer, capacity);
        };
        for_deltas<Kind, kThreads>(chunk, Kind::base(P::group), Kind::expert(P::group, t), thread, visit);
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
      add(block, shared, P::result.nonfinite + t, [&](int thread) { return counts[thread].nonfinite; });
    }
  }
};

// Runs one thread for each expert.
template <class C>
struct Decide : Problem<C> {
  using P = Problem<C>;
  static constexpr int kThreads = cuda::kThreads, kResident = 1;
  struct Shared {};

  RESM_DEVICE void decide(int64_t t) const {
    const int64_t length = P::group.length, k = P::k[t];
    Selection& s = P::selections[t];
    double& threshold = P::result.thresholds[t];
    const int64_t above = length - s.to_high, from_high = length - s.below_high;
    const int64_t above_low = length - s.to_low, from_low = length - s.below_low;
    s.source = Source::none;
    if (k == 0) {
      threshold = value_of<C>(kInfinityKey<C>);
    } else if (above < k && k <= from_high) {
      threshold = value_of<C>(static_cast<Key<C>>(s.high));
    } else if (above_low < k && k <= from_low) {
      threshold = value_of<C>(static_cast<Key<C>>(s.low));
    } else if (from_high < k && k <= above_low && s.between <= P::capacity()) {
      s.source = Source::buffer;
      s.rank = k - from_high;
    } else {
      s.source = Source::tensor;
      s.rank = k;
    }
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    block.each([&](int thread) {
      const int64_t t = block.index() * kThreads + thread;
      if (t < P::group.n_experts) decide(t);
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

  int32_t number;  // the digit's number, from the top

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    using Kind = Dtypes<C, kMixed>;
    const Chunk chunk = chunk_of<Kind>(P::group, block.index());
    for (int t = 0; t < P::group.n_experts; ++t) {
      const Selection& s = P::selections[t];
      const Digit digit = Digit::of(bits_of<C>(s), number);
      const int64_t keys = s.source == Source::buffer ? s.between : P::group.length;
      if (s.source == Source::none || digit.bits == 0 || chunk.begin >= keys) continue;
      const int64_t end = chunk.end < keys ? chunk.end : keys;
      const Source source = s.source;
      const auto prefix = static_cast<Key<C>>(s.prefix);
      const Key<C> origin = origin_of<C>(s), *buffer = P::buffer(t);
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
        for_deltas<Kind, kThreads>(chunk, Kind::base(P::group), Kind::expert(P::group, t), thread,
                                   [&](const auto& delta, int64_t) { count(key_of(delta[0])); });
      });
      block.each([&](int thread) {
        for (int i = thread; i < kDigits; i += kThreads)
          if (shared.frequencies[i] != 0) atomic_add(P::frequencies + t * kDigits + i, int64_t(shared.frequencies[i]));
      });
    }
  }
};

// Runs one block for each expert.
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
        P::result.thresholds[block.index()] = value_of<C>(origin_of<C>(s) + static_cast<Key<C>>(s.prefix));
    });
  }
};

}  // namespace

void magnitude_threshold(const Group& group, const int64_t* k, const ThresholdResult& result,
                         const ThresholdWorkspace& workspace, Stream stream) {
  constexpr const char* kName = "magnitude_threshold";
  const int64_t n_experts = group.n_experts;
  with_dtypes(group, [&](auto kind) {
    using Kind = decltype(kind);
    using C = typename Kind::Compute;
    const Problem<C> problem{group,
                             k,
                             reinterpret_cast<Selection*>(workspace.selections),
                             workspace.frequencies,
                             reinterpret_cast<Key<C>*>(workspace.buffer),
                             result};
    launch(kName, Sample<C>{problem}, n_experts, stream);
    if (group.length <= kSample<C>) return;
    launch(kName, Bracket<Kind>{problem}, group.blocks(), stream);
    launch(kName, Decide<C>{problem}, (n_experts + kThreads - 1) / kThreads, stream);
    for (int number = 0; number * kDigitBits < kKeyBits<C>; ++number) {
      launch(kName, Count<C>{problem, number}, group.blocks(), stream);
      launch(kName, Choose<C>{problem, number}, n_experts, stream);
    }
  });
}

}  // namespace resm::cuda
