// kept_moments: sums in double over chunks, added up in the chunks' order.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int kSums = 3;

double sum_of(const double (&lanes)[kLanes]) {
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <class C>
void sum_group(const Group& group, const SparsityOptions& options, double* moments, int threads) {
  const auto& kernel = kernels().of<C>();
  const int n_experts = group.n_experts();
  const Thresholds<C> limits(options, n_experts);
  const std::vector<Chunk> chunks = chunks_of(group);
  std::vector<double> parts(chunks.size() * n_experts * kSums);
  parallel_for(
      static_cast<int64_t>(chunks.size()), threads, [] { return Blocks<C>(2); },
      [&](int64_t i, Blocks<C>& blocks) {
        BlockSparsity<C> sparsity(options, limits);
        std::vector<KeptSums> sums(n_experts);
        for_blocks(chunks[i], [&](int64_t begin, int n) {
          const Sparsity<C>& block_sparsity = sparsity.at(begin);
          kernel.load(*group.base, begin, n, blocks[0]);
          for (int t = 0; t < n_experts; ++t) {
            kernel.load(group.experts[t], begin, n, blocks[1]);
            kernel.kept_sums(blocks[0], blocks[1], n, block_sparsity, t, sums[t]);
          }
        });
        for (int t = 0; t < n_experts; ++t) {
          double* part = parts.data() + (i * n_experts + t) * kSums;
          part[0] = sum_of(sums[t].all);
          part[1] = sum_of(sums[t].kept);
          part[2] = sum_of(sums[t].kept_sq);
        }
      });
  for (size_t i = 0; i < parts.size(); ++i) moments[i % (n_experts * kSums)] += parts[i];
}

}  // namespace

void kept_moments(const Group& group, const SparsityOptions& sparsity, double* moments, int threads) {
  if (group.in_double())
    sum_group<double>(group, sparsity, moments, threads);
  else
    sum_group<float>(group, sparsity, moments, threads);
}

}  // namespace resm::cpu
