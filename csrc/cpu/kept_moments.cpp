// kept_moments: sums in double over chunks, added up in the chunks' order.
#include "cpu/chunks.h"
#include "cpu/sparsity.h"

namespace resm::cpu {
namespace {

constexpr int kSums = 3;

double sum_of(const double (&lanes)[kLanes]) {
  double sum = 0;
  for (double lane : lanes) sum += lane;
  return sum;
}

template <class C>
void sum_group(const Groups& groups, const SparsityOptions& options, double* moments, int threads) {
  const auto& kernel = kernels().of<C>();
  const int n_experts = groups.n_experts;
  const Thresholds<C> limits(options, groups.experts.size());
  std::vector<Chunk> chunks;
  add_chunks(groups, 0, chunks);
  std::vector<double> parts(chunks.size() * n_experts * kSums);
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [] { return Blocks<C>(2); },
               [&](int64_t i, Blocks<C>& blocks) {
                 BlockSparsity<C> sparsity(options, limits, 0, n_experts);
                 std::vector<KeptSums> sums(n_experts);
                 for_blocks(chunks[i], [&](int64_t begin, int n) {
                   const Sparsity<C>& here = sparsity.at(begin);
                   kernel.load(*groups.base(0), begin, n, blocks[0]);
                   for (int t = 0; t < n_experts; ++t) {
                     kernel.load(groups.experts_of(0)[t], begin, n, blocks[1]);
                     kernel.kept_sums(blocks[0], blocks[1], n, here, t, sums[t]);
                   }
                 });
                 for (int t = 0; t < n_experts; ++t) {
                   double* part = parts.data() + (i * n_experts + t) * kSums;
                   part[0] = sum_of(sums[t].all);
                   part[1] = sum_of(sums[t].kept);
                   part[2] = sum_of(sums[t].kept_sq);
                 }
               });
  std::fill(moments, moments + n_experts * kSums, 0.0);
  for (size_t i = 0; i < parts.size(); ++i) moments[i % (n_experts * kSums)] += parts[i];
}

}  // namespace

void kept_moments(const Groups& groups, const SparsityOptions& sparsity, double* moments, int threads) {
  if (groups.is_double(0))
    sum_group<double>(groups, sparsity, moments, threads);
  else
    sum_group<float>(groups, sparsity, moments, threads);
}

}  // namespace resm::cpu
