// aggregate on the GPU: one thread an element at a time, grid-stride, the rules of csrc/common/elect.h.
//
// The arithmetic is the CPU's, operation by operation (compiled with --fmad=false), so that both give the same bits.
// TIES needs the elected sign before it can add what agrees: the experts are read a second time, from cache.
#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "cuda/ops.h"

namespace resm::cuda {
namespace {

template <class C>
__device__ __forceinline__ C load(const Array& from, int64_t i) {
  switch (from.dtype) {
    case DType::f32: return C(static_cast<const float*>(from.data)[i]);
    case DType::f64: return C(static_cast<const double*>(from.data)[i]);
    case DType::f16: return C(float_from_f16(static_cast<const uint16_t*>(from.data)[i]));
    default: return C(float_from_bf16(static_cast<const uint16_t*>(from.data)[i]));
  }
}

template <class C>
__device__ __forceinline__ void store(const Array& to, int64_t i, C value) {
  switch (to.dtype) {
    case DType::f32: static_cast<float*>(to.data)[i] = static_cast<float>(value); break;
    case DType::f64: static_cast<double*>(to.data)[i] = static_cast<double>(value); break;
    case DType::f16: static_cast<uint16_t*>(to.data)[i] = f16_from_float(before_half(value)); break;
    default: static_cast<uint16_t*>(to.data)[i] = bf16_from_float(before_half(value)); break;
  }
}

template <class C>
__device__ __forceinline__ void note_nonfinite(C value, int64_t* counter) {
  if (!isfinite(value)) atomicAdd(reinterpret_cast<unsigned long long*>(counter), 1ull);
}

template <class C>
__device__ __forceinline__ C weighted_delta(const Merge& merge, int t, C value, C origin) {
  C delta = merge.base.data == nullptr ? value : value - origin;
  if (merge.trims) delta = trim(delta, static_cast<C>(merge.thresholds[t]));
  return delta * static_cast<C>(merge.weights[t]);
}

template <class C>
__global__ void __launch_bounds__(256) aggregate_kernel(const __grid_constant__ Merge merge, int64_t* nonfinite) {
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < merge.length; i += stride) {
    const C origin = merge.base.data == nullptr ? C(0) : load<C>(merge.base, i);
    note_nonfinite(origin, nonfinite);
    C total = C(-0.0);  // the zero to which adding x gives x, -0.0 included
    for (int t = 0; t < merge.n_experts; ++t) {
      const C value = load<C>(merge.experts[t], i);
      note_nonfinite(value, nonfinite + 1 + t);
      total = total + weighted_delta(merge, t, value, origin);
    }
    C divisor = static_cast<C>(merge.weight_sum);
    if (merge.rule == Rule::ties) {
      C agreeing = C(0);
      divisor = C(0);
      for (int t = 0; t < merge.n_experts; ++t) {
        const C weighted = weighted_delta(merge, t, load<C>(merge.experts[t], i), origin);
        const bool counts = agrees(weighted, total);
        agreeing = agreeing + (counts ? weighted : C(0));
        divisor = divisor + (counts ? static_cast<C>(merge.weights[t]) : C(0));
      }
      total = agreeing;
      divisor = divisor == C(0) ? C(1) : divisor;
    }
    if (merge.normalize) total = total / divisor;
    total = total * static_cast<C>(merge.scale);
    store(merge.out, i, merge.base.data == nullptr ? total : origin + total);
  }
}

}  // namespace

void aggregate(const Merge& merge, bool in_double, int64_t* nonfinite, uintptr_t stream) {
  if (merge.length == 0) return;
  constexpr int kThreads = 256, kMaxBlocks = 65536;
  const auto blocks = static_cast<int>(std::min<int64_t>((merge.length + kThreads - 1) / kThreads, kMaxBlocks));
  const auto on = reinterpret_cast<cudaStream_t>(stream);
  if (in_double)
    aggregate_kernel<double><<<blocks, kThreads, 0, on>>>(merge, nonfinite);
  else
    aggregate_kernel<float><<<blocks, kThreads, 0, on>>>(merge, nonfinite);
  const cudaError_t status = cudaGetLastError();
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("resm_kernels: aggregate on CUDA: ") + cudaGetErrorString(status));
}

}  // namespace resm::cuda
