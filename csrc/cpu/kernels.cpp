// Chooses the instruction set at run time.
#include "cpu/kernels.h"

#include <atomic>
#include <cstring>

namespace resm::cpu {

namespace baseline { extern const Kernels table; }
#if defined(RESM_X86_VARIANTS)
namespace avx2 { extern const Kernels table; }
namespace avx512 { extern const Kernels table; }
#endif

namespace {

int runnable(const Kernels* found[3]) {
  int n = 0;
#if defined(RESM_X86_VARIANTS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512cd"))
    found[n++] = &avx512::table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
      __builtin_cpu_supports("bmi2"))
    found[n++] = &avx2::table;
#endif
  found[n++] = &baseline::table;
  return n;
}

const Kernels* best() {
  const Kernels* found[3];
  runnable(found);
  return found[0];
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> table{best()};
  return table;
}

}  // namespace

const Kernels& kernels() { return *chosen().load(); }

int available_isas(const char* names[3]) {
  const Kernels* found[3];
  const int n = runnable(found);
  for (int i = 0; i < n; ++i) names[i] = found[i]->isa;
  return n;
}

bool use_isa(const char* name) {
  const Kernels* found[3];
  const int n = runnable(found);
  for (int i = 0; i < n; ++i)
    if (std::strcmp(found[i]->isa, name) == 0) {
      chosen().store(found[i]);
      return true;
    }
  return false;
}

}  // namespace resm::cpu
