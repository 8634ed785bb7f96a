// random_mask: uniform masks need only random numbers; other masks need ranks within rows, computed without a sort.
//
// A row's keys of |δ| are counted in the cells of a grid; every second cell holds one key alone. Most random numbers lie
// below or above the limits of all ranks in the element's range of cells, which decides. For most other elements the
// cell determines the rank well enough. The few elements that are still undecided are compared with the whole row.
#include <algorithm>
#include <numeric>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int kFewestStepBits = 5, kMostStepBits = 12;
constexpr int kOctaveBits = 3;             // the grid resolves magnitudes over 2^3 octaves: few lie below them
constexpr int64_t kSampled = 64;           // keys of a row, by the largest of which the grid is placed
constexpr int64_t kMostCounted = 128;      // undecided elements of a row; a row with more is sorted
constexpr int64_t kElementsAtOnce = 8192;  // a task works on rows with at least this many elements
constexpr int64_t kRunsAtOnce = 512;

template <class C>
struct RowBuffers {
  Blocks<C> blocks{2};
  std::vector<Key<C>> keys, sorted;
  std::vector<uint32_t> words, counts, below, open;
  std::vector<uint16_t> cells;
  std::vector<uint8_t> bits;

  RowBuffers(int64_t row, int64_t most_words)
      : keys(row), words(most_words), open(row + kLanes), cells(row), bits(ceil_div(row, 8) + sizeof(uint16_t)) {}
};

// A grid in which few keys of a row share a cell. No result depends on it.
template <class C>
KeyGrid<C> grid_of(const std::vector<Key<C>>& keys) {
  const auto n = static_cast<int64_t>(keys.size());
  constexpr int kExponentAt = sizeof(C) == 4 ? 23 : 52;
  int bits = kFewestStepBits;
  while (bits < kMostStepBits && (int64_t(4) << bits) < n) ++bits;
  Key<C> largest = 0;
  for (int64_t i = 0; i < n; i += ceil_div(n, kSampled)) largest = std::max(largest, keys[i]);
  const int shift = kExponentAt + kOctaveBits - bits;
  const Key<C> steps = (Key<C>(1) << bits) - 1, top = (largest + (Key<C>(1) << (kExponentAt - 1))) >> shift;
  return {(top > steps ? top - steps : 0) << shift, shift, bits};
}

// Sets the bits of the elements of the row that are kept. The row's keys are those in the buffers.
template <class C>
void keep_row(const MaskLaw& law, const uint32_t* words, RowBuffers<C>& s, uint8_t* bits) {
  const auto& kernel = kernels().of<C>();
  const auto n = static_cast<int64_t>(s.keys.size());
  const KeyGrid<C> grid = grid_of<C>(s.keys);
  const int cells = grid.cells();
  s.counts.resize(2 * cells);
  s.below.resize(cells + 1);
  kernel.count_cells(s.keys.data(), n, grid, s.cells.data(), s.counts.data(), s.below.data());

  const int cells_of_range = cells / kCellRanges;
  RankLimits limits;
  for (int range = 0; range < kCellRanges; ++range) {
    const uint64_t less = s.below[range * cells_of_range], up_to = s.below[(range + 1) * cells_of_range];
    limits.least[range] = static_cast<uint32_t>(law.limit(2 * less));
    limits.most[range] = up_to > less ? static_cast<uint32_t>(law.limit(2 * up_to - 2)) : 0;
  }
  const int64_t open =
      kernels().masks.keep_by_range(s.cells.data(), words, n, cells_of_range, limits, bits, s.open.data());

  const auto keep = [&](uint32_t i, bool kept) { bits[i / 8] |= static_cast<uint8_t>(unsigned(kept) << i % 8); };
  int64_t undecided = 0;
  for (int64_t j = 0; j < open; ++j) {
    const uint32_t i = s.open[j], cell = s.cells[i], word = words[i];
    const uint64_t less = s.below[cell], others = s.below[cell + 1] - less - 1;
    const bool is_mixed = cell % 2 != 0;
    const bool kept = word < law.limit(2 * less + (is_mixed ? 0 : others));
    keep(i, kept);
    if (is_mixed && !kept && word < law.limit(2 * (less + others))) s.open[undecided++] = i;
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

// Copies a row's n bits into a mask from bit `first` on, where the mask has zeros.
void add_bits(const uint8_t* bits, int64_t n, uint8_t* mask, int64_t first) {
  mask += first / 8;
  const int shift = static_cast<int>(first % 8);
  if (shift == 0) {
    std::copy_n(bits, ceil_div(n, 8), mask);
    return;
  }
  for (int64_t i = 0; i < ceil_div(n, 8); ++i) {
    const unsigned shifted = unsigned(bits[i]) << shift;
    mask[i] |= static_cast<uint8_t>(shifted);
    if (shifted > 0xff) mask[i + 1] = static_cast<uint8_t>(shifted >> 8);
  }
}

// Masks of the experts whose probabilities depend on ranks.
template <class C>
void keep_by_rank(const Group& group, const std::vector<int>& ranked, const RandomMaskOptions& options,
                  const std::vector<uint8_t*>& masks, int threads) {
  const int64_t row = group.length, rows = group.rows;
  // Tasks begin on whole runs.
  const int64_t aligned = kRun / std::gcd(row, int64_t(kRun));
  const int64_t at_once = ceil_div(ceil_div(kElementsAtOnce, row), aligned) * aligned;
  const auto make = [&] { return RowBuffers<C>(row, ceil_div(at_once * row, kRun) * kRun); };
  parallel_for(ceil_div(rows, at_once), threads, make, [&](int64_t task, RowBuffers<C>& s) {
    const auto& kernel = kernels().of<C>();
    const int64_t begin = task * at_once * row, n = std::min(at_once, rows - task * at_once) * row;
    const int64_t runs = ceil_div(n, kRun);
    for (int t : ranked) {
      kernels().masks.random_words(options.seed, static_cast<uint32_t>(t), options.first_run + begin / kRun, runs,
                                   s.words.data());
      uint8_t* mask = masks[t] + begin / 8;
      std::fill_n(mask, runs * kRunBytes, uint8_t(0));
      for (int64_t r = 0; r < n; r += row) {
        for_blocks({0, begin + r, begin + r + row}, [&](int64_t from, int count) {
          kernel.load(*group.base, from, count, s.blocks[0]);
          kernel.load(group.experts[t], from, count, s.blocks[1]);
          kernel.keys(s.blocks[0], s.blocks[1], count, s.keys.data() + (from - begin - r));
        });
        keep_row(options.laws[t], s.words.data() + r, s, s.bits.data());
        add_bits(s.bits.data(), row, mask, r);
      }
    }
  });
}

void keep_uniformly(int64_t length, int t, const RandomMaskOptions& options, uint8_t* mask, int threads) {
  const int64_t runs = ceil_div(length, kRun);
  const uint64_t limit = options.laws[t].limit(0);
  parallel_for(
      ceil_div(runs, kRunsAtOnce), threads, [] { return 0; },
      [&](int64_t task, int) {
        const int64_t first = task * kRunsAtOnce, count = std::min(kRunsAtOnce, runs - first);
        kernels().masks.random_bits(options.seed, static_cast<uint32_t>(t), options.first_run + first, count, limit,
                                    mask + first * kRunBytes);
      });
  // Bits past the tensor are 0.
  for (int64_t i = length; i < runs * kRun; ++i) mask[i / 8] = static_cast<uint8_t>(mask[i / 8] & ~(1u << i % 8));
}

}  // namespace

void random_mask(const Group& group, const RandomMaskOptions& options, const std::vector<uint8_t*>& masks,
                 int threads) {
  if (group.numel() == 0) return;
  std::vector<int> ranked;
  for (int t = 0; t < group.n_experts(); ++t) {
    if (options.laws[t].step == 0)
      keep_uniformly(group.numel(), t, options, masks[t], threads);
    else
      ranked.push_back(t);
  }
  if (ranked.empty()) return;
  if (group.in_double())
    keep_by_rank<double>(group, ranked, options, masks, threads);
  else
    keep_by_rank<float>(group, ranked, options, masks, threads);
}

}  // namespace resm::cpu
