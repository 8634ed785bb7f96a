// variance_mask on the GPU: the variances, and then, once magnitude_threshold has found which of them stays, the bits.
#include "cuda/ops.h"
#include "cuda/table.h"

namespace resm::cuda {
namespace {

constexpr int kThreads = 256;

template <class Kind>
struct Variances {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    int64_t sums[kThreads / kWarp];
  };

  Table table;
  Kind dtypes;
  int32_t n_experts;
  int64_t* nonzero;

  // Welford's updates in double, in the order of the experts: all δ the same give 0 exactly. Returns how many of the
  // elements from i on are not 0.
  template <int kWidth>
  RESM_DEVICE int write(const Table::Chunk& chunk, int64_t i) const {
    C origin[kWidth], value[kWidth];
    double mean[kWidth], squares[kWidth];
    load(chunk.array(1, dtypes.base()), i, origin);
    load(chunk.array(2, dtypes.expert()), i, value);
    for (int j = 0; j < kWidth; ++j) {
      mean[j] = static_cast<double>(C(value[j] - origin[j]));
      squares[j] = 0;
    }
    for (int t = 1; t < n_experts; ++t) {
      load(chunk.array(2 + t, dtypes.expert()), i, value);
      for (int j = 0; j < kWidth; ++j) {
        const double delta = static_cast<double>(C(value[j] - origin[j])), change = delta - mean[j];
        mean[j] = mean[j] + change / static_cast<double>(t + 1);
        squares[j] = squares[j] + change * (delta - mean[j]);
      }
    }
    int found = 0;
    for (int j = 0; j < kWidth; ++j) {
      value[j] = static_cast<C>(squares[j] / static_cast<double>(n_experts));
      found += key_of(value[j]) != 0 ? 1 : 0;
    }
    store(chunk.array(0, sizeof(C) == 4 ? DType::f32 : DType::f64), i, value);
    return found;
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    const int64_t wide_end = Kind::kWide ? chunk.wide_end(2 + n_experts) : chunk.begin;
    PerThread<int64_t, kThreads> found;
    block.each([&](int thread) {
      if constexpr (Kind::kWide)
        for (int64_t i = chunk.begin + thread * kVector; i < wide_end; i += kThreads * kVector)
          found[thread] += write<kVector>(chunk, i);
      for (int64_t i = wide_end + thread; i < chunk.end; i += kThreads) found[thread] += write<1>(chunk, i);
    });
    const int64_t total = sum_of(block, found, shared.sums);
    block.each([&](int thread) {
      if (thread == 0) atomic_add(nonzero, total);
    });
  }
};

// A thread makes one byte of the mask at a time.
template <class C>
struct Bits {
  static constexpr int kThreads = cuda::kThreads, kResident = 4;
  struct Shared {};

  Table table;  // of the mask's bytes
  int64_t length;
  const C* variances;
  const double* threshold;

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    const Table::Chunk chunk = table.chunk_of(block.index());
    const C least = static_cast<C>(constant(threshold));
    auto* mask = reinterpret_cast<uint8_t*>(constant(chunk.addresses));
    block.each([&](int thread) {
      for (int64_t at = chunk.begin + thread; at < chunk.end; at += kThreads) {
        uint32_t bits = 0;
        RESM_UNROLL
        for (int j = 0; j < 8; ++j)
          if (8 * at + j < length) bits |= (constant(variances + 8 * at + j) >= least ? 1u : 0u) << j;
        mask[at] = static_cast<uint8_t>(bits);
      }
    });
  }
};

}  // namespace
}  // namespace resm::cuda

const char* variances_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                           int64_t n_experts, int64_t base_dtype, int64_t expert_dtype, int64_t in_double,
                           int64_t nonzero, int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  const auto experts = static_cast<int32_t>(n_experts);
  const Table tensors{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps), 2 + experts,
                      chunk};
  return with_dtypes(base_dtype, expert_dtype, in_double != 0, [&](auto dtypes) {
    const Variances<decltype(dtypes)> kernel{tensors, dtypes, experts, reinterpret_cast<int64_t*>(nonzero)};
    return launch("variance_mask", kernel, blocks, stream);
  });
}

const char* variance_mask_cuda(int64_t table, int64_t n_tensors, int64_t steps, int64_t blocks, int64_t chunk,
                               int64_t length, int64_t in_double, int64_t variances, int64_t threshold,
                               int64_t stream) {
  using namespace resm;
  using namespace resm::cuda;
  const Table masks{reinterpret_cast<const int64_t*>(table), n_tensors, static_cast<int32_t>(steps), 1, chunk};
  const auto* const least = reinterpret_cast<const double*>(threshold);
  const auto pack = [&](const auto* values) {
    return launch("variance_mask", Bits<std::decay_t<decltype(*values)>>{masks, length, values, least}, blocks, stream);
  };
  return in_double != 0 ? pack(reinterpret_cast<const double*>(variances))
                        : pack(reinterpret_cast<const float*>(variances));
}
