// bf16, fp16 and fp32 as a thread sees them: 16 bytes at a time, float32 in registers, one rounding
// at the store.
#pragma once

#include <cstdint>

#include "cuda/convert.cuh"
#include "row.h"

namespace dcpo {

template <class T>
constexpr int kPack = 16 / sizeof(T);  // elements of one 16-byte access

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(BFloat16 x) {
  return __uint_as_float(static_cast<uint32_t>(x.bits) << 16);
}
__device__ __forceinline__ float widen(Float16 x) { return widen_half2(x.bits).x; }

__device__ __forceinline__ void narrow(float x, float& result) { result = x; }
__device__ __forceinline__ void narrow(float x, BFloat16& result) {
  result.bits = static_cast<uint16_t>(narrow_bfloat2(x, 0.0f));
}
__device__ __forceinline__ void narrow(float x, Float16& result) {
  result.bits = static_cast<uint16_t>(narrow_half2(x, 0.0f));
}

// The elements of 16 bytes, x[0 .. kPack<T>).
template <class T>
__device__ __forceinline__ void widen(uint4 bits, float* x);

template <>
__device__ __forceinline__ void widen<float>(uint4 bits, float* x) {
  x[0] = __uint_as_float(bits.x);
  x[1] = __uint_as_float(bits.y);
  x[2] = __uint_as_float(bits.z);
  x[3] = __uint_as_float(bits.w);
}
template <>
__device__ __forceinline__ void widen<BFloat16>(uint4 bits, float* x) {
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(word[i] << 16);
    x[2 * i + 1] = __uint_as_float(word[i] & 0xffff0000u);
  }
}
template <>
__device__ __forceinline__ void widen<Float16>(uint4 bits, float* x) {
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = widen_half2(word[i]);
    x[2 * i] = pair.x;
    x[2 * i + 1] = pair.y;
  }
}

// The highest of two words, and in one. NaN is none. Two 16-bit logits are compared at once.
template <class T>
__device__ __forceinline__ uint32_t max_words(uint32_t a, uint32_t b) {
  if constexpr (sizeof(T) == 4)
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  else
    return max_pairs<T>(a, b);
}
template <class T>
__device__ __forceinline__ float max_of_word(uint32_t word) {
  if constexpr (sizeof(T) == 4)
    return __uint_as_float(word);
  else
    return fmaxf(widen(T{static_cast<uint16_t>(word)}),
                 widen(T{static_cast<uint16_t>(word >> 16)}));
}

// The highest of n times 16 bytes.
template <class T, int n>
__device__ __forceinline__ float max_of(const uint4 (&bits)[n]) {
  uint32_t top =
      max_words<T>(max_words<T>(bits[0].x, bits[0].y), max_words<T>(bits[0].z, bits[0].w));
#pragma unroll
  for (int i = 1; i < n; ++i)
    top = max_words<T>(
        top, max_words<T>(max_words<T>(bits[i].x, bits[i].y), max_words<T>(bits[i].z, bits[i].w)));
  return max_of_word<T>(top);
}

// exp2_approx by multiply-adds alone, for a GPU whose memory outruns its exponentials. Relative
// error 7.5e-5 (minimax of degree 3 on half a unit to either side): for a store in bf16, which
// rounds by 2e-3. y is at most 1; a NaN gives 0.
__device__ __forceinline__ float exp2_polynomial(float y) {
  constexpr float kInteger =
      12582912.0f;  // 1.5 * 2^23: the sum has the nearest one in its low bits
  const float held = fmaxf(y, -127.0f), shifted = held + kInteger;
  const float f = held - (shifted - kInteger);
  const float p = fmaf(fmaf(fmaf(0.05517167f, f, 0.24261113f), f, 0.69326099f), f, 0.99992807f);
  const float power = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
  return y >= -126.0f ? power : 0.0f;
}

// What the loss takes for a logit (row.h). A kernel's template parameter: those of rows without a
// softcap have no instruction of it.
struct NoSoftcap {
  static constexpr bool kCaps = false;

  NoSoftcap() = default;
  __device__ explicit NoSoftcap(float) {}
  __device__ __forceinline__ Logit of(float x) const { return {x, 1.0f}; }
};
struct Softcap {
  static constexpr bool kCaps = true;
  float softcap, scale;

  __device__ explicit Softcap(float softcap) : softcap(softcap), scale(-2.0f * kLog2E / softcap) {}
  __device__ __forceinline__ Logit of(float x) const {
    constexpr float kMagic = 12582912.0f + 127.0f;  // leaves round(y) + 127 in the low bits
    const float y = fmaxf(fabsf(x) * scale, -127.0f), shifted = y + kMagic;
    const float power = __uint_as_float(__float_as_uint(shifted) << 23);
    const float p = exp2_minus_1(y - (shifted - kMagic));
    const float e_minus_1 = fmaf(power, p, power - 1.0f);
    const float r = reciprocal_approx(2.0f + e_minus_1);
    const float value = copysignf(-softcap * e_minus_1 * r, x) + (x - x);
    return {x == -INFINITY ? x : value, 4.0f * fmaf(power, p, power) * r * r};
  }
};

template <class T>
__device__ __forceinline__ uint4 narrow(const float* x);

template <>
__device__ __forceinline__ uint4 narrow<float>(const float* x) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                    __float_as_uint(x[3]));
}
template <>
__device__ __forceinline__ uint4 narrow<BFloat16>(const float* x) {
  return make_uint4(narrow_bfloat2(x[0], x[1]), narrow_bfloat2(x[2], x[3]),
                    narrow_bfloat2(x[4], x[5]), narrow_bfloat2(x[6], x[7]));
}
template <>
__device__ __forceinline__ uint4 narrow<Float16>(const float* x) {
  return make_uint4(narrow_half2(x[0], x[1]), narrow_half2(x[2], x[3]), narrow_half2(x[4], x[5]),
                    narrow_half2(x[6], x[7]));
}

}  // namespace dcpo
