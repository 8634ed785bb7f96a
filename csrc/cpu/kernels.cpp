// Chooses the instruction set at run time.
#include "cpu/kernels.h"

#include <atomic>
#include <cstring>

namespace resm::cpu {

namespace baseline {
extern const Kernels table;
}
#if defined(RESM_X86_VARIANTS)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
#endif

namespace {

int runnable(const Kernels* candidates[3]) {
  int n = 0;
#if defined(RESM_X86_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    candidates[n++] = &avx512::table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2"))
    candidates[n++] = &avx2::table;
#endif
  candidates[n++] = &baseline::table;
  return n;
}

const Kernels* best() {
  const Kernels* candidates[3];
  runnable(candidates);
  return candidates[0];
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(); }

int available_isas(const char* names[3]) {
  const Kernels* candidates[3];
  const int n = runnable(candidates);
  for (int i = 0; i < n; ++i) names[i] = candidates[i]->isa;
  return n;
}

bool use_isa(const char* name) {
  const Kernels* candidates[3];
  const int n = runnable(candidates);
  for (int i = 0; i < n; ++i)
    if (std::strcmp(candidates[i]->isa, name) == 0) {
      chosen().store(candidates[i]);
      return true;
    }
  return false;
}

}  // namespace resm::cpu
