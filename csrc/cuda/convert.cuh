// The instructions behind numbers.cuh, and two kinds of loads. tests/emulator/cuda/convert.cuh is
// the twin that runs on a CPU; change both.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "row.h"

namespace dcpo {

// 2^y: 0 below -126, 1 at 0, NaN for NaN. Relative error 2^-22.
__device__ __forceinline__ float exp2_approx(float y) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
}

// 1 / x, relative error 2^-23.
__device__ __forceinline__ float reciprocal_approx(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
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

// Of two pairs of T; NaN is no maximum.
template <class T>
__device__ __forceinline__ uint32_t max_pairs(uint32_t a, uint32_t b);
template <>
__device__ __forceinline__ uint32_t max_pairs<Float16>(uint32_t a, uint32_t b) {
  uint32_t bits;
  asm("max.f16x2 %0, %1, %2;" : "=r"(bits) : "r"(a), "r"(b));
  return bits;
}
template <>
__device__ __forceinline__ uint32_t max_pairs<BFloat16>(uint32_t a, uint32_t b) {
  uint32_t bits;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(bits) : "r"(a), "r"(b));
  return bits;
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

// 16 bytes that this thread or its block reads again soon: they stay in L1 where it has room.
__device__ __forceinline__ uint4 load_again(const uint4* from) {
  uint4 bits;
  asm volatile("ld.global.L1::evict_last.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return bits;
}

// 16 bytes that are read once.
__device__ __forceinline__ uint4 load_once(const uint4* from) {
  uint4 bits;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return bits;
}

}  // namespace dcpo
