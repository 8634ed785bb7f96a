// aggregate: every element is read once, merged in registers and scratch, rounded once and written.
#include <mutex>

#include "cpu/chunks.h"
#include "cpu/sparsity.h"

namespace resm::cpu {
namespace {

template <class C>
struct Scratch {
  explicit Scratch(int n_experts) : blocks(n_experts + 2), nonfinite(n_experts + 1) {}
  Blocks<C> blocks;  // base, merged, then the experts
  std::vector<int64_t> nonfinite;
};

template <class C>
void merge_chunk(const Groups& groups, const Chunk& chunk, Election<C> election, BlockSparsity<C>& sparsity,
                 const Array& out, Scratch<C>& scratch) {
  const auto& k = kernels().of<C>();
  const Array* base = groups.base(chunk.group);
  C* base_block = base == nullptr ? nullptr : scratch.blocks[0];
  C* merged = scratch.blocks[1];
  std::fill(scratch.nonfinite.begin(), scratch.nonfinite.end(), 0);
  const auto count_nonfinite = [&](int n) {
    if (base != nullptr) scratch.nonfinite[0] += k.count_nonfinite(base_block, n);
    for (int t = 0; t < groups.n_experts; ++t)
      scratch.nonfinite[1 + t] += k.count_nonfinite(scratch.blocks[2 + t], n);
  };
  for_blocks(chunk, [&](int64_t begin, int n) {
    if (base != nullptr) k.load(*base, begin, n, base_block);
    for (int t = 0; t < groups.n_experts; ++t)
      k.load(groups.experts_of(chunk.group)[t], begin, n, scratch.blocks[2 + t]);
    election.sparsity = sparsity.at(begin);
    // What is left out may be NaN, and elections overwrite the experts: look at the inputs first. A sum shows what its
    // terms were.
    const bool shows = election.rule == Rule::sum && !election.sparsity.any();
    if (!shows) count_nonfinite(n);
    const bool finite = k.aggregate(base_block, scratch.blocks[2], n, election, merged);
    if (shows && !finite) count_nonfinite(n);
    k.store(merged, begin, n, out);
  });
}

// Can the group be merged without a trip through scratch? See Kernels::aggregate_bf16.
bool is_all_bf16(const Groups& groups, int64_t group, const Election<float>& election, bool is_sparse, DType out) {
  const Array* base = groups.base(group);
  bool all = groups.n_experts <= kMostAtOnce && out == DType::bf16 &&
             (base == nullptr ? election.rule == Rule::sum && !is_sparse : base->dtype == DType::bf16);
  for (int t = 0; t < groups.n_experts; ++t) all = all && groups.experts_of(group)[t].dtype == DType::bf16;
  return all;
}

// Merges the chunk, or, if something in it may not be finite, nothing that counts: returns where it is yet to begin.
int64_t merge_bf16_chunk(const Groups& groups, const Chunk& chunk, Election<float> election,
                         BlockSparsity<float>& sparsity, const Array& out) {
  const Array* base = groups.base(chunk.group);
  const uint16_t* experts[kMostAtOnce] = {};
  bool finite = true;
  const int64_t whole = chunk.begin + (chunk.end - chunk.begin) / kLanes * kLanes;
  for_blocks({chunk.group, chunk.begin, whole}, [&](int64_t begin, int n) {
    for (int t = 0; t < groups.n_experts; ++t)
      experts[t] = static_cast<const uint16_t*>(groups.experts_of(chunk.group)[t].data) + begin;
    const uint16_t* origin = base == nullptr ? nullptr : static_cast<const uint16_t*>(base->data) + begin;
    election.sparsity = sparsity.at(begin);
    finite &= kernels().aggregate_bf16(origin, experts, n, election, static_cast<uint16_t*>(out.data) + begin);
  });
  return finite ? whole : chunk.begin;
}

// Merges the groups whose compute type is C.
template <class C>
void merge_groups(const Groups& groups, const AggregateOptions& options, const std::vector<Array>& outs,
                  int64_t* nonfinite, int threads) {
  const int n_experts = groups.n_experts;
  const size_t n_weights = groups.experts.size();
  const bool late = options.rule == Rule::ties && options.vote == Vote::unweighted;
  std::vector<C> factors(n_weights), weights(n_weights), weight_sums(groups.size());
  for (size_t i = 0; i < n_weights; ++i) {
    const double scale = options.rescale == nullptr ? 1.0 : options.rescale[i];
    factors[i] = static_cast<C>(late ? scale : options.weights[i] * scale);
    weights[i] = static_cast<C>(options.weights[i]);
    weight_sums[i / n_experts] += weights[i];
  }
  const Thresholds<C> limits(options.sparsity, n_weights);
  const bool is_sparse = !limits.lower.empty() || !options.sparsity.masks.empty();
  std::vector<Chunk> chunks;
  for (int64_t g = 0; g < groups.size(); ++g)
    if (groups.is_double(g) == (sizeof(C) == 8)) add_chunks(groups, g, chunks);
  std::mutex counting;
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&] { return Scratch<C>(n_experts); },
               [&](int64_t i, Scratch<C>& scratch) {
                 const int64_t g = chunks[i].group, at = g * n_experts;
                 BlockSparsity<C> sparsity(options.sparsity, limits, at, n_experts);
                 const Election<C> election{n_experts,
                                            factors.data() + at,
                                            weights.data() + at,
                                            weight_sums[g],
                                            static_cast<C>(options.scale),
                                            options.rule,
                                            options.normalize,
                                            {},
                                            options.vote,
                                            static_cast<C>(options.min_divisor)};
                 Chunk rest = chunks[i];
                 if constexpr (sizeof(C) == 4)
                   if (is_all_bf16(groups, g, election, is_sparse, outs[g].dtype))
                     rest.begin = merge_bf16_chunk(groups, rest, election, sparsity, outs[g]);
                 if (rest.begin == rest.end) return;
                 merge_chunk<C>(groups, rest, election, sparsity, outs[g], scratch);
                 const std::lock_guard<std::mutex> lock(counting);
                 for (int t = 0; t <= n_experts; ++t) nonfinite[g * (1 + n_experts) + t] += scratch.nonfinite[t];
               });
}

}  // namespace

void aggregate(const Groups& groups, const AggregateOptions& options, const std::vector<Array>& outs,
               int64_t* nonfinite, int threads) {
  std::fill(nonfinite, nonfinite + groups.size() * (1 + groups.n_experts), int64_t(0));
  merge_groups<float>(groups, options, outs, nonfinite, threads);
  merge_groups<double>(groups, options, outs, nonfinite, threads);
}

}  // namespace resm::cpu
