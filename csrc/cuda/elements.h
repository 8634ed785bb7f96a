// The chunk of a group that a block works on, and how a thread reads and writes eight of its elements at a time.
#pragma once

#include "common/key.h"
#include "cuda/block.h"
#include "cuda/ops.h"

namespace resm::cuda {

constexpr int kVector = 8;  // elements: 16 bytes of a half type, the widest access

// The dtypes of a group's inputs. kCode is the code of the dtype that base and experts share, so that the compiler knows
// it, or kMixed. Elements of one fp32 or half type are read 16 bytes at a time where addresses allow; mixed and float64
// ones, which are rare, are read one by one.
constexpr int kMixed = -1;
template <class C, int kCode>
struct Dtypes {
  using Compute = C;
  static constexpr bool kWide = kCode != kMixed;
  static constexpr int kBytes = kCode == static_cast<int>(DType::f32) ? 4 : 2;  // of an element, where kWide

  RESM_DEVICE static Array base(const Group& group) { return {group.base.data, known(group.base.dtype)}; }
  RESM_DEVICE static Array expert(const Group& group, int t) {
    return {reinterpret_cast<char*>(constant(group.experts + t)), known(group.expert_dtype)};
  }

 private:
  RESM_DEVICE static DType known(DType dtype) { return kCode == kMixed ? dtype : static_cast<DType>(kCode); }
};

// Calls run(Dtypes) for the dtypes of a group.
template <class Run>
void with_dtypes(const Group& group, Run run) {
  if (group.in_double) return run(Dtypes<double, kMixed>());
  if (group.base.dtype != group.expert_dtype) return run(Dtypes<float, kMixed>());
  switch (group.expert_dtype) {
    case DType::f32: return run(Dtypes<float, static_cast<int>(DType::f32)>());
    case DType::f16: return run(Dtypes<float, static_cast<int>(DType::f16)>());
    default: return run(Dtypes<float, static_cast<int>(DType::bf16)>());
  }
}

// The elements begin … end − 1 of a row; those before wide_end can be read kVector at a time.
struct Chunk {
  int64_t row, begin, wide_end, end;
};

template <class Kind>
RESM_DEVICE Chunk chunk_of(const Group& group, int64_t block) {
  const int64_t chunks = (group.length + group.chunk - 1) / group.chunk, row = block / chunks;
  const int64_t begin = row * group.length + block % chunks * group.chunk;
  const int64_t row_end = (row + 1) * group.length;
  const int64_t end = begin + group.chunk < row_end ? begin + group.chunk : row_end;
  const bool wide = Kind::kWide && group.aligned && begin * Kind::kBytes % 16 == 0;
  return {row, begin, wide ? begin + (end - begin) / kVector * kVector : begin, end};
}

template <class C>
RESM_DEVICE C load_one(const Array& from, int64_t i) {
  const char* element = from.data + i * item_size(from.dtype);
  switch (from.dtype) {
    case DType::f32: return C(*reinterpret_cast<const float*>(element));
    case DType::f64: return C(*reinterpret_cast<const double*>(element));
    case DType::f16: return C(float_from_f16(*reinterpret_cast<const uint16_t*>(element)));
    default: return C(float_from_bf16(*reinterpret_cast<const uint16_t*>(element)));
  }
}

template <class C>
RESM_DEVICE void store_one(const Array& to, int64_t i, C value) {
  char* element = to.data + i * item_size(to.dtype);
  switch (to.dtype) {
    case DType::f32: *reinterpret_cast<float*>(element) = static_cast<float>(value); break;
    case DType::f64: *reinterpret_cast<double*>(element) = static_cast<double>(value); break;
    case DType::f16: *reinterpret_cast<uint16_t*>(element) = f16_from_float(before_half(value)); break;
    default: *reinterpret_cast<uint16_t*>(element) = bf16_from_float(before_half(value)); break;
  }
}

// kVector elements of fp32 or a half type as they come from memory, from an address that is a multiple of 16. `widen`
// is a separate step, so that several reads can be in flight before the first is waited for.
template <int kBytes>
struct Raw {
  uint4 words[kBytes * kVector / 16];
};

template <int kBytes>
RESM_DEVICE Raw<kBytes> read_vector(const Array& from, int64_t i) {
  Raw<kBytes> raw;
  for (int k = 0; k < kBytes * kVector / 16; ++k) raw.words[k] = read16(from.data + i * kBytes, k);
  return raw;
}

template <class C, int kBytes>
RESM_DEVICE void widen(const Raw<kBytes>& raw, DType dtype, C (&values)[kVector]) {
  RESM_UNROLL
  for (int j = 0; j < kVector; ++j) {
    const uint4& four = raw.words[j * kBytes / 16];
    const int position = j * kBytes % 16 / 4;
    const uint32_t word = position == 0 ? four.x : position == 1 ? four.y : position == 2 ? four.z : four.w;
    const auto half = static_cast<uint16_t>(word >> (j % 2 * 16));
    if constexpr (kBytes == 4)
      values[j] = C(bits_as<float>(word));
    else
      values[j] = C(dtype == DType::f16 ? float_from_f16(half) : float_from_bf16(half));
  }
}

// values[0 … kCount − 1] = elements i …: kVector as above, or one.
template <class C, int kCount>
RESM_DEVICE void load(const Array& from, int64_t i, C (&values)[kCount]) {
  if constexpr (kCount == 1)
    values[0] = load_one<C>(from, i);
  else if (from.dtype == DType::f32)
    widen(read_vector<4>(from, i), from.dtype, values);
  else
    widen(read_vector<2>(from, i), from.dtype, values);
}

// The reverse of `load`, rounded once. `to` need not have the dtype of the array that was loaded.
template <class C, int kCount>
RESM_DEVICE void store(const Array& to, int64_t i, const C (&values)[kCount]) {
  if constexpr (kCount == 1) {
    store_one(to, i, values[0]);
  } else if (to.dtype == DType::f32) {
    uint32_t words[kVector];
    for (int j = 0; j < kVector; ++j) words[j] = bits_as<uint32_t>(static_cast<float>(values[j]));
    for (int k = 0; k < 2; ++k)
      write16(to.data + i * 4, k, {words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3]});
  } else if (to.dtype == DType::f64) {
    for (int j = 0; j < kVector; ++j) store_one(to, i + j, values[j]);
  } else {
    uint32_t words[4];
    for (int k = 0; k < 4; ++k) {
      const float low = before_half(values[2 * k]), high = before_half(values[2 * k + 1]);
      words[k] = to.dtype == DType::f16 ? f16_from_float(low) | uint32_t(f16_from_float(high)) << 16
                                        : bf16_from_float(low) | uint32_t(bf16_from_float(high)) << 16;
    }
    write16(to.data + i * 2, 0, {words[0], words[1], words[2], words[3]});
  }
}

// Calls visit(Δ, i) with Δ = expert − base from element i on, for a thread's share of a chunk: kVector values at a time
// up to wide_end, then one by one. Of vectors, two of each array are in flight at once.
template <class Kind, int kThreads, class Visit>
RESM_DEVICE void for_deltas(const Chunk& chunk, const Array& base, const Array& expert, int thread, Visit visit) {
  using C = typename Kind::Compute;
  if constexpr (Kind::kWide) {
    constexpr int kAhead = 2;
    constexpr int64_t kStride = int64_t(kThreads) * kVector;
    using Vector = Raw<Kind::kBytes>;
    RESM_ROLLED
    for (int64_t i = chunk.begin + int64_t(thread) * kVector; i < chunk.wide_end; i += kAhead * kStride) {
      Vector bases[kAhead], experts[kAhead];
      RESM_UNROLL
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        // Past the end, the first vector is read again and not used.
        const int64_t position = i + ahead * kStride < chunk.wide_end ? i + ahead * kStride : i;
        bases[ahead] = read_vector<Kind::kBytes>(base, position);
        experts[ahead] = read_vector<Kind::kBytes>(expert, position);
      }
      RESM_UNROLL
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (i + ahead * kStride >= chunk.wide_end) continue;
        C origin[kVector], delta[kVector];
        widen(bases[ahead], base.dtype, origin);
        widen(experts[ahead], expert.dtype, delta);
        for (int j = 0; j < kVector; ++j) delta[j] = delta[j] - origin[j];
        visit(delta, i + ahead * kStride);
      }
    }
  }
  for (int64_t i = chunk.wide_end + thread; i < chunk.end; i += kThreads) {
    C delta[1] = {load_one<C>(expert, i) - load_one<C>(base, i)};
    visit(delta, i);
  }
}

// The bits of expert t's mask from that of element i on; all are set where there are no masks.
RESM_DEVICE uint32_t mask_bits(const Group& group, int t, int64_t i) {
  if (group.masks == nullptr) return ~0u;
  return constant(reinterpret_cast<const uint8_t*>(constant(group.masks + t)) + i / 8) >> i % 8;
}

template <class C, int kCount>
RESM_DEVICE int count_nonfinite(const C (&values)[kCount]) {
  Key<C> largest = 0;
  for (int j = 0; j < kCount; ++j) largest = key_of(values[j]) > largest ? key_of(values[j]) : largest;
  if (largest < kInfinityKey<C>) return 0;
  int count = 0;
  for (int j = 0; j < kCount; ++j) count += key_of(values[j]) >= kInfinityKey<C> ? 1 : 0;
  return count;
}

}  // namespace resm::cuda
