// bf16, fp16 and fp32 as a thread sees them: 16 bytes at a time, float32 in registers, one rounding
// at the store. 2^x in the special function unit.
#pragma once

#include <cstdint>

#if defined(DCPO_EMU)
#include "emu/cuda.h"
#include "emu/numbers.h"
#else
#include <cuda_runtime.h>
#endif

namespace dcpo {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
constexpr int kPack = 16 / sizeof(T);  // elements of one 16-byte access

#if !defined(DCPO_EMU)
// 2^y: 0 below -126, 1 at 0, NaN for NaN. Relative error 2^-22.
__device__ __forceinline__ float exp2_approx(float y) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
}

__device__ __forceinline__ float2 widen_half2(uint32_t bits) {
  float2 x;
  asm("{\n\t.reg .b16 lo, hi;\n\tmov.b32 {lo, hi}, %2;\n\t"
      "cvt.f32.f16 %0, lo;\n\tcvt.f32.f16 %1, hi;\n\t}"
      : "=f"(x.x), "=f"(x.y)
      : "r"(bits));
  return x;
}

__device__ __forceinline__ uint32_t narrow_half2(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}

__device__ __forceinline__ uint32_t narrow_bfloat2(float lo, float hi) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(hi), "f"(lo));
  return bits;
}
#endif

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
