// The tensors of a launch, and how a thread reads and writes eight of their elements at a time.
#pragma once

#include "common/key.h"
#include "cuda/block.h"

namespace resm::cuda {

constexpr int kVector = 8;  // elements: 16 bytes of a half type, which is the widest access

struct Array {
  char* data;
  DType dtype;
};

// The dtypes of a launch's inputs: kKind is the code of the one that all have, so that the compiler knows it, or
// kMixed. Elements of one fp32 or half type are read 16 bytes at a time where addresses allow; mixed and float64 ones,
// which are rare, one by one.
constexpr int kMixed = -1;
template <class C, int kKind>
struct Dtypes {
  using Compute = C;
  static constexpr bool kWide = kKind != kMixed;
  static constexpr int kBytes = kKind == static_cast<int>(DType::f32) ? 4 : 2;  // of an element, where kWide
  DType base_code, expert_code;

  RESM_DEVICE DType base() const { return kKind == kMixed ? base_code : static_cast<DType>(kKind); }
  RESM_DEVICE DType expert() const { return kKind == kMixed ? expert_code : static_cast<DType>(kKind); }
};

// Calls run(Dtypes) for codes from Python; base −1 is that of the experts, or none.
template <class Run>
const char* with_dtypes(int64_t base_code, int64_t expert_code, bool in_double, Run run) {
  const auto expert = static_cast<DType>(expert_code);
  const auto base = base_code < 0 ? expert : static_cast<DType>(base_code);
  if (in_double) return run(Dtypes<double, kMixed>{base, expert});
  if (base != expert) return run(Dtypes<float, kMixed>{base, expert});
  switch (expert) {
    case DType::f32: return run(Dtypes<float, static_cast<int>(DType::f32)>{base, expert});
    case DType::f16: return run(Dtypes<float, static_cast<int>(DType::f16)>{base, expert});
    default: return run(Dtypes<float, static_cast<int>(DType::bf16)>{base, expert});
  }
}

// L tensors, each cut into chunks; a block works on one chunk. On the device, int64: firsts[0 … 2^steps − 1], the
// tensors' first blocks, padded with what no block reaches; lengths[0 … L − 1]; addresses[l][0 … per_tensor − 1].
// resm_kernels/_launch.py makes it.
struct Table {
  const int64_t* entries;
  int64_t n_tensors;
  int32_t steps, per_tensor;
  int64_t chunk;  // elements

  struct Chunk {
    int64_t tensor, begin, end, length;
    const int64_t* addresses;
    int64_t index;  // among the tensor's chunks

    RESM_DEVICE Array array(int which, DType dtype) const {
      return {reinterpret_cast<char*>(constant(addresses + which)), dtype};
    }

    // The elements from begin to here can be read 16 bytes at a time, of the first `arrays` of the tensor.
    RESM_DEVICE int64_t wide_end(int arrays) const {
      int64_t bits = 0;
      RESM_ROLLED
      for (int which = 0; which < arrays; ++which) bits |= constant(addresses + which);
      return bits % 16 == 0 ? begin + (end - begin) / kVector * kVector : begin;
    }
  };

  RESM_DEVICE int64_t length(int64_t tensor) const { return constant(entries + (int64_t(1) << steps) + tensor); }
  RESM_DEVICE const int64_t* addresses(int64_t tensor) const {
    return entries + (int64_t(1) << steps) + n_tensors + tensor * per_tensor;
  }

  // The chunk of a block: firsts[tensor] <= block < firsts[tensor + 1].
  RESM_DEVICE Chunk chunk_of(int64_t block) const {
    int64_t tensor = 0;
    RESM_ROLLED
    for (int step = steps - 1; step >= 0; --step) {
      const int64_t middle = tensor + (int64_t(1) << step);
      if (constant(entries + middle) <= block) tensor = middle;
    }
    const int64_t index = block - constant(entries + tensor), begin = index * chunk, all = length(tensor);
    return {tensor, begin, begin + chunk < all ? begin + chunk : all, all, addresses(tensor), index};
  }
};

template <class C>
RESM_DEVICE C load_one(const Array& from, int64_t i) {
  const char* at = from.data + i * item_size(from.dtype);
  switch (from.dtype) {
    case DType::f32: return C(*reinterpret_cast<const float*>(at));
    case DType::f64: return C(*reinterpret_cast<const double*>(at));
    case DType::f16: return C(float_from_f16(*reinterpret_cast<const uint16_t*>(at)));
    default: return C(float_from_bf16(*reinterpret_cast<const uint16_t*>(at)));
  }
}

template <class C>
RESM_DEVICE void store_one(const Array& to, int64_t i, C value) {
  char* at = to.data + i * item_size(to.dtype);
  switch (to.dtype) {
    case DType::f32: *reinterpret_cast<float*>(at) = static_cast<float>(value); break;
    case DType::f64: *reinterpret_cast<double*>(at) = static_cast<double>(value); break;
    case DType::f16: *reinterpret_cast<uint16_t*>(at) = f16_from_float(before_half(value)); break;
    default: *reinterpret_cast<uint16_t*>(at) = bf16_from_float(before_half(value)); break;
  }
}

// kVector elements of fp32 or a half type as they come from memory, from an address that is a multiple of 16. Apart
// from `widen`, so that several reads can be under way before the first is waited for.
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
    const int at = j * kBytes % 16 / 4;
    const uint32_t word = at == 0 ? four.x : at == 1 ? four.y : at == 2 ? four.z : four.w;
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

// The reverse of `load`, rounded once. `to` need not have the dtype of what was loaded.
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

// Calls visit(Δ, i), Δ = expert − base from element i on, for a thread's share of a chunk, kVector values at a time up to
// wide_end and then one by one. Of vectors, two of each array are on their way from memory at once.
template <class Kind, int kThreads, class Visit>
RESM_DEVICE void for_deltas(const Table::Chunk& chunk, int64_t wide_end, const Array& base, const Array& expert,
                            int thread, Visit visit) {
  using C = typename Kind::Compute;
  if constexpr (Kind::kWide) {
    constexpr int kAhead = 2;
    constexpr int64_t kStride = int64_t(kThreads) * kVector;
    using Vector = Raw<Kind::kBytes>;
    RESM_ROLLED
    for (int64_t i = chunk.begin + int64_t(thread) * kVector; i < wide_end; i += kAhead * kStride) {
      Vector bases[kAhead], experts[kAhead];
      RESM_UNROLL
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        // What lies beyond the end is read from where there is something, and not used.
        const int64_t at = i + ahead * kStride < wide_end ? i + ahead * kStride : i;
        bases[ahead] = read_vector<Kind::kBytes>(base, at);
        experts[ahead] = read_vector<Kind::kBytes>(expert, at);
      }
      RESM_UNROLL
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        if (i + ahead * kStride >= wide_end) continue;
        C origin[kVector], delta[kVector];
        widen(bases[ahead], base.dtype, origin);
        widen(experts[ahead], expert.dtype, delta);
        for (int j = 0; j < kVector; ++j) delta[j] = delta[j] - origin[j];
        visit(delta, i + ahead * kStride);
      }
    }
  }
  for (int64_t i = wide_end + thread; i < chunk.end; i += kThreads) {
    C delta[1] = {load_one<C>(expert, i) - load_one<C>(base, i)};
    visit(delta, i);
  }
}

// The byte that holds the bit of element i in a mask of bits, which is address `which` of a tensor.
RESM_DEVICE uint32_t mask_byte(const int64_t* addresses, int which, int64_t i) {
  return constant(reinterpret_cast<const uint8_t*>(constant(addresses + which)) + i / 8);
}

template <class C, int kCount>
RESM_DEVICE int count_nonfinite(const C (&values)[kCount]) {
  Key<C> largest = 0;
  for (int j = 0; j < kCount; ++j) largest = key_of(values[j]) > largest ? key_of(values[j]) : largest;
  if (largest < kInfinityKey<C>) return 0;
  int found = 0;
  for (int j = 0; j < kCount; ++j) found += key_of(values[j]) >= kInfinityKey<C> ? 1 : 0;
  return found;
}

}  // namespace resm::cuda
