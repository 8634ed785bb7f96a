// Blocks between memory and the compute type. Plain loops: the compiler vectorises them for each instruction set.
#pragma once

namespace resm::cpu::RESM_ISA {

// Asks for the block after this one: by the time it is loaded, all of an op's arithmetic has passed.
RESM_HD void prefetch_next(const Array& from, int64_t begin, int n) {
  if (n != kBlock) return;
  const int64_t bytes = kBlock * item_size(from.dtype);
  const char* next = static_cast<const char*>(from.data) + begin * item_size(from.dtype) + bytes;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(next + i, 0, 2);
}

template <class C>
void load(const Array& from, int64_t begin, int n, C* __restrict block) {
  prefetch_next(from, begin, n);
  switch (from.dtype) {
    case DType::f32: {
      const float* p = static_cast<const float*>(from.data) + begin;
      for (int i = 0; i < n; ++i) block[i] = C(p[i]);
      break;
    }
    case DType::f64: {
      const double* p = static_cast<const double*>(from.data) + begin;
      for (int i = 0; i < n; ++i) block[i] = C(p[i]);
      break;
    }
    case DType::f16: {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + begin;
      for (int i = 0; i < n; ++i) block[i] = C(float_from_f16(p[i]));
      break;
    }
    case DType::bf16: {
      const uint16_t* p = static_cast<const uint16_t*>(from.data) + begin;
      for (int i = 0; i < n; ++i) block[i] = C(float_from_bf16(p[i]));
      break;
    }
  }
  for (int i = n; i % kPad != 0; ++i) block[i] = C(0);
}

template <class C>
void store(const C* __restrict block, int64_t begin, int n, const Array& to) {
  switch (to.dtype) {
    case DType::f32: {
      float* p = static_cast<float*>(to.data) + begin;
      for (int i = 0; i < n; ++i) p[i] = static_cast<float>(block[i]);
      break;
    }
    case DType::f64: {
      double* p = static_cast<double*>(to.data) + begin;
      for (int i = 0; i < n; ++i) p[i] = static_cast<double>(block[i]);
      break;
    }
    case DType::f16: {
      uint16_t* p = static_cast<uint16_t*>(to.data) + begin;
      for (int i = 0; i < n; ++i) p[i] = f16_from_float(before_half(block[i]));
      break;
    }
    case DType::bf16: {
      uint16_t* p = static_cast<uint16_t*>(to.data) + begin;
      for (int i = 0; i < n; ++i) p[i] = bf16_from_float(before_half(block[i]));
      break;
    }
  }
}

template <class C>
int64_t count_nonfinite(const C* block, int n) {
  Key<C> nonfinite = 0;
  for (int i = 0; i < n; ++i) nonfinite += key_of(block[i]) >= kInfinityKey<C> ? 1 : 0;
  return static_cast<int64_t>(nonfinite);
}

}  // namespace resm::cpu::RESM_ISA
