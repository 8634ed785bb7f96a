// inner_products: every element is read once. Products of two fp32 values are exact in double. They are added up by lanes
// within a chunk, then lanes and chunks in their order: the same bits for any number of threads.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

template <class C>
struct ProductBlocks {
  ProductBlocks(int n_experts, int64_t pairs) : blocks(n_experts + 1), lanes(pairs * kLanes) {}
  Blocks<C> blocks;  // base, then the experts
  std::vector<double> lanes;
};

// sums: for each pair of experts s <= t, in the order of s, then of t, the sum of their products.
template <class C>
void multiply_chunk(const Group& group, const Chunk& chunk, ProductBlocks<C>& memory, double* sums, int64_t pairs) {
  const auto& k = kernels().of<C>();
  C* base = group.base ? memory.blocks[0] : nullptr;
  std::fill(memory.lanes.begin(), memory.lanes.end(), 0.0);
  for_blocks(chunk, [&](int64_t begin, int n) {
    if (base != nullptr) k.load(*group.base, begin, n, base);
    for (int t = 0; t < group.n_experts(); ++t) k.load(group.experts[t], begin, n, memory.blocks[1 + t]);
    k.inner_products(base, memory.blocks[1], n, group.n_experts(), memory.lanes.data());
  });
  for (int64_t p = 0; p < pairs; ++p) {
    sums[p] = 0;
    for (int i = 0; i < kLanes; ++i) sums[p] += memory.lanes[p * kLanes + i];
  }
}

// Adds the upper triangles to grams.
template <class C>
void multiply_group(const Group& group, double* grams, int threads) {
  const int n_experts = group.n_experts();
  const int64_t pairs = int64_t(n_experts) * (n_experts + 1) / 2;
  const std::vector<Chunk> chunks = chunks_of(group);
  std::vector<double> partial(chunks.size() * pairs);
  parallel_for(
      static_cast<int64_t>(chunks.size()), threads, [&] { return ProductBlocks<C>(n_experts, pairs); },
      [&](int64_t i, ProductBlocks<C>& memory) {
        multiply_chunk(group, chunks[i], memory, partial.data() + i * pairs, pairs);
      });
  for (size_t i = 0; i < chunks.size(); ++i) {
    const double* sum = partial.data() + i * pairs;
    double* gram = grams + chunks[i].row * n_experts * n_experts;
    for (int s = 0; s < n_experts; ++s)
      for (int t = s; t < n_experts; ++t) gram[s * n_experts + t] += *sum++;
  }
}

}  // namespace

void inner_products(const Group& group, double* grams, int threads) {
  const int64_t n = group.n_experts();
  if (group.in_double())
    multiply_group<double>(group, grams, threads);
  else
    multiply_group<float>(group, grams, threads);
  for (int64_t row = 0; row < group.rows; ++row, grams += n * n)
    for (int64_t s = 0; s < n; ++s)
      for (int64_t t = 0; t < s; ++t) grams[s * n + t] = grams[t * n + s];
}

}  // namespace resm::cpu
