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

// The sums of a thread while it reads, the maximum's 1 with them.
struct Running {
  float row_max = -INFINITY;
  float sum_exp = 0.0f;
  float sum_exp_z = 0.0f;

  __device__ __forceinline__ Sums sums() const { return {row_max, sum_exp - 1.0f, sum_exp_z}; }
};

// Makes the sums relative to a maximum that is at least theirs. (fmaxf returns its other operand
// for a NaN. Of an empty part the shift is -inf, held at -127: 2^-127 is 0 here, and 0 * -inf is
// not.)
template <bool kEntropy>
__device__ __forceinline__ void rescale(Running& s, float max, float scale) {
  const float base = max == -INFINITY ? 0.0f : max;
  const float shift = fmaxf((s.row_max - base) * scale, -127.0f), factor = exp2_approx(shift);
  if (kEntropy) s.sum_exp_z = factor * (s.sum_exp_z + s.sum_exp * shift);
  s.sum_exp *= factor;
  s.row_max = max;
}

// Adds n logits: one maximum for all of them, then their exponentials (online softmax, arXiv
// 1805.02867, a block at a time).
template <bool kEntropy, int n>
__device__ __forceinline__ void absorb(Running& s, const float (&x)[n], float scale) {
  float max = s.row_max;
#pragma unroll
  for (int i = 0; i < n; ++i) max = fmaxf(max, x[i]);
  rescale<kEntropy>(s, max, scale);
  // A row that begins with -inf has no maximum yet: 0 serves.
  const float base = max == -INFINITY ? 0.0f : max;
  constexpr int kChains = n < 4 ? n : 4;  // short chains of dependent additions
  float sum_exp[kChains] = {}, sum_exp_z[kChains] = {};
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const float y = (x[i] - base) * scale;
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

template <bool kEntropy>
__device__ __forceinline__ float gradient_of(const RowGradient& c, float x) {
  const float y = (x - c.row_max) * c.scale - c.offset;
  if (!kEntropy) return exp2_approx(y) * c.b;
  return exp2_approx(y) * (c.b + c.a * fmaxf(y, -127.0f));
}

// Of 16 bytes of logits.
template <bool kEntropy, class T>
__device__ __forceinline__ uint4 gradient_of(const RowGradient& c, uint4 bits) {
  float x[kPack<T>];
  widen<T>(bits, x);
#pragma unroll
  for (int i = 0; i < kPack<T>; ++i) x[i] = gradient_of<kEntropy>(c, x[i]);
  return narrow<T>(x);
}

}  // namespace dcpo
