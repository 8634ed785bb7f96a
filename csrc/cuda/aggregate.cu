// aggregate on the GPU: eight elements a thread at a time where addresses allow, by the rules of csrc/common/elect.h.
//
// The arithmetic is the CPU's, operation by operation (compiled with --fmad=false), so that both give the same bits.
// TIES needs the elected sign before it can add what agrees: the experts are read a second time, from cache.
#include "common/elect.h"
#include "cuda/ops.h"
#include "cuda/table.h"

namespace resm::cuda {
namespace {

template <class Kind, bool kTies>
struct Aggregate {
  using C = typename Kind::Compute;
  static constexpr int kThreads = 256, kResident = 3;
  struct Shared {};

  Table table;
  Kind dtypes;
  DType out;
  int32_t n_experts;
  bool has_base, normalize;
  const double *weights, *thresholds;
  C scale;
  int64_t* nonfinite;

  RESM_DEVICE Share<C> share(int64_t tensor, int t) const {
    const int64_t at = tensor * n_experts + t;
    const bool trims = thresholds != nullptr;
    return {static_cast<C>(constant(weights + at)), trims ? static_cast<C>(constant(thresholds + at)) : C(0), trims};
  }

  // What a thread knows of kWidth elements from i on.
  template <int kWidth>
  struct Elements {
    const Aggregate& merge;
    const Table::Chunk& chunk;
    int64_t i;
    C origin[kWidth] = {}, total[kWidth] = {}, agreeing[kWidth] = {}, divisor[kWidth] = {};
    C weight_sum = C(0);

    RESM_DEVICE void count(const C (&values)[kWidth], int input) const {
      const int found = count_nonfinite(values);
      if (found > 0) atomic_add(merge.nonfinite + chunk.tensor * (1 + merge.n_experts) + input, int64_t(found));
    }

    // Experts t … t + kCount − 1: all are read before the first is needed.
    template <int kCount, bool kElected>
    RESM_DEVICE void add(int t) {
      C values[kCount][kWidth];
      for (int e = 0; e < kCount; ++e)
        load(chunk.array((merge.has_base ? 2 : 1) + t + e, merge.dtypes.expert()), i, values[e]);
      for (int e = 0; e < kCount; ++e) {
        const Share<C> share = merge.share(chunk.tensor, t + e);
        if (!kElected) {
          count(values[e], 1 + t + e);
          weight_sum = weight_sum + share.weight;
        }
        for (int j = 0; j < kWidth; ++j) {
          const C weighted = share.of(values[e][j], origin[j]);
          if (!kElected) {
            total[j] = total[j] + weighted;
          } else {
            const bool counts = agrees(weighted, total[j]);
            agreeing[j] = agreeing[j] + (counts ? weighted : C(0));
            divisor[j] = divisor[j] + (counts ? share.weight : C(0));
          }
        }
      }
    }

    template <bool kElected>
    RESM_DEVICE void add_all() {
      int t = 0;
      if constexpr (kWidth > 1)
        for (; t + 2 <= merge.n_experts; t += 2) add<2, kElected>(t);
      for (; t < merge.n_experts; ++t) add<1, kElected>(t);
    }

    RESM_DEVICE void run() {
      if (merge.has_base) {
        load(chunk.array(1, merge.dtypes.base()), i, origin);
        count(origin, 0);
      }
      for (int j = 0; j < kWidth; ++j) total[j] = C(-0.0);  // the zero to which adding x gives x, -0.0 included
      add_all<false>();
      if (kTies) {
        add_all<true>();
        for (int j = 0; j < kWidth; ++j) {
          total[j] = agreeing[j];
          divisor[j] = divisor[j] == C(0) ? C(1) : divisor[j];
        }
      }
      for (int j = 0; j < kWidth; ++j) {
        if (merge.normalize) total[j] = total[j] / (kTies ? divisor[j] : weight_sum);
        total[j] = total[j] * merge.scale;
        if (merge.has_base) total[j] = origin[j] + total[j];
      }
      store(chunk.array(0, merge.out), i, total);
    }
  };

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    const int64_t wide_end = Kind::kWide ? chunk.wide_end(table.per_tensor) : chunk.begin;
    block.each([&](int thread) {
      if constexpr (Kind::kWide)
        for (int64_t i = chunk.begin + thread * kVector; i < wide_end; i += kThreads * kVector)
          Elements<kVector>{*this, chunk, i}.run();
      for (int64_t i = wide_end + thread; i < chunk.end; i += kThreads) Elements<1>{*this, chunk, i}.run();
    });
  }
};

}  // namespace
}  // namespace resm::cuda

const char* aggregate_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                           int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t out_dtype,
                           int64_t in_double, int64_t weights, int64_t thresholds, double scale, int64_t rule,
                           int64_t normalize, int64_t nonfinite, int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  const bool has_base = base_dtype >= 0;
  const Table tensors{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps),
                      static_cast<int32_t>(n_experts + (has_base ? 2 : 1)), chunk};
  return with_dtypes(base_dtype, expert_dtype, in_double != 0, [&](auto dtypes) {
    using Kind = decltype(dtypes);
    const auto merge = [&](auto ties) {
      const Aggregate<Kind, decltype(ties)::value> kernel{tensors,
                                                          dtypes,
                                                          static_cast<DType>(out_dtype),
                                                          static_cast<int32_t>(n_experts),
                                                          has_base,
                                                          normalize != 0,
                                                          reinterpret_cast<const double*>(weights),
                                                          reinterpret_cast<const double*>(thresholds),
                                                          static_cast<typename Kind::Compute>(scale),
                                                          reinterpret_cast<int64_t*>(nonfinite)};
      return launch("aggregate", kernel, blocks, stream);
    };
    return static_cast<Rule>(rule) == Rule::ties ? merge(std::true_type()) : merge(std::false_type());
  });
}
