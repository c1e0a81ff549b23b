// The conversions and the exponential of csrc/cuda/numbers.cuh, in plain C++.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda_runtime.h"

namespace dcpo {

inline float exp2_approx(float y) {
  const float result = exp2f(y);
  return result < FLT_MIN ? 0.0f : result;  // flushes denormals, as ex2.approx.ftz does
}

inline float widen_half(uint16_t bits) {
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
}

inline uint32_t narrow_half(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

inline float2 widen_half2(uint32_t bits) {
  return {widen_half(static_cast<uint16_t>(bits)), widen_half(static_cast<uint16_t>(bits >> 16))};
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
