// What the row kernels share beyond csrc/row.h: rows by 16 bytes, the sums of a part of a row and
// how parts are put together, the gradient of 16 bytes.
#pragma once

#include "cuda/numbers.cuh"
#include "row.h"

namespace dcpo {

constexpr unsigned kAllLanes = 0xffffffffu;

// A row 16 bytes at a time: the elements before the first 16-byte boundary, the 16-byte packs, the
// elements after them.
template <class T>
struct Span {
  int64_t head, packs, size;

  __device__ Span(const T* x, int64_t vocab) : size(vocab) {
    const int64_t ahead =
        static_cast<int64_t>((16 - reinterpret_cast<uintptr_t>(x) % 16) % 16 / sizeof(T));
    head = ahead < vocab ? ahead : vocab;
    packs = (vocab - head) / kPack<T>;
  }
  // The elements outside the packs, fewer than 2 kPack: where the i-th lies; -1: no such.
  __device__ int64_t edge(int i) const {
    const int64_t j = i < head ? i : i + packs * kPack<T>;
    return j < size ? j : -1;
  }
  // Whether element j is in packs [begin, end) or, where they count, outside of all packs.
  __device__ bool has(int64_t j, int64_t begin, int64_t end, bool edges) const {
    const int64_t at = j - head;
    if (at < 0 || at >= packs * kPack<T>) return edges;
    return at >= begin * kPack<T> && at < end * kPack<T>;
  }
};

// ---- read ---------------------------------------------------------------------------------------

constexpr float kLowest = -3.40282347e38f;  // finite

// y = x log2(e) / T - m by a fused multiply-add, where m = max log2(e) / T, rounded. What rounding
// took from m is missing in every y alike, in the maximum's own y too, and cancels: a row shifted
// by 1e4 loses nothing. Where a float has no digits left for m, two logits that differ at all
// differ by more than 64 in y; a power of two makes that so in place of log2(e) / T, exactly and
// without an overflow. A maximum of -inf leaves every y at -inf.
struct Exponent {
  float scale = 1.0f, base = kLowest;  // y = x scale - base

  __device__ __forceinline__ float of(float x) const { return fmaf(x, scale, -base); }
};

__device__ __forceinline__ Exponent exponent_of(float row_max, float scale) {
  const float base = row_max * scale;
  if (!(fabsf(base) > 2147483648.0f)) return {scale, base};  // 2^31; also for a NaN
  const uint32_t exponent = __float_as_uint(row_max) & 0x7f800000u;
  const float power = __uint_as_float(((127u + 127u + 30u) << 23) - exponent);
  return {power, fmaxf(row_max * power, kLowest)};
}

// The sums of a thread while it reads, the maximum's own term with them.
struct Running {
  Exponent y;
  float row_max = -INFINITY;
  float sum_exp = 0.0f;
  float sum_exp_z = 0.0f;

  // The maximum's own term is subtracted as it was added, whatever its y was rounded to.
  __device__ __forceinline__ Sums sums() const {
    if (row_max == -INFINITY) return {row_max, sum_exp - 1.0f, 0.0f};  // nothing, or NaN
    const float own = y.of(row_max), factor = exp2_approx(-own);
    return {row_max, (sum_exp - exp2_approx(own)) * factor, (sum_exp_z - own * sum_exp) * factor};
  }
};

// Makes the sums relative to a maximum that is at least theirs. (fmaxf returns its other operand
// for a NaN. The shift is held at -127: 2^-127 is 0 here, and 0 * -inf is not.)
template <bool kEntropy>
__device__ __forceinline__ void rescale(Running& s, float max, float scale) {
  const Exponent y = exponent_of(max, scale);
  const float shift = y.scale == s.y.scale ? fmaxf(s.y.base - y.base, -127.0f) : -127.0f;
  const float factor = exp2_approx(shift);
  if (kEntropy) s.sum_exp_z = factor * (s.sum_exp_z + s.sum_exp * shift);
  s.sum_exp *= factor;
  s.row_max = max;
  s.y = y;
}

// Adds n logits and their maximum: one maximum for all of them, then their exponentials (online
// softmax, arXiv 1805.02867, a block at a time).
template <bool kEntropy, int n>
__device__ __forceinline__ void absorb(Running& s, float max, const float (&x)[n], float scale) {
  rescale<kEntropy>(s, fmaxf(s.row_max, max), scale);
  constexpr int kChains = n < 4 ? n : 4;  // short chains of dependent additions
  float sum_exp[kChains] = {}, sum_exp_z[kChains] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float y = s.y.of(x[i]);
    const float e = exp2_approx(y);
    sum_exp[i % kChains] += e;
    if (kEntropy) sum_exp_z[i % kChains] += e * fmaxf(y, -127.0f);  // 0 * -inf is NaN
  }
#pragma unroll
  for (int i = 1; i < kChains; ++i) {
    sum_exp[0] += sum_exp[i];
    sum_exp_z[0] += sum_exp_z[i];
  }
  s.sum_exp += sum_exp[0];
  if (kEntropy) s.sum_exp_z += sum_exp_z[0];
}

// Adds n times 16 bytes.
template <bool kEntropy, class T, int n, class Cap = NoSoftcap>
__device__ __forceinline__ void absorb(Running& s, const uint4 (&bits)[n], float scale,
                                       const Cap& cap = {}) {
  float x[n * kPack<T>];
#pragma unroll
  for (int i = 0; i < n; ++i) widen<T>(bits[i], x + i * kPack<T>);
#pragma unroll
  for (int i = 0; i < n * kPack<T>; ++i) x[i] = cap.of(x[i]).value;
  absorb<kEntropy>(s, cap.of(max_of<T>(bits)).value, x, scale);
}

__device__ __forceinline__ Sums sums_of(float4 part) { return {part.x, part.y, part.z}; }

// Two parts of a row in one, relative to the higher maximum. A part far below it counts for
// nothing, and may hold anything: in full_kl an infinite sum, of masked logits alone.
template <bool kEntropy>
__device__ __forceinline__ Sums merged(const Sums& a, const Sums& b, float scale) {
  const float max = fmaxf(a.row_max, b.row_max), min = fminf(a.row_max, b.row_max);
  const bool first = a.row_max == max;
  const float base = max == -INFINITY ? 0.0f : max;
  const float shift = fmaxf((min - base) * scale, -127.0f), factor = exp2_approx(shift);
  const float low_sum = 1.0f + (first ? b.rest : a.rest);
  Sums all{max, (first ? a.rest : b.rest) + factor * low_sum, 0.0f};
  if (kEntropy) {
    const float low = (first ? b.sum_exp_z : a.sum_exp_z) + low_sum * shift;
    all.sum_exp_z = (first ? a.sum_exp_z : b.sum_exp_z) + (factor == 0.0f ? 0.0f : factor * low);
  }
  return all;
}

__device__ __forceinline__ Sums from_lane(Sums s, int lane) {
  return {__shfl_sync(kAllLanes, s.row_max, lane), __shfl_sync(kAllLanes, s.rest, lane),
          __shfl_sync(kAllLanes, s.sum_exp_z, lane)};
}

// Over a warp. All lanes return lane 0's result: two lanes that add up the same parts may round
// them differently, and lanes that differ in a bit could decide differently.
template <bool kEntropy>
__device__ __forceinline__ Sums warp_total(Sums s, float scale) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Sums other{__shfl_xor_sync(kAllLanes, s.row_max, step),
                     __shfl_xor_sync(kAllLanes, s.rest, step),
                     kEntropy ? __shfl_xor_sync(kAllLanes, s.sum_exp_z, step) : 0.0f};
    s = merged<kEntropy>(s, other, scale);
  }
  return from_lane(s, 0);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// ---- write --------------------------------------------------------------------------------------

// What is left of RowGradient for a logit: dx = 2^y (b + a y), y as in the read. All that the
// logits of a row have in common is in a and b.
struct Slope {
  Exponent y;
  float a, b;
};

template <bool kEntropy>
__device__ __forceinline__ Slope slope_of(const RowGradient& c) {
  const Exponent y = exponent_of(c.row_max, c.scale);
  const float shift = y.of(c.row_max) + c.offset;  // log2 p = y - shift
  const float factor = exp2_approx(-shift);
  return {y, kEntropy ? c.a * factor : 0.0f, (kEntropy ? c.b - c.a * shift : c.b) * factor};
}

template <bool kEntropy, bool kPolynomial = false>
__device__ __forceinline__ float gradient_of(const Slope& s, float x) {
  const float y = s.y.of(x);
  const float e = kPolynomial ? exp2_polynomial(y) : exp2_approx(y);
  return e * (kEntropy ? fmaf(s.a, fmaxf(y, -127.0f), s.b) : s.b);
}

template <bool kEntropy>
__device__ __forceinline__ float gradient_of(const Slope& s, Logit x) {
  return gradient_of<kEntropy>(s, x.value) * x.slope;
}

// Of 16 bytes of logits.
template <bool kEntropy, class T, class Cap>
__device__ __forceinline__ uint4 gradient_of(const Slope& s, uint4 bits, const Cap& cap) {
  float x[kPack<T>];
  widen<T>(bits, x);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = gradient_of<kEntropy>(s, cap.of(x[i]));
  return narrow<T>(x);
}
template <bool kEntropy, class T, bool kPolynomial = false>
__device__ __forceinline__ uint4 gradient_of(const Slope& s, uint4 bits) {
  float x[kPack<T>];
  widen<T>(bits, x);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = gradient_of<kEntropy, kPolynomial>(s, x[i]);
  return narrow<T>(x);
}

}  // namespace dcpo
