// variance_mask: the variances go to memory once, where the threshold is then found without a sort.
//
// Four bytes an element to write and read again are less than all inputs, and the number of variances that are not 0,
// on which the rank depends, is known when the selection begins.
#include <atomic>
#include <limits>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

template <class C>
void mask_group(const Groups& groups, double density, C* variances, uint8_t* mask, int threads) {
  const auto& kernel = kernels().of<C>();
  const int64_t length = groups.lengths[0];
  std::vector<Chunk> chunks;
  add_chunks(groups, 0, chunks);
  const auto n_chunks = static_cast<int64_t>(chunks.size());
  std::atomic<int64_t> nonzero{0};
  parallel_for(n_chunks, threads, [&] { return Blocks<C>(groups.n_experts + 1); }, [&](int64_t i, Blocks<C>& blocks) {
    int64_t found = 0;
    for_blocks(chunks[i], [&](int64_t begin, int n) {
      kernel.load(*groups.base(0), begin, n, blocks[0]);
      for (int t = 0; t < groups.n_experts; ++t) kernel.load(groups.experts_of(0)[t], begin, n, blocks[1 + t]);
      found += kernel.variance(blocks[0], blocks[1], n, groups.n_experts, variances + begin);
    });
    nonzero += found;
  });
  const auto k = static_cast<int64_t>(static_cast<double>(nonzero.load()) * density);
  const DType dtype = sizeof(C) == 4 ? DType::f32 : DType::f64;
  double threshold = std::numeric_limits<double>::infinity();
  int64_t nonfinite = 0;  // of the inputs, which the caller sees to
  if (k > 0) magnitude_threshold({{}, {{variances, dtype}}, {length}, 1}, &k, &threshold, &nonfinite, threads);
  parallel_for(n_chunks, threads, [] { return 0; }, [&](int64_t i, int) {
    for_blocks(chunks[i], [&](int64_t begin, int n) {
      kernel.mask_from(variances + begin, n, static_cast<C>(threshold), mask + begin / 8);
    });
  });
  std::fill(mask + ceil_div(length, 8), mask + ceil_div(length, kRun) * kRunBytes, uint8_t(0));
}

}  // namespace

void variance_mask(const Groups& groups, double density, void* variances, uint8_t* mask, int threads) {
  if (groups.is_double(0))
    mask_group<double>(groups, density, static_cast<double*>(variances), mask, threads);
  else
    mask_group<float>(groups, density, static_cast<float*>(variances), mask, threads);
}

}  // namespace resm::cpu
