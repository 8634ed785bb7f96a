// random_mask: uniform masks are drawn as they are; for others the ranks within rows are found without sorting them.
//
// A row's keys of |δ| go into buckets by their highest bits. What a bucket says of a rank is enough for nearly all
// elements, as their random numbers lie far from every limit that is still possible; the others' ranks are counted
// among the keys of their bucket.
#include <algorithm>
#include <numeric>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int kMostBucketBits = 11, kFewestBucketBits = 4;
constexpr int64_t kMostCounted = 1024;     // keys of a bucket that is not sorted first
constexpr int64_t kElementsAtOnce = 8192;  // of the rows that a task works on, or more
constexpr int64_t kRunsAtOnce = 512;

template <class C>
struct RowScratch {
  // Of the lowest and of the highest rank in the bucket: below 2^32 where ranks matter, since no element is kept surely.
  struct Limits {
    uint32_t low, high;
  };

  Blocks<C> blocks{2};
  std::vector<Key<C>> keys, by_bucket;
  std::vector<uint32_t> words;
  std::vector<uint32_t> starts, places, undecided;  // half of what the first-level cache holds, with the limits
  std::vector<Limits> limits;
  std::vector<bool> sorted;
  std::vector<uint8_t> kept;
};

// kept[i] = 1 where element i of the row stays; keys and words are the row's.
template <class C>
void keep_row(const MaskLaw& law, int64_t n, const uint32_t* words, RowScratch<C>& s, uint8_t* kept) {
  int bits = kFewestBucketBits;
  while (bits < kMostBucketBits && (int64_t(1) << bits) < n) ++bits;
  const int shift = static_cast<int>(sizeof(C)) * 8 - 1 - bits;
  const size_t buckets = size_t(1) << bits;
  s.starts.assign(buckets + 1, 0);
  for (int64_t i = 0; i < n; ++i) ++s.starts[(s.keys[i] >> shift) + 1];
  for (size_t b = 0; b < buckets; ++b) s.starts[b + 1] += s.starts[b];
  s.limits.resize(buckets);
  for (size_t b = 0; b < buckets; ++b) {
    const uint64_t first = s.starts[b], last = std::max<uint64_t>(first + 1, s.starts[b + 1]) - 1;
    s.limits[b] = {static_cast<uint32_t>(law.limit(2 * first)), static_cast<uint32_t>(law.limit(2 * last))};
  }
  s.places.assign(s.starts.begin(), s.starts.end() - 1);
  s.by_bucket.resize(n);
  s.undecided.resize(n + 1);
  int64_t found = 0;
  for (int64_t i = 0; i < n; ++i) {
    const size_t b = s.keys[i] >> shift;
    s.by_bucket[s.places[b]++] = s.keys[i];
    kept[i] = words[i] < s.limits[b].low ? 1 : 0;
    // Every index is written, and stays if it is undecided: no branch to guess.
    s.undecided[found] = static_cast<uint32_t>(i);
    found += (kept[i] == 0) & (words[i] < s.limits[b].high) ? 1 : 0;
  }
  s.sorted.assign(buckets, false);
  int64_t zeros = -1;  // unchanged weights are many, and all equal
  for (int64_t j = 0; j < found; ++j) {
    const int64_t i = s.undecided[j];
    const Key<C> key = s.keys[i];
    const size_t b = key >> shift;
    auto *begin = s.by_bucket.data() + s.starts[b], *end = s.by_bucket.data() + s.starts[b + 1];
    int64_t less = 0, equal = 0;
    if (key == 0) {
      if (zeros < 0) zeros = std::count(begin, end, Key<C>(0));
      equal = zeros;
    } else if (end - begin <= kMostCounted) {
      kernels().of<C>().count_keys(begin, end - begin, key, less, equal);
    } else {
      if (!s.sorted[b]) std::sort(begin, end);
      s.sorted[b] = true;
      const auto same = std::equal_range(begin, end, key);
      less = same.first - begin;
      equal = same.second - same.first;
    }
    const auto rank = static_cast<uint64_t>(2 * (int64_t(s.starts[b]) + less) + equal - 1);
    kept[i] = words[i] < law.limit(rank) ? 1 : 0;
  }
}

// The bits of n bytes of 0 or 1, n a multiple of 8. The product moves bit 8·j of eight bytes to bit 56 + j.
void pack(const uint8_t* kept, int64_t n, uint8_t* mask) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t eight = 0;
    for (int j = 0; j < 8; ++j) eight |= uint64_t(kept[i + j]) << (8 * j);
    mask[i / 8] = static_cast<uint8_t>((eight * 0x0102040810204080u) >> 56);
  }
}

template <class C>
void keep_by_rank(const Groups& groups, int t, const RandomMaskOptions& options, int threads) {
  const int64_t row = options.row, rows = groups.lengths[0] / row;
  // Tasks begin on whole runs.
  const int64_t aligned = kRun / std::gcd(row, int64_t(kRun));
  const int64_t at_once = ceil_div(ceil_div(kElementsAtOnce, row), aligned) * aligned;
  parallel_for(ceil_div(rows, at_once), threads, [] { return RowScratch<C>(); }, [&](int64_t task, RowScratch<C>& s) {
    const auto& kernel = kernels().of<C>();
    const int64_t begin = task * at_once * row, n = std::min(at_once, rows - task * at_once) * row;
    const int64_t runs = ceil_div(n, kRun);
    s.words.resize(runs * kRun);
    s.kept.assign(runs * kRun, 0);
    s.keys.resize(row);
    kernels().masks.random_words(options.seed, static_cast<uint32_t>(t), begin / kRun, runs, s.words.data());
    for (int64_t r = 0; r < n; r += row) {
      for_blocks({0, begin + r, begin + r + row}, [&](int64_t from, int count) {
        kernel.load(*groups.base(0), from, count, s.blocks[0]);
        kernel.load(groups.experts_of(0)[t], from, count, s.blocks[1]);
        kernel.keys(s.blocks[0], s.blocks[1], count, s.keys.data() + (from - begin - r));
      });
      keep_row(options.laws[t], row, s.words.data() + r, s, s.kept.data() + r);
    }
    pack(s.kept.data(), runs * kRun, options.masks[t] + begin / 8);
  });
}

void keep_uniformly(int64_t length, int t, const RandomMaskOptions& options, int threads) {
  const int64_t runs = ceil_div(length, kRun);
  const uint64_t limit = options.laws[t].limit(0);
  parallel_for(ceil_div(runs, kRunsAtOnce), threads, [] { return 0; }, [&](int64_t task, int) {
    const int64_t first = task * kRunsAtOnce, count = std::min(kRunsAtOnce, runs - first);
    kernels().masks.random_bits(options.seed, static_cast<uint32_t>(t), first, count, limit,
                                options.masks[t] + first * kRunBytes);
  });
  uint8_t* mask = options.masks[t];  // nothing lies past the tensor
  for (int64_t i = length; i < runs * kRun; ++i) mask[i / 8] = static_cast<uint8_t>(mask[i / 8] & ~(1u << i % 8));
}

}  // namespace

void random_mask(const Groups& groups, const RandomMaskOptions& options, int threads) {
  if (groups.lengths[0] == 0) return;
  for (int t = 0; t < groups.n_experts; ++t) {
    if (options.laws[t].step == 0)
      keep_uniformly(groups.lengths[0], t, options, threads);
    else if (groups.is_double(0))
      keep_by_rank<double>(groups, t, options, threads);
    else
      keep_by_rank<float>(groups, t, options, threads);
  }
}

}  // namespace resm::cpu
