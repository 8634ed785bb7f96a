// project: multiplies strips of qᵀ by blocks of columns of Δ, which are formed where they are used.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int64_t kPackedBytes = int64_t(8) << 20;  // of q that are packed at a time, but for wide ones

}  // namespace

void project(const DeltaMatrix& delta, const float* q, int64_t l, float* b, int threads) {
  std::fill(b, b + l * delta.n, 0.0f);
  if (delta.m == 0 || delta.n == 0 || l == 0) return;
  const ProductKernels& k = kernels().products;
  // Strip s of qᵀ: kStripRows columns of q, zeros where q has no more, in the order of q's rows.
  const int64_t strips = ceil_div(l, kStripRows), fitting = kPackedBytes / (strips * kStripRows * sizeof(float));
  const int64_t span = std::min(std::max<int64_t>(fitting / kDepth, 1) * kDepth, ceil_div(delta.m, kDepth) * kDepth);
  Blocks<float> packed(blocks_for(strips * span * kStripRows));
  std::fill(packed[0], packed[0] + strips * span * kStripRows, 0.0f);
  const auto strip_at = [&](int64_t strip, int64_t row) { return packed[0] + (strip * span + row) * kStripRows; };
  // How columns are shared out changes no bit: each output adds up its own column, in order.
  const int64_t panels = ceil_div(delta.n, kPanel);
  const int64_t task = std::clamp(panels / (4 * threads) * kPanel, int64_t(kPanel), int64_t(kSpan));
  for (int64_t start = 0; start < delta.m; start += span) {
    const int64_t height = std::min(span, delta.m - start);
    parallel_for(
        ceil_div(height, kDepth), threads, [] { return 0; },
        [&](int64_t i, int) {
          for (int64_t row = i * kDepth; row < std::min((i + 1) * kDepth, height); ++row)
            for (int64_t c = 0; c < l; c += kStripRows)
              std::copy_n(q + (start + row) * l + c, std::min<int64_t>(kStripRows, l - c),
                          strip_at(c / kStripRows, row));
        });
    parallel_for(
        ceil_div(delta.n, task), threads,
        [] {
          Blocks<float> block(blocks_for(kDepth * kSpan));
          std::fill(block[0], block[0] + kDepth * kSpan, 0.0f);
          return block;
        },
        [&](int64_t t, Blocks<float>& block) {
          const int64_t begin = t * task;
          const int columns = static_cast<int>(std::min(task, delta.n - begin));
          for (int64_t at = 0; at < height; at += kDepth) {
            const int depth = static_cast<int>(std::min<int64_t>(kDepth, height - at));
            k.delta_tile({delta.base, delta.expert, (start + at) * delta.n + begin, delta.n, depth, columns}, block[0],
                         kSpan);
            for (int c = 0; c < columns; c += kPanel)
              for (int64_t s = 0; s < strips; ++s)
                k.add_projection(strip_at(s, at), static_cast<int>(std::min<int64_t>(kStripRows, l - s * kStripRows)),
                                 block[0] + c, std::min(kPanel, columns - c), depth,
                                 b + s * kStripRows * delta.n + begin + c, delta.n);
          }
        });
  }
}

}  // namespace resm::cpu
