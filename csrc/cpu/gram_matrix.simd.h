// Inner loops of gram_matrix: products of panels of kGramPanel columns, in double. A product of two floats is exact in
// double, so that instruction sets that fuse it with the addition round the same.
#pragma once

namespace resm::cpu::RESM_ISA {

static_assert(kGramPanel == 3 * kTile<double>, "a panel is as wide as a tile of products");

// `rows` rows of `columns` <= kGramPanel columns, `stride` apart, in double; zeros in columns beyond.
void widen_panel(const float* from, int64_t stride, int rows, int columns, double* to) {
  for (int r = 0; r < rows; ++r, from += stride, to += kGramPanel) {
    if (columns == kGramPanel) {
#pragma GCC unroll 24
      for (int c = 0; c < kGramPanel; ++c) to[c] = from[c];
    } else {
      for (int c = 0; c < kGramPanel; ++c) to[c] = c < columns ? from[c] : 0.0;
    }
  }
}

// sum += aᵀ·b of two panels of `depth` rows; a's own triangle is as good as its square.
void add_panel_gram(const double* a, const double* b, int depth, double* sum) {
  for (int i = 0; i < kGramPanel; i += kTile<double>)
    eigen::multiply_into<double, eigen::Store::add, 3>(depth, {a + i, 1, kGramPanel}, {b, kGramPanel, kTile<double>},
                                                       {sum + i * kGramPanel, kGramPanel, kTile<double>});
}

}  // namespace resm::cpu::RESM_ISA
