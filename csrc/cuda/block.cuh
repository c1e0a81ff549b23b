// A block and a row: how it reads one, writes one, and adds up what its threads found.
#pragma once

#include "cuda/rows.cuh"

namespace dcpo {

// 16-byte loads in flight per thread; one under a softcap, where a thread has more to compute.
constexpr int kUnroll = 4;

// The 16 bytes of a row that are no 16 bytes of memory: by words, and where those begin between two
// words (kHalves) with a half at each end. Nothing beside them is touched: another block may be
// writing there.
template <bool kHalves>
__device__ __forceinline__ uint4 load_unaligned(const void* from) {
  if constexpr (!kHalves) {
    const uint32_t* word = static_cast<const uint32_t*>(from);
    return make_uint4(word[0], word[1], word[2], word[3]);
  } else {
    const uint16_t* half = static_cast<const uint16_t*>(from);
    const uint32_t* word = reinterpret_cast<const uint32_t*>(half + 1);
    const uint32_t first = half[0], a = word[0], b = word[1], c = word[2], last = half[7];
    return make_uint4(first | a << 16, a >> 16 | b << 16, b >> 16 | c << 16, c >> 16 | last << 16);
  }
}

// Adds the 16-byte packs of a row, load(i) each, and what is left of it. Which thread adds what
// depends on the place in the row alone, not on where the row lies: its sums are the same bits
// whatever rows stand before it.
template <bool kEntropy, class T, class Load, class Cap>
__device__ __forceinline__ Sums read_packs(const T* x, int64_t vocab, float scale, Load&& load,
                                           const Cap& cap) {
  const int64_t packs = vocab / kPack<T>, threads = blockDim.x;
  Running sums;
  int64_t i = threadIdx.x;
  if constexpr (!Cap::kCaps) {
    for (; i + (kUnroll - 1) * threads < packs; i += kUnroll * threads) {
      uint4 bits[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) bits[u] = load(i + u * threads);
      absorb<kEntropy, T>(sums, bits, scale, cap);
    }
  }
  for (; i < packs; i += threads) {
    const uint4 bits[1] = {load(i)};
    absorb<kEntropy, T>(sums, bits, scale, cap);
  }
  const int64_t left = packs * kPack<T> + threadIdx.x;
  if (left < vocab) {
    const float value[1] = {cap.of(widen(x[left])).value};
    absorb<kEntropy>(sums, value[0], value, scale);
  }
  return sums.sums();
}

// Any 16 bytes, by elements where they are no 16 bytes of memory.
template <bool kAgain, class T>
__device__ __forceinline__ uint4 load_any(const T* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0) {
    const uint4* pack = reinterpret_cast<const uint4*>(from);
    return kAgain ? load_again(pack) : load_once(pack);
  }
  if constexpr (sizeof(T) == 2) {
    const uint16_t* half = reinterpret_cast<const uint16_t*>(from);
    auto word = [half](int i) {
      return half[2 * i] | static_cast<uint32_t>(half[2 * i + 1]) << 16;
    };
    return make_uint4(word(0), word(1), word(2), word(3));
  }
  return load_unaligned<false>(from);
}

// kAgain: the block reads it again, the last of it first.
template <bool kEntropy, bool kAgain, class T, class Cap>
__device__ Sums read_row(const T* x, int64_t vocab, float scale, const Cap& cap) {
  if constexpr (Cap::kCaps) {
    return read_packs<kEntropy>(
        x, vocab, scale, [x](int64_t i) { return load_any<kAgain>(x + i * kPack<T>); }, cap);
  } else {
    const auto address = reinterpret_cast<uintptr_t>(x);
    if (address % 16 == 0)
      return read_packs<kEntropy>(
          x, vocab, scale,
          [x](int64_t i) {
            const uint4* pack = reinterpret_cast<const uint4*>(x) + i;
            return kAgain ? load_again(pack) : load_once(pack);
          },
          cap);
    if constexpr (sizeof(T) == 2) {
      if (address % 4 != 0)
        return read_packs<kEntropy>(
            x, vocab, scale, [x](int64_t i) { return load_unaligned<true>(x + i * kPack<T>); },
            cap);
    }
    return read_packs<kEntropy>(
        x, vocab, scale, [x](int64_t i) { return load_unaligned<false>(x + i * kPack<T>); }, cap);
  }
}

// The gradient of packs [begin, end) of a row, last first, and, where it is asked for, of the
// elements outside the packs. dx may be x.
template <bool kEntropy, class T, class Cap>
__device__ void write_row(const T* x, T* dx, int64_t vocab, int64_t target, const RowGradient& c,
                          int64_t begin, int64_t end, bool edges, const Cap& cap) {
  const Span<T> span(x, vocab);
  const int threads = blockDim.x, thread = threadIdx.x;
  // Where no 16 bytes are 16 bytes in both rows, elements take the place of packs.
  const bool packed = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % 16 == 0;
  const int64_t edge = edges ? span.edge(thread) : -1;

  // The target is this thread's where the thread writes it below, as one of many: its own gradient
  // is computed before that, and stored after it. (One register over the loop, and not six.)
  const int64_t at = target - span.head;
  bool mine = edge >= 0 && edge == target;
  if (at >= begin * kPack<T> && at < end * kPack<T>)
    mine = (packed ? end - 1 - at / kPack<T> : end * kPack<T> - 1 - at) % threads == thread;
  mine = mine && !c.zero;
  const float target_gradient =
      mine ? gradient_at<kEntropy>(c, cap.of(widen(x[target])), true) : 0.0f;

  const Slope slope = slope_of<kEntropy>(c);
  auto element = [&](int64_t j) {
    narrow(c.zero ? 0.0f : gradient_of<kEntropy>(slope, cap.of(widen(x[j]))), dx[j]);
  };
  if (edge >= 0) element(edge);
  if (packed) {
    const uint4* from = reinterpret_cast<const uint4*>(x + span.head);
    uint4* to = reinterpret_cast<uint4*>(dx + span.head);
    auto gradient = [&](uint4 bits) { return gradient_of<kEntropy, T>(slope, bits, cap); };
    int64_t i = end - 1 - thread;
    if (c.zero) {
      for (; i >= begin; i -= threads) __stcs(to + i, make_uint4(0, 0, 0, 0));
    }
    if constexpr (!Cap::kCaps) {
      for (; i - (kUnroll - 1) * threads >= begin; i -= kUnroll * threads) {
        uint4 bits[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) bits[u] = __ldcs(from + i - u * threads);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) __stcs(to + i - u * threads, gradient(bits[u]));
      }
    }
    for (; i >= begin; i -= threads) __stcs(to + i, gradient(__ldcs(from + i)));
  } else {
    const int64_t first = span.head + begin * kPack<T>;
    for (int64_t j = span.head + end * kPack<T> - 1 - thread; j >= first; j -= threads) element(j);
  }
  if (mine) narrow(target_gradient, dx[target]);
}

// Sums over a block. Double buffer: half h is rewritten only after the next total's barrier, which
// every warp reaches after reading h.
struct BlockTotals {
  float4* parts;  // [2][32]
  int half = 0;

  template <bool kEntropy>
  __device__ Sums total(Sums s, float scale) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4* mine = parts + half * 32;
    half ^= 1;
    s = warp_total<kEntropy>(s, scale);
    if (lane == 0) mine[warp] = make_float4(s.row_max, s.rest, s.sum_exp_z, 0.0f);
    __syncthreads();
    Sums all;
    if (lane < static_cast<int>(blockDim.x) / 32) all = sums_of(mine[lane]);
    return warp_total<kEntropy>(all, scale);
  }

  __device__ float total(float x) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4* mine = parts + half * 32;
    half ^= 1;
    x = warp_sum(x);
    if (lane == 0) mine[warp].x = x;
    __syncthreads();
    return warp_sum(lane < static_cast<int>(blockDim.x) / 32 ? mine[lane].x : 0.0f);
  }
};

}  // namespace dcpo
