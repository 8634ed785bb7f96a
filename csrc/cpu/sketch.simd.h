// Inner loop of sketch; random_matrix.simd.h has the one that draws the random matrix.
#pragma once

namespace resm::cpu::RESM_ISA {

void add_sketch(const float* left, int rows, const float* right, int columns, int depth, float* out,
                int64_t out_stride) {
  add_product<kDepth, 1, kPanel>(left, rows, right, columns, depth, out, out_stride);
}

}  // namespace resm::cpu::RESM_ISA
