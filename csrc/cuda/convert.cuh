// The instructions behind numbers.cuh. tests/emulator/cuda/convert.cuh is the twin that runs on a
// CPU; change both.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dcpo {

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

}  // namespace dcpo
