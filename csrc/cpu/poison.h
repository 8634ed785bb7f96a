// Memory that is kept for later use, for AddressSanitizer: it sees accesses to such memory as it sees those to freed
// memory. In other builds these functions do nothing.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace resm::cpu {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kGuard = 64;  // bytes after a block that nobody may touch
inline void forbid(const void* data, size_t bytes) { __asan_poison_memory_region(data, bytes); }
inline void permit(const void* data, size_t bytes) { __asan_unpoison_memory_region(data, bytes); }
#else
constexpr size_t kGuard = 0;
inline void forbid(const void*, size_t) {}
inline void permit(const void*, size_t) {}
#endif

}  // namespace resm::cpu
