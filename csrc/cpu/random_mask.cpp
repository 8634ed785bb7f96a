// random_mask: uniform masks are drawn as they are; for others the ranks within rows are found without sorting them.
//
// A row's keys of |δ| are counted in the cells of a grid, every other of which holds one key alone. Most random numbers
// lie outside the limits of all ranks; for the others the cell says of the rank all there is to know, or enough. Those
// few for which it does not are compared with the row.
#include <algorithm>
#include <numeric>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int kOctaves = 8;  // of magnitudes that the grid resolves: what lies below them is few
constexpr int kFewestStepBits = 4, kMostStepBits = 12;
constexpr int64_t kSampled = 64;           // keys of a row by the largest of which the grid is placed
constexpr int64_t kMostCounted = 128;      // elements of a row that are compared with all of it; more: it is sorted
constexpr int64_t kElementsAtOnce = 8192;  // of the rows that a task works on, or more
constexpr int64_t kRunsAtOnce = 512;

template <class C>
struct RowScratch {
  Blocks<C> blocks{2};
  std::vector<Key<C>> keys, sorted;
  std::vector<uint32_t> words, counts, open;
  std::vector<uint16_t> cells;
};

// Where the keys of a row lie, so that few share a cell. It shows in no result.
template <class C>
KeyGrid<C> grid_of(const std::vector<Key<C>>& keys) {
  const auto n = static_cast<int64_t>(keys.size());
  constexpr int kExponentAt = sizeof(C) == 4 ? 23 : 52;
  int bits = kFewestStepBits;
  while (bits < kMostStepBits && (int64_t(4) << bits) < n) ++bits;
  KeyGrid<C> grid;
  grid.steps = 1 << bits;
  grid.shift = kExponentAt + 3 - bits;
  static_assert(kOctaves == 1 << 3, "steps of a power of two");
  Key<C> largest = 0;
  for (int64_t i = 0; i < n; i += ceil_div(n, kSampled)) largest = std::max(largest, keys[i]);
  const Key<C> top = (largest + (Key<C>(1) << (kExponentAt - 1))) >> grid.shift;
  grid.first = top > Key<C>(grid.steps) ? (top - Key<C>(grid.steps)) << grid.shift : 0;
  return grid;
}

// Sets the bits from `at` on of the elements of the row that stay and whose words are not below every limit; keys and
// words are the row's.
template <class C>
void keep_row(const MaskLaw& law, const uint32_t* words, RowScratch<C>& s, uint8_t* mask, int64_t at) {
  const auto& kernel = kernels().of<C>();
  const auto n = static_cast<int64_t>(s.keys.size());
  const uint64_t least = law.limit(0), most = law.limit(2 * uint64_t(n - 1));
  int64_t open = kernels().masks.words_between(words, n, static_cast<uint32_t>(least), static_cast<uint32_t>(most),
                                               s.open.data());
  const KeyGrid<C> grid = grid_of<C>(s.keys);
  s.counts.assign(grid.cells() + 1, 0);
  kernel.count_cells(s.keys.data(), n, grid, s.cells.data(), s.counts.data() + 1);
  for (int cell = 0; cell < grid.cells(); ++cell) s.counts[cell + 1] += s.counts[cell];
  const auto keep = [&](int64_t i, bool kept) { mask[(at + i) / 8] |= static_cast<uint8_t>(int(kept) << (at + i) % 8); };
  int64_t undecided = 0;
  for (int64_t j = 0; j < open; ++j) {
    const uint32_t i = s.open[j], cell = s.cells[i], word = words[i];
    const uint64_t less = s.counts[cell], others = s.counts[cell + 1] - less - 1, mixed = cell % 2;
    const uint64_t lowest = 2 * less + (mixed ? 0 : others), highest = lowest + (mixed ? 2 * others : 0);
    const bool kept = word < law.limit(lowest);
    keep(i, kept);
    s.open[undecided] = i;  // overwritten unless undecided: no branch to guess
    undecided += !kept & (word < law.limit(highest)) ? 1 : 0;
  }
  const bool sorts = undecided > kMostCounted;
  if (sorts) {
    s.sorted = s.keys;
    std::sort(s.sorted.begin(), s.sorted.end());
  }
  for (int64_t j = 0; j < undecided; ++j) {
    const uint32_t i = s.open[j];
    int64_t less = 0, equal = 0;
    if (sorts) {
      const auto same = std::equal_range(s.sorted.begin(), s.sorted.end(), s.keys[i]);
      less = same.first - s.sorted.begin();
      equal = same.second - same.first;
    } else {
      kernel.count_keys(s.keys.data(), n, s.keys[i], less, equal);
    }
    keep(i, words[i] < law.limit(static_cast<uint64_t>(2 * less + equal - 1)));
  }
}

// Nothing lies past the tensor.
void end_mask(uint8_t* mask, int64_t length) {
  if (length % 8 != 0) mask[length / 8] &= static_cast<uint8_t>((1u << length % 8) - 1);
  std::fill(mask + ceil_div(length, 8), mask + ceil_div(length, kRun) * kRunBytes, uint8_t(0));
}

template <class C>
void keep_by_rank(const Groups& groups, int t, const RandomMaskOptions& options, int threads) {
  const int64_t length = groups.lengths[0], row = options.row, rows = length / row;
  const MaskLaw& law = options.laws[t];
  // Tasks begin on whole runs.
  const int64_t aligned = kRun / std::gcd(row, int64_t(kRun));
  const int64_t at_once = ceil_div(ceil_div(kElementsAtOnce, row), aligned) * aligned;
  parallel_for(ceil_div(rows, at_once), threads, [] { return RowScratch<C>(); }, [&](int64_t task, RowScratch<C>& s) {
    const auto& kernel = kernels().of<C>();
    const int64_t begin = task * at_once * row, n = std::min(at_once, rows - task * at_once) * row;
    const int64_t runs = ceil_div(n, kRun);
    s.words.resize(runs * kRun);
    s.keys.resize(row);
    s.cells.resize(row);
    s.open.resize(row + kLanes);
    uint8_t* mask = options.masks[t] + begin / 8;
    kernels().masks.random_words(options.seed, static_cast<uint32_t>(t), begin / kRun, runs, law.limit(0),
                                 s.words.data(), mask);
    for (int64_t r = 0; r < n; r += row) {
      for_blocks({0, begin + r, begin + r + row}, [&](int64_t from, int count) {
        kernel.load(*groups.base(0), from, count, s.blocks[0]);
        kernel.load(groups.experts_of(0)[t], from, count, s.blocks[1]);
        kernel.keys(s.blocks[0], s.blocks[1], count, s.keys.data() + (from - begin - r));
      });
      keep_row(law, s.words.data() + r, s, mask, r);
    }
  });
  end_mask(options.masks[t], length);
}

void keep_uniformly(int64_t length, int t, const RandomMaskOptions& options, int threads) {
  const int64_t runs = ceil_div(length, kRun);
  const uint64_t limit = options.laws[t].limit(0);
  parallel_for(ceil_div(runs, kRunsAtOnce), threads, [] { return 0; }, [&](int64_t task, int) {
    const int64_t first = task * kRunsAtOnce, count = std::min(kRunsAtOnce, runs - first);
    kernels().masks.random_bits(options.seed, static_cast<uint32_t>(t), first, count, limit,
                                options.masks[t] + first * kRunBytes);
  });
  end_mask(options.masks[t], length);
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
