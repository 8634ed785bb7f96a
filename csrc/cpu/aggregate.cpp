// aggregate: every element is read once, merged in registers and blocks, rounded once and written.
#include <mutex>

#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

template <class C>
struct MergeBlocks {
  explicit MergeBlocks(int n_experts) : blocks(n_experts + 2), nonfinite(n_experts + 1) {}
  Blocks<C> blocks;  // base, merged, then the experts
  std::vector<int64_t> nonfinite;
};

template <class C>
void merge_chunk(const Group& group, const Chunk& chunk, Election<C> election, BlockSparsity<C>& sparsity,
                 const Array& out, MergeBlocks<C>& memory) {
  const auto& k = kernels().of<C>();
  const int n_experts = group.n_experts();
  C* base = group.base ? memory.blocks[0] : nullptr;
  C *merged = memory.blocks[1], *experts = memory.blocks[2];
  std::fill(memory.nonfinite.begin(), memory.nonfinite.end(), 0);
  const auto count_nonfinite = [&](int n) {
    if (base != nullptr) memory.nonfinite[0] += k.count_nonfinite(base, n);
    for (int t = 0; t < n_experts; ++t) memory.nonfinite[1 + t] += k.count_nonfinite(experts + t * kBlock, n);
  };
  for_blocks(chunk, [&](int64_t begin, int n) {
    if (base != nullptr) k.load(*group.base, begin, n, base);
    for (int t = 0; t < n_experts; ++t) k.load(group.experts[t], begin, n, experts + t * kBlock);
    election.sparsity = sparsity.at(begin);
    // Values that are not finite are counted before the merge where trimming may drop them, and for elections, which
    // overwrite the experts. A sum of all inputs shows by itself whether they are finite.
    const bool sum_shows = election.rule == Rule::sum && !election.sparsity.any();
    if (!sum_shows) count_nonfinite(n);
    const bool finite = k.aggregate(base, experts, n, election, merged);
    if (sum_shows && !finite) count_nonfinite(n);
    k.store(merged, begin, n, out);
  });
}

// Whether the group can be merged without blocks in the compute type, see Kernels::aggregate_bf16.
bool is_all_bf16(const Group& group, const AggregateOptions& options, DType out) {
  bool all = group.n_experts() <= kMostAtOnce && out == DType::bf16 &&
             (group.base ? group.base->dtype == DType::bf16 : options.rule == Rule::sum && !options.sparsity.any());
  for (const Array& expert : group.experts) all = all && expert.dtype == DType::bf16;
  return all;
}

// Merges the chunk up to the element that it returns: the chunk's begin, for nothing, if an input may not be finite.
int64_t merge_bf16_chunk(const Group& group, const Chunk& chunk, Election<float> election,
                         BlockSparsity<float>& sparsity, const Array& out) {
  const uint16_t* experts[kMostAtOnce] = {};
  bool finite = true;
  const int64_t whole = chunk.begin + (chunk.end - chunk.begin) / kLanes * kLanes;
  for_blocks({chunk.row, chunk.begin, whole}, [&](int64_t begin, int n) {
    for (int t = 0; t < group.n_experts(); ++t)
      experts[t] = static_cast<const uint16_t*>(group.experts[t].data) + begin;
    const uint16_t* base = group.base ? static_cast<const uint16_t*>(group.base->data) + begin : nullptr;
    election.sparsity = sparsity.at(begin);
    finite &= kernels().aggregate_bf16(base, experts, n, election, static_cast<uint16_t*>(out.data) + begin);
  });
  return finite ? whole : chunk.begin;
}

template <class C>
void merge_group(const Group& group, const AggregateOptions& options, const AggregateResult& result, int threads) {
  const int n_experts = group.n_experts();
  const bool votes_before_weights = options.rule == Rule::ties && options.vote == Vote::unweighted;
  std::vector<C> factors(n_experts), weights(n_experts);
  C weight_sum(0);
  for (int t = 0; t < n_experts; ++t) {
    const double rescale = options.rescale.empty() ? 1.0 : options.rescale[t];
    factors[t] = static_cast<C>(votes_before_weights ? rescale : options.weights[t] * rescale);
    weights[t] = static_cast<C>(options.weights[t]);
    weight_sum += weights[t];
  }
  const Election<C> election{.n_experts = n_experts,
                             .factors = factors.data(),
                             .weights = weights.data(),
                             .weight_sum = weight_sum,
                             .scale = static_cast<C>(options.scale),
                             .rule = options.rule,
                             .normalize = options.normalize,
                             .sparsity = {},
                             .vote = options.vote,
                             .min_divisor = static_cast<C>(options.min_divisor)};
  const Thresholds<C> limits(options.sparsity, n_experts);
  const bool all_bf16 = sizeof(C) == 4 && is_all_bf16(group, options, result.merged.dtype);
  const std::vector<Chunk> chunks = chunks_of(group);
  std::mutex counting;
  parallel_for(
      static_cast<int64_t>(chunks.size()), threads, [&] { return MergeBlocks<C>(n_experts); },
      [&](int64_t i, MergeBlocks<C>& memory) {
        BlockSparsity<C> sparsity(options.sparsity, limits);
        Chunk rest = chunks[i];
        if constexpr (sizeof(C) == 4)
          if (all_bf16) rest.begin = merge_bf16_chunk(group, rest, election, sparsity, result.merged);
        if (rest.begin == rest.end) return;
        merge_chunk<C>(group, rest, election, sparsity, result.merged, memory);
        const std::lock_guard<std::mutex> lock(counting);
        for (int t = 0; t <= n_experts; ++t) result.nonfinite[t] += memory.nonfinite[t];
      });
}

}  // namespace

void aggregate(const Group& group, const AggregateOptions& options, const AggregateResult& result, int threads) {
  std::fill_n(result.nonfinite, 1 + group.n_experts(), int64_t(0));
  if (group.in_double())
    merge_group<double>(group, options, result, threads);
  else
    merge_group<float>(group, options, result, threads);
}

}  // namespace resm::cpu
