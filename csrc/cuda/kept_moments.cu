// kept_moments on the GPU: sums in float64, chunk by chunk, added up in a fixed order.
#include "cuda/elements.h"

namespace resm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kSums = 3;  // of |δ|, of the |δ| that thresholds and mask keep, and of their squares
constexpr const char* kName = "kept_moments";

template <class Kind>
struct ChunkSums {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    double sums[kWarps];
  };

  Group group;
  Thresholds thresholds;
  double* chunk_sums;  // (blocks, T, kSums)

  struct Sums {
    double all = 0, kept = 0, kept_sq = 0;
  };

  RESM_DEVICE Trim<C> trim_of(int t) const {
    if (thresholds.lower == nullptr) return {C(0), C(0), false};
    return {static_cast<C>(constant(thresholds.lower + t)), static_cast<C>(constant(thresholds.upper + t)), true};
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Chunk chunk = chunk_of<Kind>(group, block.index());
    for (int t = 0; t < group.n_experts; ++t) {
      const Trim<C> trim = trim_of(t);
      PerThread<Sums, kThreads> sums;
      block.each([&](int thread) {
        const auto add = [&](const auto& delta, int64_t i) {
          const uint32_t bits = mask_bits(group, t, i);
          int j = 0;
          for (const C d : delta) {
            const bool kept = (bits >> j++ & 1u) != 0;
            const double size = bits_as<C>(key_of(d)), rest = bits_as<C>(key_of(trim.of(d, kept)));
            sums[thread].all += size;
            sums[thread].kept += rest;
            sums[thread].kept_sq += rest * rest;
          }
        };
        for_deltas<Kind, kThreads>(chunk, Kind::base(group), Kind::expert(group, t), thread, add);
      });
      double* totals = chunk_sums + (block.index() * group.n_experts + t) * kSums;
      PerThread<double, kThreads> values;
      for (int field = 0; field < kSums; ++field) {
        block.each([&](int thread) {
          const Sums& sum = sums[thread];
          values[thread] = field == 0 ? sum.all : field == 1 ? sum.kept : sum.kept_sq;
        });
        const double total = sum_of(block, values, shared.sums);
        block.each([&](int thread) {
          if (thread == 0) totals[field] = total;
        });
      }
    }
  }
};

// One block for each expert and sum adds up the chunks' sums.
struct Totals {
  static constexpr int kThreads = cuda::kThreads, kResident = 3;
  struct Shared {
    double sums[kWarps];
  };

  const double* chunk_sums;
  int64_t n_chunks, width;
  double* moments;  // (T, kSums): `width` numbers

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const double total = combined_rows(block, chunk_sums + block.index(), n_chunks, width, shared.sums,
                                       [](double a, double b) { return a + b; });
    block.each([&](int thread) {
      if (thread == 0) moments[block.index()] = total;
    });
  }
};

}  // namespace

void kept_moments(const Group& group, const Thresholds& thresholds, double* moments, double* chunk_sums,
                  Stream stream) {
  with_dtypes(group, [&](auto kind) {
    launch(kName, ChunkSums<decltype(kind)>{group, thresholds, chunk_sums}, group.blocks(), stream);
  });
  const int64_t width = group.n_experts * kSums;
  launch(kName, Totals{chunk_sums, group.blocks(), width, moments}, width, stream);
}

}  // namespace resm::cuda
