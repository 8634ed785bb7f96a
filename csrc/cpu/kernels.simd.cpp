// The inner loops of every op for one instruction set: compiled once with each of CMakeLists.txt's flags.
//
// Everything here lies in the namespace RESM_ISA or is inlined. A function that the linker could share with another
// instruction set's copy (a std:: template, say) must not be used: the linker keeps any one of the copies.
#include "cpu/kernels.h"

// clang-format off: the order matters
#include "cpu/block.simd.h"
#include "cpu/lanes.simd.h"
#include "cpu/delta_stats.simd.h"
#include "cpu/magnitude_threshold.simd.h"
#include "cpu/sparsity.simd.h"
#include "cpu/aggregate.simd.h"
#include "cpu/inner_products.simd.h"
#include "cpu/kept_moments.simd.h"
#include "cpu/variance_mask.simd.h"
#include "cpu/gemm.simd.h"
#include "cpu/random_matrix.simd.h"
#include "cpu/random_mask.simd.h"
#include "cpu/project.simd.h"
#include "cpu/gram_product.simd.h"
#include "cpu/tiles.simd.h"
#include "cpu/gram_matrix.simd.h"
#include "cpu/low_rank_update.simd.h"
#include "cpu/tridiagonal.simd.h"
#include "cpu/symmetric_eigen.simd.h"
// clang-format on

namespace resm::cpu::RESM_ISA {

template <class C>
constexpr BlockKernels<C> block_kernels() {
  return {
      .load = load<C>,
      .store = store<C>,
      .count_nonfinite = count_nonfinite<C>,
      .moments = moments<C>,
      .outliers = outliers<C>,
      .histogram = histogram<C>,
      .bracket = bracket<C>,
      .aggregate = aggregate<C>,
      .add_update = add_update<C>,
      .add_scaled = add_scaled<C>,
      .inner_products = inner_products<C>,
      .kept_sums = kept_sums<C>,
      .keys = keys<C>,
      .count_cells = count_cells<C>,
      .count_keys = count_keys<C>,
      .variance = variance<C>,
      .split_values = split_values<C>,
  };
}

extern const Kernels table;
const Kernels table = {
    .isa = RESM_ISA_NAME,
    .f32 = block_kernels<float>(),
    .moments_bf16 = moments_bf16,
    .outliers_bf16 = outliers_bf16,
    .aggregate_bf16 = aggregate_bf16,
    .f64 = block_kernels<double>(),
    .products =
        {
            .delta_tile = delta_tile,
            .random_rows = random_rows,
            .add_projection = add_projection,
            .add_image = add_image,
            .add_preimage = add_preimage,
            .block_energy = block_energy,
            .widen_panel = widen_panel,
            .add_panel_gram = add_panel_gram,
        },
    .masks =
        {
            .random_bits = random_bits,
            .random_words = random_words,
            .keep_by_range = keep_by_range,
        },
    .eigen = eigen::eigen_kernels(),
};

}  // namespace resm::cpu::RESM_ISA
