// aggregate on the GPU: eight elements a thread at a time where addresses allow, by the rules of csrc/common/elect.h.
//
// The arithmetic is the CPU's, operation by operation (compiled with --fmad=false), so that both give the same bits.
// TIES needs the elected sign before it can add what agrees: the experts are read a second time, from cache.
#include "common/elect.h"
#include "cuda/ops.h"
#include "cuda/table.h"

namespace resm::cuda {
namespace {

// kSparse: thresholds, masks or both may leave something out.
template <class Kind, bool kTies, bool kSparse>
struct Aggregate {
  using C = typename Kind::Compute;
  static constexpr int kThreads = 256, kResident = 3;
  struct Shared {};

  Table table;
  Kind dtypes;
  DType out;
  int32_t n_experts;
  bool has_base, masked, normalize;
  const double *factors, *weights, *lower, *upper;
  C scale;
  Vote vote;
  C min_divisor;
  int64_t* nonfinite;

  RESM_DEVICE int first_expert() const { return has_base ? 2 : 1; }
  RESM_DEVICE C number(const double* of, int64_t tensor, int t) const {
    return static_cast<C>(constant(of + tensor * n_experts + t));
  }
  RESM_DEVICE Term<C> term(int64_t tensor, int t) const {
    const C factor = number(factors, tensor, t);
    if (!kSparse || lower == nullptr) return {factor, {C(0), C(0), false}};
    return {factor, {number(lower, tensor, t), number(upper, tensor, t), true}};
  }

  // What a thread knows of kWidth elements from i on.
  template <int kWidth>
  struct Elements {
    const Aggregate& merge;
    const Table::Chunk& chunk;
    int64_t i;
    C weight_sum;
    C origin[kWidth] = {}, total[kWidth] = {}, agreeing[kWidth] = {}, divisor[kWidth] = {};

    RESM_DEVICE void count(const C (&values)[kWidth], int input) const {
      const int found = count_nonfinite(values);
      if (found > 0) atomic_add(merge.nonfinite + chunk.tensor * (1 + merge.n_experts) + input, int64_t(found));
    }

    // The mask's bits of the elements, from the lowest: kWidth of eight are one whole byte.
    RESM_DEVICE uint32_t kept(int t) const {
      if (!kSparse || !merge.masked) return ~0u;
      return mask_byte(chunk.addresses, merge.first_expert() + merge.n_experts + t, i) >> i % 8;
    }

    // Experts t … t + kCount − 1: all are read before the first is needed.
    template <int kCount, bool kElected>
    RESM_DEVICE void add(int t) {
      C values[kCount][kWidth];
      uint32_t bits[kCount];
      for (int e = 0; e < kCount; ++e) {
        load(chunk.array(merge.first_expert() + t + e, merge.dtypes.expert()), i, values[e]);
        bits[e] = kept(t + e);
      }
      for (int e = 0; e < kCount; ++e) {
        const Term<C> term = merge.term(chunk.tensor, t + e);
        const C weight = kElected ? merge.number(merge.weights, chunk.tensor, t + e) : C(0);
        if (!kElected) count(values[e], 1 + t + e);
        for (int j = 0; j < kWidth; ++j) {
          const C own = term.of(values[e][j], origin[j], (bits[e] >> j & 1u) != 0);
          if (!kElected) {
            total[j] = total[j] + (kTies ? vote_of(own, merge.vote) : own);
          } else {
            const bool counts = agrees(own, total[j]);
            agreeing[j] = agreeing[j] + (counts ? elected_term(own, weight, merge.vote) : C(0));
            divisor[j] = divisor[j] + (counts ? weight : C(0));
          }
        }
      }
    }

    template <bool kElected>
    RESM_DEVICE void add_all() {
      int t = 0;
      // From cache, 32 bytes on their way are enough: two experts of a half type, one of fp32.
      if constexpr (kWidth > 1 && (!kElected || Kind::kBytes == 2))
        for (; t + 2 <= merge.n_experts; t += 2) add<2, kElected>(t);
      for (; t < merge.n_experts; ++t) add<1, kElected>(t);
    }

    RESM_DEVICE void run() {
      if (merge.has_base) {
        load(chunk.array(1, merge.dtypes.base()), i, origin);
        count(origin, 0);
      }
      // The zero to which adding x gives x, -0.0 included.
      for (int j = 0; j < kWidth; ++j) total[j] = agreeing[j] = C(-0.0);
      add_all<false>();
      if (kTies) {
        add_all<true>();
        for (int j = 0; j < kWidth; ++j) total[j] = agreeing[j];
      }
      for (int j = 0; j < kWidth; ++j) {
        if (merge.normalize) total[j] = total[j] / (kTies ? divisor_of(divisor[j], merge.min_divisor) : weight_sum);
        total[j] = total[j] * merge.scale;
        if (merge.has_base) total[j] = origin[j] + total[j];
      }
      store(chunk.array(0, merge.out), i, total);
    }
  };

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    const int64_t wide_end = Kind::kWide ? chunk.wide_end(first_expert() + n_experts) : chunk.begin;
    C weight_sum = C(0);  // in the experts' order, as divisors of elections are
    if (!kTies && normalize)
      for (int t = 0; t < n_experts; ++t) weight_sum = weight_sum + number(weights, chunk.tensor, t);
    block.each([&](int thread) {
      if constexpr (Kind::kWide)
        for (int64_t i = chunk.begin + thread * kVector; i < wide_end; i += kThreads * kVector)
          Elements<kVector>{*this, chunk, i, weight_sum}.run();
      for (int64_t i = wide_end + thread; i < chunk.end; i += kThreads) Elements<1>{*this, chunk, i, weight_sum}.run();
    });
  }
};

}  // namespace
}  // namespace resm::cuda

const char* aggregate_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                           int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t out_dtype,
                           int64_t in_double, int64_t factors, int64_t weights, int64_t lower, int64_t upper,
                           int64_t masked, double scale, int64_t rule, int64_t normalize, int64_t vote,
                           double min_divisor, int64_t nonfinite, int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  const bool has_base = base_dtype >= 0;
  const Table tensors{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps),
                      static_cast<int32_t>(n_experts * (masked != 0 ? 2 : 1) + (has_base ? 2 : 1)), chunk};
  return with_dtypes(base_dtype, expert_dtype, in_double != 0, [&](auto dtypes) {
    using Kind = decltype(dtypes);
    using C = typename Kind::Compute;
    const auto merge = [&](auto ties, auto sparse) {
      const Aggregate<Kind, decltype(ties)::value, decltype(sparse)::value> kernel{
          tensors,
          dtypes,
          static_cast<DType>(out_dtype),
          static_cast<int32_t>(n_experts),
          has_base,
          masked != 0,
          normalize != 0,
          reinterpret_cast<const double*>(factors),
          reinterpret_cast<const double*>(weights),
          reinterpret_cast<const double*>(lower),
          reinterpret_cast<const double*>(upper),
          static_cast<C>(scale),
          static_cast<Vote>(vote),
          static_cast<C>(min_divisor),
          reinterpret_cast<int64_t*>(nonfinite)};
      return launch("aggregate", kernel, blocks, stream);
    };
    const bool sparse = lower != 0 || masked != 0;
    if (static_cast<Rule>(rule) == Rule::ties)
      return sparse ? merge(std::true_type(), std::true_type()) : merge(std::true_type(), std::false_type());
    return sparse ? merge(std::false_type(), std::true_type()) : merge(std::false_type(), std::false_type());
  });
}
