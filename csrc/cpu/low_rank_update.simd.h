// Inner loops of low_rank_update, in float and double.
#pragma once

namespace resm::cpu::RESM_ISA {

static_assert(kUpdatePanel<float> == 3 * kTile<float> && kUpdatePanel<double> == 3 * kTile<double>,
              "a panel is as wide as a tile of products");

// sums += left·right, kTile rows of a panel's columns, `stride` apart; or without the addition where they are fresh.
// Rows of left are kUpdateDepth apart, those of right a panel's width.
template <class C>
void add_update(const C* left, const C* right, int depth, bool fresh, C* sums, int64_t stride) {
  const eigen::Left<C> rows{left, kUpdateDepth<C>, 1};
  const eigen::Right<C> columns{right, kUpdatePanel<C>, kTile<C>};
  const eigen::Result<C> into{sums, stride, kTile<C>};
  if (fresh)
    eigen::multiply_into<C, eigen::Store::set, 3>(depth, rows, columns, into);
  else
    eigen::multiply_into<C, eigen::Store::add, 3>(depth, rows, columns, into);
}

// merged += update·scale
template <class C>
void add_scaled(const C* __restrict update, int n, C scale, C* __restrict merged) {
  for (int i = 0; i < n; ++i) merged[i] = merged[i] + update[i] * scale;
}

}  // namespace resm::cpu::RESM_ISA
