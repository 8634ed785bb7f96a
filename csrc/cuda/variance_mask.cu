// variance_mask on the GPU: one kernel computes the variances; another makes the bits, after magnitude_threshold has
// selected the smallest variance to keep.
#include "cuda/elements.h"

namespace resm::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockBytes = 2048;  // bytes of a mask that a block makes
constexpr const char* kName = "variance_mask";

template <class Kind>
struct Variances {
  using C = typename Kind::Compute;
  static constexpr int kThreads = cuda::kThreads, kResident = 2;
  struct Shared {
    int64_t sums[kThreads / kWarp];
  };

  Group group;
  Array variances;
  int64_t* nonzero;

  // Welford's updates in double, in the order of the experts: equal δ give exactly 0. Returns how many of the variances
  // from element i on are not 0.
  template <int kWidth>
  RESM_DEVICE int write(int64_t i) const {
    C origin[kWidth], value[kWidth];
    double mean[kWidth], squares[kWidth];
    load(Kind::base(group), i, origin);
    load(Kind::expert(group, 0), i, value);
    for (int j = 0; j < kWidth; ++j) {
      mean[j] = static_cast<double>(C(value[j] - origin[j]));
      squares[j] = 0;
    }
    for (int t = 1; t < group.n_experts; ++t) {
      load(Kind::expert(group, t), i, value);
      for (int j = 0; j < kWidth; ++j) {
        const double delta = static_cast<double>(C(value[j] - origin[j])), change = delta - mean[j];
        mean[j] = mean[j] + change / static_cast<double>(t + 1);
        squares[j] = squares[j] + change * (delta - mean[j]);
      }
    }
    int count = 0;
    for (int j = 0; j < kWidth; ++j) {
      value[j] = static_cast<C>(squares[j] / static_cast<double>(group.n_experts));
      count += key_of(value[j]) != 0 ? 1 : 0;
    }
    store(variances, i, value);
    return count;
  }

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared& shared) const {
    const Chunk chunk = chunk_of<Kind>(group, block.index());
    PerThread<int64_t, kThreads> counts;
    block.each([&](int thread) {
      if constexpr (Kind::kWide)
        for (int64_t i = chunk.begin + thread * kVector; i < chunk.wide_end; i += kThreads * kVector)
          counts[thread] += write<kVector>(i);
      for (int64_t i = chunk.wide_end + thread; i < chunk.end; i += kThreads) counts[thread] += write<1>(i);
    });
    const int64_t total = sum_of(block, counts, shared.sums);
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

  const C* variances;
  int64_t length;
  const double* threshold;
  uint8_t* mask;
  int64_t bytes;

  RESM_DEVICE void operator()(const Block<kThreads>& block, Shared&) const {
    const C least = static_cast<C>(constant(threshold));
    const int64_t begin = block.index() * kBlockBytes;
    const int64_t end = begin + kBlockBytes < bytes ? begin + kBlockBytes : bytes;
    block.each([&](int thread) {
      for (int64_t byte = begin + thread; byte < end; byte += kThreads) {
        uint32_t bits = 0;
        RESM_UNROLL
        for (int j = 0; j < 8; ++j)
          if (8 * byte + j < length) bits |= (constant(variances + 8 * byte + j) >= least ? 1u : 0u) << j;
        mask[byte] = static_cast<uint8_t>(bits);
      }
    });
  }
};

}  // namespace

void variances(const Group& group, char* variances, int64_t* nonzero, Stream stream) {
  with_dtypes(group, [&](auto kind) {
    using Kind = decltype(kind);
    const Array out{variances, sizeof(typename Kind::Compute) == 4 ? DType::f32 : DType::f64};
    launch(kName, Variances<Kind>{group, out, nonzero}, group.blocks(), stream);
  });
}

void variance_mask(const Array& variances, int64_t length, const double* threshold, uint8_t* mask, Stream stream) {
  const int64_t bytes = mask_bytes(length);
  const auto pack = [&](const auto* values) {
    const Bits<std::decay_t<decltype(*values)>> kernel{values, length, threshold, mask, bytes};
    launch(kName, kernel, (bytes + kBlockBytes - 1) / kBlockBytes, stream);
  };
  return variances.dtype == DType::f64 ? pack(reinterpret_cast<const double*>(variances.data))
                                       : pack(reinterpret_cast<const float*>(variances.data));
}

}  // namespace resm::cuda
