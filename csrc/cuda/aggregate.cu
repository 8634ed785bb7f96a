// aggregate on the GPU: eight elements a thread at a time where addresses allow, by the rules of csrc/common/elect.h.
//
// The arithmetic is the CPU's, operation by operation (compiled with --fmad=false), so that both give the same bits.
// TIES must know the elected sign before it can add the terms that agree: it reads the experts a second time, from cache.
#include "cuda/elements.h"

namespace resm::cuda {
namespace {

// kSparse: thresholds, masks or both may leave elements out.
template <class Kind, bool kTies, bool kSparse>
struct Aggregate {
  using C = typename Kind::Compute;
  static constexpr int kThreads = 256, kResident = 3;
  struct Shared {};

  Group group;
  const double *factors, *divisors;
  Thresholds thresholds;
  Array merged;
  int64_t* nonfinite;
  C scale, min_divisor;
  Vote vote;
  bool normalize;

  RESM_DEVICE static C number(const double* numbers, int t) { return static_cast<C>(constant(numbers + t)); }
  RESM_DEVICE Term<C> term(int t) const {
    const C factor = number(factors, t);
    if (!kSparse || thresholds.lower == nullptr) return {factor, {C(0), C(0), false}};
    return {factor, {number(thresholds.lower, t), number(thresholds.upper, t), true}};
  }

  // A thread's values of kWidth elements from i on.
  template <int kWidth>
  struct Elements {
    const Aggregate& merge;
    int64_t i;
    C divisor_sum;
    C origin[kWidth] = {}, total[kWidth] = {}, agreeing[kWidth] = {}, divisor[kWidth] = {};

    RESM_DEVICE void count(const C (&values)[kWidth], int input) const {
      const int bad = count_nonfinite(values);
      if (bad > 0) atomic_add(merge.nonfinite + input, int64_t(bad));
    }

    // Experts t … t + kCount − 1: all are read before the first is needed.
    template <int kCount, bool kElected>
    RESM_DEVICE void add(int t) {
      C values[kCount][kWidth];
      uint32_t bits[kCount];
      for (int e = 0; e < kCount; ++e) {
        load(Kind::expert(merge.group, t + e), i, values[e]);
        bits[e] = kSparse ? mask_bits(merge.group, t + e, i) : ~0u;
      }
      for (int e = 0; e < kCount; ++e) {
        const Term<C> term = merge.term(t + e);
        const C weight = kElected ? merge.number(merge.divisors, t + e) : C(0);
        if (!kElected) count(values[e], 1 + t + e);
        for (int j = 0; j < kWidth; ++j) {
          const C value = term.of(values[e][j], origin[j], (bits[e] >> j & 1u) != 0);
          if (!kElected) {
            total[j] = total[j] + value;
          } else {
            const bool counts = agrees(value, total[j]);
            agreeing[j] = agreeing[j] + (counts ? elected_term(value, weight, merge.vote) : C(0));
            divisor[j] = divisor[j] + (counts ? weight : C(0));
          }
        }
      }
    }

    template <bool kElected>
    RESM_DEVICE void add_all() {
      const int n_experts = merge.group.n_experts;
      int t = 0;
      // From cache, 32 bytes in flight are enough: two experts of a half type, one of fp32.
      if constexpr (kWidth > 1 && (!kElected || Kind::kBytes == 2))
        for (; t + 2 <= n_experts; t += 2) add<2, kElected>(t);
      for (; t < n_experts; ++t) add<1, kElected>(t);
    }

    RESM_DEVICE void run() {
      const bool has_base = merge.group.base.data != nullptr;
      if (has_base) {
        load(Kind::base(merge.group), i, origin);
        count(origin, 0);
      }
      // Adding x to −0.0 gives x, also where x is −0.0.
      for (int j = 0; j < kWidth; ++j) total[j] = agreeing[j] = C(-0.0);
      add_all<false>();
      if (kTies) {
        add_all<true>();
        for (int j = 0; j < kWidth; ++j) total[j] = agreeing[j];
      }
      for (int j = 0; j < kWidth; ++j) {
        if (merge.normalize) total[j] = total[j] / (kTies ? divisor_of(divisor[j], merge.min_divisor) : divisor_sum);
        total[j] = total[j] * merge.scale;
        if (has_base) total[j] = origin[j] + total[j];
      }
      store(merge.merged, i, total);
    }
  };

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    const Chunk chunk = chunk_of<Kind>(group, block.index());
    C divisor_sum = C(0);  // in the experts' order, as the divisors of elections are added
    if (!kTies && normalize)
      for (int t = 0; t < group.n_experts; ++t) divisor_sum = divisor_sum + number(divisors, t);
    block.each([&](int thread) {
      if constexpr (Kind::kWide)
        for (int64_t i = chunk.begin + thread * kVector; i < chunk.wide_end; i += kThreads * kVector)
          Elements<kVector>{*this, i, divisor_sum}.run();
      for (int64_t i = chunk.wide_end + thread; i < chunk.end; i += kThreads) Elements<1>{*this, i, divisor_sum}.run();
    });
  }
};

}  // namespace

void aggregate(const Group& group, const AggregateOptions& options, const AggregateResult& result, Stream stream) {
  with_dtypes(group, [&](auto kind) {
    using Kind = decltype(kind);
    using C = typename Kind::Compute;
    const auto merge = [&](auto ties, auto sparse) {
      const Aggregate<Kind, decltype(ties)::value, decltype(sparse)::value> kernel{group,
                                                                                   options.factors,
                                                                                   options.divisors,
                                                                                   options.thresholds,
                                                                                   result.merged,
                                                                                   result.nonfinite,
                                                                                   static_cast<C>(options.scale),
                                                                                   static_cast<C>(options.min_divisor),
                                                                                   options.vote,
                                                                                   options.normalize};
      launch("aggregate", kernel, group.blocks(), stream);
    };
    const bool sparse = options.thresholds.lower != nullptr || group.masks != nullptr;
    if (options.rule == Rule::ties)
      return sparse ? merge(std::true_type(), std::true_type()) : merge(std::true_type(), std::false_type());
    return sparse ? merge(std::false_type(), std::true_type()) : merge(std::false_type(), std::false_type());
  });
}

}  // namespace resm::cuda
