// Inner loops of project.
#pragma once

namespace resm::cpu::RESM_ISA {

void add_projection(const float* left, int rows, const float* right, int columns, int depth, float* out,
                    int64_t out_stride) {
  add_product<1, kStripRows, kSpan>(left, rows, right, columns, depth, out, out_stride);
}

}  // namespace resm::cpu::RESM_ISA
