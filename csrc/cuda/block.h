// The language of the kernels. A kernel is a sequence of phases over the threads of a block, each of which ends with a
// barrier. On a GPU all threads run a phase at once. A C++ compiler makes a loop over the threads of it, so that tests run
// the same source on any machine: there the order of threads and blocks can be reversed, and shared memory starts as
// garbage, so that a phase which relies on other threads' work in it, or on zeros, gives wrong results.
#pragma once

#include <climits>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "cuda/ops.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define RESM_DEVICE __device__ __forceinline__
#define RESM_UNROLL _Pragma("unroll")  // so that an array stays in registers
#define RESM_ROLLED _Pragma("unroll 1")
#define RESM_UNROLL_TWICE _Pragma("unroll 2")
#else
#define RESM_DEVICE inline
#define RESM_UNROLL
#define RESM_ROLLED
#define RESM_UNROLL_TWICE
#endif

namespace resm::cuda {

constexpr int kWarp = 32;

#if defined(__CUDACC__)

// A variable that keeps its value from phase to phase, one for each thread.
template <class T, int kThreads>
class PerThread {
 public:
  RESM_DEVICE T& operator[](int) { return value_; }

 private:
  T value_{};
};

template <int kThreads>
class Block {
 public:
  RESM_DEVICE int64_t index() const { return blockIdx.x; }

  template <class Phase>
  RESM_DEVICE void each(Phase phase) const {
    phase(static_cast<int>(threadIdx.x));
    __syncthreads();
  }

  // Each warp's first thread gets the combination of its warp's values: first of those 16 apart, then 8, 4, 2 and 1.
  template <class T, class Combine>
  RESM_DEVICE void combine_in_warps(PerThread<T, kThreads>& values, Combine combine) const {
    for (int apart = kWarp / 2; apart > 0; apart /= 2)
      values[0] = combine(values[0], __shfl_down_sync(~0u, values[0], apart));
  }

  // Each thread's value becomes the sum of those of the threads before it in its warp; `sums` gets the warps' sums.
  template <class T>
  RESM_DEVICE void sum_before_in_warps(PerThread<T, kThreads>& values, T* sums) const {
    const int lane = threadIdx.x % kWarp;
    T including = values[0];
    for (int apart = 1; apart < kWarp; apart *= 2) {
      const T other = __shfl_up_sync(~0u, including, apart);
      if (lane >= apart) including += other;
    }
    if (lane == kWarp - 1) sums[threadIdx.x / kWarp] = including;
    values[0] = including - values[0];
    __syncthreads();
  }
};

// Returns the value before the addition.
template <class T>
RESM_DEVICE T atomic_add(T* to, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA adds words of 32 and 64 bits");
  if constexpr (sizeof(T) == 4)
    return static_cast<T>(atomicAdd(reinterpret_cast<unsigned int*>(to), static_cast<unsigned int>(value)));
  else
    return static_cast<T>(atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(value)));
}

// Reads memory that no kernel writes while this one runs: the compiler need not read it again after a store.
template <class T>
RESM_DEVICE T constant(const T* from) {
  return __ldg(from);
}

// 16 bytes at an address that is a multiple of 16, number `index` from there. No kernel reads what it writes.
RESM_DEVICE uint4 read16(const void* from, int index) { return __ldg(static_cast<const uint4*>(from) + index); }
RESM_DEVICE void write16(void* to, int index, uint4 value) { static_cast<uint4*>(to)[index] = value; }

// A multiprocessor has room for kResident blocks, which limits the registers of a thread.
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kResident)
    run_kernel(const __grid_constant__ Kernel kernel) {
  __shared__ typename Kernel::Shared shared;
  kernel(Block<Kernel::kThreads>(), shared);
}

#else

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline bool backwards = false;  // the order of threads and blocks

template <class Visit>
void in_order(int64_t n, Visit visit) {
  for (int64_t i = 0; i < n; ++i) visit(backwards ? n - 1 - i : i);
}

template <class T, int kThreads>
class PerThread {
 public:
  T& operator[](int thread) { return values_[thread]; }

 private:
  T values_[kThreads] = {};
};

template <int kThreads>
class Block {
 public:
  explicit Block(int64_t index) : index_(index) {}
  int64_t index() const { return index_; }

  template <class Phase>
  void each(Phase phase) const {
    in_order(kThreads, [&](int64_t thread) { phase(static_cast<int>(thread)); });
  }

  template <class T, class Combine>
  void combine_in_warps(PerThread<T, kThreads>& values, Combine combine) const {
    for (int first = 0; first < kThreads; first += kWarp)
      for (int apart = kWarp / 2; apart > 0; apart /= 2)
        for (int lane = first; lane < first + apart; ++lane) values[lane] = combine(values[lane], values[lane + apart]);
  }

  template <class T>
  void sum_before_in_warps(PerThread<T, kThreads>& values, T* sums) const {
    for (int first = 0; first < kThreads; first += kWarp) {
      T before = 0;
      for (int lane = 0; lane < kWarp; ++lane) {
        const T value = values[first + lane];
        values[first + lane] = before;
        before += value;
      }
      sums[first / kWarp] = before;
    }
  }

 private:
  int64_t index_;
};

template <class T>
T atomic_add(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}

template <class T>
T constant(const T* from) {
  return *from;
}

inline void check_16_bytes(const void* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0)
    throw std::logic_error("access of 16 bytes at an address that is no multiple of 16");
}
inline uint4 read16(const void* from, int index) {
  check_16_bytes(from);
  uint4 value;
  memcpy(&value, static_cast<const char*>(from) + 16 * index, sizeof value);
  return value;
}
inline void write16(void* to, int index, uint4 value) {
  check_16_bytes(to);
  memcpy(static_cast<char*>(to) + 16 * index, &value, sizeof value);
}

#endif

// The combination of the threads' values, in an order that is always the same; every thread gets it. `scratch` is in
// shared memory.
template <class T, int kThreads, class Combine>
RESM_DEVICE T combined(const Block<kThreads>& block, PerThread<T, kThreads>& values, T (&scratch)[kThreads / kWarp],
                       Combine combine) {
  block.combine_in_warps(values, combine);
  block.each([&](int thread) {
    if (thread % kWarp == 0) scratch[thread / kWarp] = values[thread];
  });
  T total = scratch[0];
  for (int warp = 1; warp < kThreads / kWarp; ++warp) total = combine(total, scratch[warp]);
  block.each([](int) {});  // a barrier before `scratch` is written again
  return total;
}

template <class T, int kThreads>
RESM_DEVICE T sum_of(const Block<kThreads>& block, PerThread<T, kThreads>& values, T (&scratch)[kThreads / kWarp]) {
  return combined(block, values, scratch, [](T a, T b) { return a + b; });
}

template <class T, int kThreads>
RESM_DEVICE T largest_of(const Block<kThreads>& block, PerThread<T, kThreads>& values, T (&scratch)[kThreads / kWarp]) {
  return combined(block, values, scratch, [](T a, T b) { return a > b ? a : b; });
}

// The combination of n numbers, `stride` apart, and 0, in an order that depends on n only; every thread gets it.
template <class T, int kThreads, class Combine>
RESM_DEVICE T combined_rows(const Block<kThreads>& block, const T* rows, int64_t n, int64_t stride,
                            T (&scratch)[kThreads / kWarp], Combine combine) {
  PerThread<T, kThreads> values;
  block.each([&](int thread) {
    values[thread] = 0;
    for (int64_t i = thread; i < n; i += kThreads) values[thread] = combine(rows[i * stride], values[thread]);
  });
  return combined(block, values, scratch, combine);
}

// Each thread's value becomes the sum of those of the threads before it.
template <class T, int kThreads>
RESM_DEVICE void sum_before(const Block<kThreads>& block, PerThread<T, kThreads>& values,
                            T (&scratch)[kThreads / kWarp]) {
  block.sum_before_in_warps(values, scratch);
  block.each([&](int thread) {
    for (int warp = 0; warp < thread / kWarp; ++warp) values[thread] += scratch[warp];
  });
}

// Enqueues a block of `kernel` for each of 0 … blocks − 1. `op` is named in errors.
template <class Kernel>
void launch(const char* op, const Kernel& kernel, int64_t blocks, [[maybe_unused]] Stream stream) {
  const auto fail = [op](const std::string& reason) {
    throw std::runtime_error(std::string("resm_kernels: ") + op + " on CUDA: " + reason);
  };
  if (blocks > INT_MAX) fail("a launch has at most 2147483647 blocks, got " + std::to_string(blocks));
  if (blocks <= 0) return;
#if defined(__CUDACC__)
  run_kernel<<<static_cast<unsigned>(blocks), Kernel::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(kernel);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess) fail(cudaGetErrorString(status));
#else
  in_order(blocks, [&](int64_t index) {
    typename Kernel::Shared shared;
    memset(static_cast<void*>(&shared), 0xa5, sizeof shared);
    kernel(Block<Kernel::kThreads>(index), shared);
  });
#endif
}

}  // namespace resm::cuda
