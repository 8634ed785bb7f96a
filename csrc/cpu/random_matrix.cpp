// random_matrix: entries are drawn into the caller's memory, several whole rows or a part of a row at a time.
#include "cpu/chunks.h"

namespace resm::cpu {
namespace {

constexpr int64_t kPairsAtOnce = 4096;

}  // namespace

void random_matrix(const RandomMatrixOptions& options, float* out, int threads) {
  const int64_t n = options.n, columns = options.columns, first_column = options.first_column;
  if (n == 0 || columns == 0) return;
  const int64_t shift = first_column % 2, pairs = (shift + columns + 1) / 2;  // a pair may begin before first_column
  // A task draws a part of one row, or several whole rows.
  const int64_t width = std::min(pairs, kPairsAtOnce), parts = ceil_div(pairs, width), run = kPairsAtOnce / width;
  const bool whole_pairs = shift == 0 && columns % 2 == 0;
  parallel_for(
      ceil_div(n, run) * parts, threads, [&] { return Blocks<float>(blocks_for(whole_pairs ? 0 : 2 * run * width)); },
      [&](int64_t task, Blocks<float>& scratch) {
        const int64_t row = task / parts * run, count = std::min(run, n - row);
        const int64_t pair = task % parts * width, n_pairs = std::min(width, pairs - pair);
        float* drawn = whole_pairs ? out + row * columns + 2 * pair : scratch[0];
        kernels().products.random_rows(options.seed, row, static_cast<int>(count),
                                       static_cast<uint32_t>(first_column / 2 + pair), n_pairs, drawn);
        if (whole_pairs) return;
        const int64_t start = 2 * pair - shift;  // the column that the first entry drawn belongs to
        const int64_t begin = std::max<int64_t>(start, 0), end = std::min(start + 2 * n_pairs, columns);
        for (int64_t r = 0; r < count; ++r)
          std::copy_n(drawn + 2 * r * n_pairs + begin - start, end - begin, out + (row + r) * columns + begin);
      });
}

}  // namespace resm::cpu
