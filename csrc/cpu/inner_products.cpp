// inner_products: every element is read once; products of two fp32 values are exact in double, and so are summed, by
// lanes within a chunk, lanes and chunks in their order: the same bits for any number of threads.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

template <class C>
struct Scratch {
  Scratch(int n_experts, int64_t pairs) : blocks(n_experts + 1), lanes(pairs * kLanes) {}
  Blocks<C> blocks;  // base, then the experts
  std::vector<double> lanes;
};

template <class C>
void of_chunk(const Groups& groups, const Chunk& chunk, Scratch<C>& scratch, double* sums, int64_t pairs) {
  const auto& k = kernels().of<C>();
  const Array* base = groups.base(chunk.group);
  std::fill(scratch.lanes.begin(), scratch.lanes.end(), 0.0);
  for_blocks(chunk, [&](int64_t begin, int n) {
    if (base != nullptr) k.load(*base, begin, n, scratch.blocks[0]);
    for (int t = 0; t < groups.n_experts; ++t)
      k.load(groups.experts_of(chunk.group)[t], begin, n, scratch.blocks[1 + t]);
    k.inner_products(base == nullptr ? nullptr : scratch.blocks[0], scratch.blocks[1], n, groups.n_experts,
                     scratch.lanes.data());
  });
  for (int64_t p = 0; p < pairs; ++p) {
    sums[p] = 0;
    for (int i = 0; i < kLanes; ++i) sums[p] += scratch.lanes[p * kLanes + i];
  }
}

// Of the groups whose compute type is C.
template <class C>
void of_groups(const Groups& groups, double* grams, int threads) {
  const int n_experts = groups.n_experts;
  const int64_t pairs = int64_t(n_experts) * (n_experts + 1) / 2;
  std::vector<Chunk> chunks;
  for (int64_t g = 0; g < groups.size(); ++g)
    if (groups.is_double(g) == (sizeof(C) == 8)) add_chunks(groups, g, chunks);
  std::vector<double> partial(chunks.size() * pairs);
  parallel_for(static_cast<int64_t>(chunks.size()), threads, [&] { return Scratch<C>(n_experts, pairs); },
               [&](int64_t i, Scratch<C>& scratch) {
                 of_chunk(groups, chunks[i], scratch, partial.data() + i * pairs, pairs);
               });
  for (size_t i = 0; i < chunks.size(); ++i) {
    const double* sum = partial.data() + i * pairs;
    double* gram = grams + chunks[i].group * n_experts * n_experts;
    for (int s = 0; s < n_experts; ++s)
      for (int t = s; t < n_experts; ++t) gram[s * n_experts + t] += *sum++;
  }
}

}  // namespace

void inner_products(const Groups& groups, double* grams, int threads) {
  const int64_t n = groups.n_experts;
  std::fill(grams, grams + groups.size() * n * n, 0.0);
  of_groups<float>(groups, grams, threads);
  of_groups<double>(groups, grams, threads);
  for (int64_t g = 0; g < groups.size(); ++g, grams += n * n)
    for (int64_t s = 0; s < n; ++s)
      for (int64_t t = 0; t < s; ++t) grams[s * n + t] = grams[t * n + s];
}

}  // namespace resm::cpu
