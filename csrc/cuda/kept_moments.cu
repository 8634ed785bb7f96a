// kept_moments on the GPU: sums in float64, chunk by chunk, added up in a fixed order.
#include "common/elect.h"
#include "cuda/ops.h"
#include "cuda/table.h"

namespace resm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSums = 3;  // of |δ|, of the kept |δ| and of their squares

template <class Kind>
struct Chunks {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
  };

  Table table;
  Kind dtypes;
  int32_t n_experts;
  bool masked;
  const double *lower, *upper;
  double* rows;  // (blocks, T, kSums)

  struct Sums {
    double all = 0, kept = 0, kept_sq = 0;
  };

  RESM_DEVICE Trim<C> trim_of(int t) const {
    if (lower == nullptr) return {C(0), C(0), false};
    return {static_cast<C>(constant(lower + t)), static_cast<C>(constant(upper + t)), true};
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    const int64_t wide_end = Kind::kWide ? chunk.wide_end(1 + n_experts) : chunk.begin;
    const Array base = chunk.array(0, dtypes.base());
    for (int t = 0; t < n_experts; ++t) {
      const Array expert = chunk.array(1 + t, dtypes.expert());
      const Trim<C> trim = trim_of(t);
      PerThread<Sums, kThreads> sums;
      block.each([&](int thread) {
        const auto add = [&](const auto& delta, int64_t i) {
          const uint32_t bits = masked ? mask_byte(chunk.addresses, 1 + n_experts + t, i) >> i % 8 : ~0u;
          int j = 0;
          for (const C d : delta) {
            const bool kept = (bits >> j++ & 1u) != 0;
            const double size = bits_as<C>(key_of(d)), rest = bits_as<C>(key_of(trim.of(d, kept)));
            sums[thread].all += size;
            sums[thread].kept += rest;
            sums[thread].kept_sq += rest * rest;
          }
        };
        for_deltas<Kind, kThreads>(chunk, wide_end, base, expert, thread, add);
      });
      double* row = rows + (block.index() * n_experts + t) * kSums;
      PerThread<double, kThreads> own;
      for (int which = 0; which < kSums; ++which) {
        block.each([&](int thread) {
          const Sums& of = sums[thread];
          own[thread] = which == 0 ? of.all : which == 1 ? of.kept : of.kept_sq;
        });
        const double total = sum_of(block, own, shared.sums);
        block.each([&](int thread) {
          if (thread == 0) row[which] = total;
        });
      }
    }
  }
};

// A block for each expert and sum: what the chunks' rows add up to.
struct Totals {
  static constexpr int kThreads = cuda::kThreads, kResident = 3;
  struct Shared {
    double sums[kWarps];
  };

  const double* rows;
  int64_t n_rows, width;
  double* moments;  // (T, kSums), width numbers

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const double total = combined_rows(block, rows + block.index(), n_rows, width, shared.sums,
                                       [](double a, double b) { return a + b; });
    block.each([&](int thread) {
      if (thread == 0) moments[block.index()] = total;
    });
  }
};

}  // namespace
}  // namespace resm::cuda

const char* kept_moments_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                              int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double,
                              int64_t lower, int64_t upper, int64_t masked, int64_t rows, int64_t moments,
                              int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  constexpr const char* kName = "kept_moments";
  const auto experts = static_cast<int32_t>(n_experts);
  const Table tensors{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps),
                      1 + experts * (masked != 0 ? 2 : 1), chunk};
  auto* const parts = reinterpret_cast<double*>(rows);
  const char* error = with_dtypes(base_dtype, expert_dtype, in_double != 0, [&](auto dtypes) {
    const Chunks<decltype(dtypes)> kernel{tensors,
                                          dtypes,
                                          experts,
                                          masked != 0,
                                          reinterpret_cast<const double*>(lower),
                                          reinterpret_cast<const double*>(upper),
                                          parts};
    return launch(kName, kernel, blocks, stream);
  });
  if (error != nullptr) return error;
  const int64_t width = n_experts * kSums;
  return launch(kName, Totals{parts, blocks, width, reinterpret_cast<double*>(moments)}, width, stream);
}
