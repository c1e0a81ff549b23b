// The conversions, the exponential and the reciprocal of csrc/cuda/numbers.cuh, in plain C++.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_runtime.h"
#include "row.h"

namespace dcpo {

inline float exp2_approx(float y) {
  const float result = exp2f(y);
  return result < FLT_MIN ? 0.0f : result;  // flushes denormals, as ex2.approx.ftz does
}

inline float reciprocal_approx(float x) { return 1.0f / x; }

inline float widen_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

inline float2 widen_half2(uint32_t bits) {
  return {widen_half(static_cast<uint16_t>(bits)), widen_half(static_cast<uint16_t>(bits >> 16))};
}

// Each half's; NaN is no maximum.
template <class T>
uint32_t max_pairs(uint32_t a, uint32_t b) {
  auto of = [](uint32_t word) {
    if constexpr (std::is_same_v<T, Float16>) return widen_half2(word);
    return float2{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  };
  auto is_less = [](float x, float y) { return x < y || x != x; };
  const uint32_t low = is_less(of(a).x, of(b).x) ? b : a;
  const uint32_t high = is_less(of(a).y, of(b).y) ? b : a;
  return (low & 0xffffu) | (high & 0xffff0000u);
}

inline uint4 load_again(const uint4* from) { return *from; }
inline uint4 load_once(const uint4* from) { return *from; }

inline uint32_t narrow_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline uint32_t narrow_half2(float lo, float hi) { return narrow_half(lo) | narrow_half(hi) << 16; }

inline uint32_t narrow_bfloat(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = __float_as_uint(x);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline uint32_t narrow_bfloat2(float lo, float hi) {
  return narrow_bfloat(lo) | narrow_bfloat(hi) << 16;
}

}  // namespace dcpo
