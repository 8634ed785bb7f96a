// Element types of tensors, and conversions that give the same bits on every host and device.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define RESM_HD __host__ __device__ __forceinline__
#else
#define RESM_HD inline __attribute__((always_inline))
#endif

namespace resm {

// The codes are positions in FLOAT_DTYPES of resm_kernels/dtypes.py.
enum class DType : int32_t { f32 = 0, f64 = 1, f16 = 2, bf16 = 3 };
constexpr int kDTypes = 4;

RESM_HD constexpr int64_t item_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

template <class To, class From>
RESM_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "a bit cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

RESM_HD float float_from_bf16(uint16_t bits) { return bits_as<float>(uint32_t(bits) << 16); }

// Multiplying by 2^112 moves the exponent from half's bias to float's and normalises subnormals on the way.
RESM_HD float float_from_f16(uint16_t bits) {
  const uint32_t magnitude = uint32_t(bits & 0x7fffu) << 13;
  const uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN keep their payload
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16;
  return bits_as<float>((magnitude >= 0x0f800000u ? special : finite) | sign);
}

// Round to nearest, ties to even; NaN stays NaN.
RESM_HD uint16_t bf16_from_float(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

RESM_HD uint16_t f16_from_float(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal range: rebias the exponent by -112, round at bit 13.
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 1/2 lines the value up with half's subnormal grid, and the addition itself rounds.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // from 65520 on the nearest half is infinity
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return uint16_t(half | ((bits >> 16) & 0x8000u));
}

// Rounds to float so that a second rounding, to a half format, gives what one rounding of `value` would: the last bit
// of an inexact result is set ("round to odd"), so that no false tie can arise.
RESM_HD float odd_float_from_double(double value) {
  const float nearest = static_cast<float>(value);
  uint32_t bits = bits_as<uint32_t>(nearest);
  const double back = static_cast<double>(nearest);
  const bool overflowed = (bits & 0x7fffffffu) >= 0x7f800000u;
  if (overflowed || back == value) return nearest;
  const double away = back < 0 ? -back : back, exact = value < 0 ? -value : value;
  if (away > exact) bits -= 1;
  return bits_as<float>(bits | 1u);
}

// A value of the compute type as the float that is then rounded to a half format.
RESM_HD float before_half(float value) { return value; }
RESM_HD float before_half(double value) { return odd_float_from_double(value); }

}  // namespace resm
