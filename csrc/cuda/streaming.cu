// fused for sm_80 and later, and for what the cluster kernel does not take: rows that don't fit or
// don't lie on 16 bytes, divergences over more than the sampled token, no gradient. Also the two
// halves alone: row_stats (read) and row_gradient (write).
//
// A block reads a row from device memory, decides, and reads it again, last part first, from the
// second-level cache while it writes the gradient. Probabilities are never materialized.
#include <algorithm>

#include "cuda/plan.h"
#include "cuda/rows.cuh"
#include "cuda/rows.h"
#include "cuda/runtime.h"

namespace dcpo {
namespace {

constexpr int kMaxThreads = 1024;        // of a block that writes
constexpr int kDivergenceThreads = 512;  // of one that also looks at more than the target
constexpr int kReadThreads = 256;  // of a block that only reads: several share a multiprocessor
constexpr int kUnroll = 4;         // 16-byte loads in flight a thread
constexpr int kPartBytes = 2 * 32 * sizeof(float4);

// ---- over a row ---------------------------------------------------------------------------------

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
template <bool kEntropy, class T, class Load>
__device__ __forceinline__ Sums read_packs(const T* x, int64_t vocab, float scale, Load&& load) {
  const int64_t packs = vocab / kPack<T>, threads = blockDim.x;
  Running sums;
  int64_t i = threadIdx.x;
  for (; i + (kUnroll - 1) * threads < packs; i += kUnroll * threads) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) bits[u] = load(i + u * threads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      float values[kPack<T>];
      widen<T>(bits[u], values);
      absorb<kEntropy>(sums, values, scale);
    }
  }
  for (; i < packs; i += threads) {
    float values[kPack<T>];
    widen<T>(load(i), values);
    absorb<kEntropy>(sums, values, scale);
  }
  const int64_t left = packs * kPack<T> + threadIdx.x;
  if (left < vocab) {
    const float value[1] = {widen(x[left])};
    absorb<kEntropy>(sums, value, scale);
  }
  return sums.sums();
}

template <bool kEntropy, class T>
__device__ Sums read_row(const T* x, int64_t vocab, float scale) {
  const auto address = reinterpret_cast<uintptr_t>(x);
  if (address % 16 == 0)
    return read_packs<kEntropy>(
        x, vocab, scale, [x](int64_t i) { return __ldcg(reinterpret_cast<const uint4*>(x) + i); });
  if constexpr (sizeof(T) == 2) {
    if (address % 4 != 0)
      return read_packs<kEntropy>(
          x, vocab, scale, [x](int64_t i) { return load_unaligned<true>(x + i * kPack<T>); });
  }
  return read_packs<kEntropy>(x, vocab, scale,
                              [x](int64_t i) { return load_unaligned<false>(x + i * kPack<T>); });
}

// The gradient of packs [begin, end) of a row, last first, and, where it is asked for, of the
// elements outside the packs. dx may be x.
template <bool kEntropy, class T>
__device__ void write_row(const T* x, T* dx, int64_t vocab, int64_t target, const RowGradient& c,
                          int64_t begin, int64_t end, bool edges) {
  const Span<T> span(x, vocab);
  const int threads = blockDim.x, thread = threadIdx.x;
  // Where no 16 bytes are 16 bytes in both rows, elements take the place of packs.
  const bool packed = (reinterpret_cast<uintptr_t>(x) - reinterpret_cast<uintptr_t>(dx)) % 16 == 0;
  const int64_t edge = edges ? span.edge(thread) : -1;

  // The target is this thread's where the thread writes it below, as one of many: it asks for the
  // logit before that and corrects the gradient after it.
  const int64_t at = target - span.head;
  bool mine = edge >= 0 && edge == target;
  if (at >= begin * kPack<T> && at < end * kPack<T>)
    mine = (packed ? end - 1 - at / kPack<T> : end * kPack<T> - 1 - at) % threads == thread;
  mine = mine && !c.zero;
  const float target_logit = mine ? widen(x[target]) : 0.0f;

  auto element = [&](int64_t j) {
    narrow(c.zero ? 0.0f : gradient_of<kEntropy>(c, widen(x[j])), dx[j]);
  };
  if (edge >= 0) element(edge);
  if (packed) {
    const uint4* from = reinterpret_cast<const uint4*>(x + span.head);
    uint4* to = reinterpret_cast<uint4*>(dx + span.head);
    auto gradient = [&](uint4 bits) { return gradient_of<kEntropy, T>(c, bits); };
    int64_t i = end - 1 - thread;
    if (c.zero) {
      for (; i >= begin; i -= threads) __stcs(to + i, make_uint4(0, 0, 0, 0));
    }
    for (; i - (kUnroll - 1) * threads >= begin; i -= kUnroll * threads) {
      uint4 bits[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) bits[u] = __ldcs(from + i - u * threads);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) __stcs(to + i - u * threads, gradient(bits[u]));
    }
    for (; i >= begin; i -= threads) __stcs(to + i, gradient(__ldcs(from + i)));
  } else {
    const int64_t first = span.head + begin * kPack<T>;
    for (int64_t j = span.head + end * kPack<T> - 1 - thread; j >= first; j -= threads) element(j);
  }
  if (mine) narrow(gradient_at<kEntropy>(c, target_logit, true), dx[target]);
}

// ---- over a block -------------------------------------------------------------------------------

// Two halves of shared memory in turn: one barrier a total is enough, because a warp that writes to
// a half has passed the barrier of the total in between, which all warps reached after they had
// read this half.
struct BlockTotals {
  float4* parts;  // [2][32]
  int half = 0;

  template <bool kEntropy>
  __device__ Sums total(Sums s, float scale) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float4* mine = parts + half * 32;
    half ^= 1;
    s = warp_total<kEntropy>(s, scale);
    if (lane == 0) mine[warp] = make_float4(s.max, s.rest, s.entropy_sum, 0.0f);
    __syncthreads();
    Sums all;
    if (lane < static_cast<int>(blockDim.x) / 32)
      all = Sums{mine[lane].x, mine[lane].y, mine[lane].z};
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

// ---- divergences over more than the sampled token -----------------------------------------------

// One of the tokens of a top-K divergence, in the thread of its place in the list; the sampled
// token, where it is not listed, in the one after them.
struct Listed {
  bool there = false;
  int64_t id = -1;
  float logit = -INFINITY, old_logprob = -INFINITY;
  float mass_p = 0.0f, mass_q = 0.0f;  // of all of them
};
static_assert(kMaxK < kReadThreads, "every block has a thread for each listed token and one more");

// Over the K listed tokens, the sampled one (where it is not among them) and one bucket for the
// rest. NaN for an id outside the vocabulary.
template <class T>
__device__ float topk_divergence(const FusedArgs& a, int64_t row, const T* x, const Sums& sums,
                                 const RowInputs& in, float target_logit, BlockTotals& block,
                                 Listed& mine) {
  const int kind = a.objective.divergence, thread = threadIdx.x, k = static_cast<int>(a.k);
  bool sampled = false, outside = false;
  if (thread < k) {
    const int64_t id = a.topk_ids[row * a.k + thread];
    sampled = id == in.target;
    outside = !in_vocabulary(id, a.shape.vocab);
    mine = {!outside, id, outside ? NAN : widen(x[id]), a.topk_logprobs[row * a.k + thread]};
  }
  const bool listed = block.total(sampled ? 1.0f : 0.0f) > 0.0f;
  if (thread == k && !listed) mine = {true, in.target, target_logit, in.old_logprob};
  float term = 0.0f, p = 0.0f, q = 0.0f;
  if (mine.there) {
    const float logp = logprob_of(sums, mine.logit, a.shape.temperature);
    term = topk_term(kind, logp, mine.old_logprob);
    p = expf(logp);
    q = expf(mine.old_logprob);
  }
  if (outside) term = NAN;
  mine.mass_p = block.total(p);
  mine.mass_q = block.total(q);
  return finish_topk(kind, block.total(term), mine.mass_p, mine.mass_q);
}

// write_row, and c.pull times the gradient of the divergence (topk_slope).
template <class T>
__device__ void write_row_with_topk(const FusedArgs& a, const T* x, T* dx, const RowInputs& in,
                                    const RowGradient& c, BlockTotals& block, const Listed& mine) {
  float p = 0.0f, slope = 0.0f;
  if (mine.there) {
    const float logp = (mine.logit - c.max) / c.temperature - c.log_sum;
    p = expf(logp);
    slope = topk_slope(a.objective.divergence, logp, mine.old_logprob, mine.mass_p, mine.mass_q);
  }
  const float total = block.total(slope);
  const RowGradient others =
      row_gradient_of<true>(c.g + c.pull * total, c.h, c.max, c.log_sum, c.entropy, c.temperature);
  write_row<true>(x, dx, a.shape.vocab, in.target, others, 0, Span<T>(x, a.shape.vocab).packs,
                  true);
  __syncthreads();
  if (mine.there && in_vocabulary(mine.id, a.shape.vocab))
    narrow(gradient_at<true>(c, mine.logit, mine.id == in.target) +
               c.pull * (slope - p * total) / c.temperature,
           dx[mine.id]);
}

// A row of new logits beside one of old ones: what makes probabilities of both.
struct Pair {
  float scale, p_max, p_offset, q_max, q_offset;

  __device__ Pair(const Sums& sums, const Sums& old, float scale_)
      : scale(scale_),
        p_max(sums.max),
        p_offset(log_sum_of(sums) * kLog2E),
        q_max(old.max),
        q_offset(log_sum_of(old) * kLog2E) {}
  __device__ float log_p(float x) const { return (x - p_max) * scale - p_offset; }
  __device__ float log_q(float x) const { return (x - q_max) * scale - q_offset; }
};

// KL(q || p) while the row of old logits is read: the mean of log q - log p under q.
template <class T>
__device__ float full_kl(const FusedArgs& a, const T* x, const T* old, const Sums& sums,
                         Sums& old_sums, BlockTotals& block) {
  const float scale = kLog2E / a.shape.temperature;
  Running s;  // entropy_sum: of 2^y (y - (x - max x) log2(e) / T)
  for (int64_t j = threadIdx.x; j < a.shape.vocab; j += blockDim.x) {
    const float w = widen(old[j]);
    if (w > s.max) {
      // Before the first logit that was not masked the sum may be infinite: see merged().
      if ((w - s.max) * scale >= 127.0f) s.entropy_sum = 0.0f;
      rescale<true>(s, w, scale);
    }
    const float y = (w - (s.max == -INFINITY ? 0.0f : s.max)) * scale, e = exp2_approx(y);
    s.sum += e;
    if (e != 0.0f) s.entropy_sum += e * (y - (widen(x[j]) - sums.max) * scale);  // or 0 inf
  }
  old_sums = block.total<true>(s.sums(), scale);
  const float mean = old_sums.entropy_sum * kLn2 / (1.0f + old_sums.rest);
  return mean - log_sum_of(old_sums) + log_sum_of(sums);
}

// TV, once both rows were read, and sum sign(p - q) p, which its gradient wants.
template <class T>
__device__ float full_tv(const FusedArgs& a, const T* x, const T* old, const Pair& pair,
                         BlockTotals& block, float& drift) {
  float total = 0.0f, drifted = 0.0f;
  for (int64_t j = threadIdx.x; j < a.shape.vocab; j += blockDim.x) {
    const float p = exp2_approx(pair.log_p(widen(x[j])));
    const float q = exp2_approx(pair.log_q(widen(old[j])));
    total += fabsf(p - q);
    drifted += p * sign(p - q);
  }
  drift = block.total(drifted);
  return 0.5f * block.total(total);
}

// write_row, and c.pull times the gradient of the divergence: p - q of KL, p (sign(p - q) - drift)
// / 2 of TV, over T.
template <class T>
__device__ void write_row_with_full(const FusedArgs& a, const T* x, T* dx, const T* old,
                                    int64_t target, const RowGradient& c, const Pair& pair,
                                    float drift) {
  const bool tv = a.objective.divergence == kFullTv;
  const float pull = c.pull / c.temperature;
  for (int64_t j = threadIdx.x; j < a.shape.vocab; j += blockDim.x) {
    const float logit = widen(x[j]);
    const float p = exp2_approx(pair.log_p(logit)), q = exp2_approx(pair.log_q(widen(old[j])));
    const float own = j == target ? gradient_at<true>(c, logit, true) : gradient_of<true>(c, logit);
    narrow(own + pull * (tv ? 0.5f * p * (sign(p - q) - drift) : p - q), dx[j]);
  }
}

// ---- kernels ------------------------------------------------------------------------------------

// Whether the row is not read; then its results and gradient are written.
template <class T>
__device__ bool skip_idle(const FusedArgs& a, int64_t row, T* dx) {
  if (!idle(a, row)) return false;
  if (threadIdx.x == 0) write_idle(a, row);
  if (dx) {
    RowGradient none{};
    none.zero = true;
    write_row<false>(dx, dx, a.shape.vocab, -1, none, 0, Span<T>(dx, a.shape.vocab).packs, true);
  }
  return true;
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, 1) fused_streaming(const FusedArgs a) {
  DCPO_SHARED(shared);
  BlockTotals block{reinterpret_cast<float4*>(shared)};
  const int64_t vocab = a.shape.vocab;
  const float scale = kLog2E / a.shape.temperature;
  for (int64_t row = blockIdx.x; row < a.shape.rows; row += gridDim.x) {
    T* dx = a.gradient.data ? row_of<T>(a.gradient, row) : nullptr;
    if (skip_idle(a, row, dx)) continue;
    const T* x = row_of<T>(a.logits, row);
    const RowInputs in = load_inputs(a, row);
    // Before the barrier of the total: after it the row may be overwritten.
    const float target_logit = in_vocabulary(in.target, vocab) ? widen(x[in.target]) : NAN;
    const Sums sums = block.total<kEntropy>(read_row<kEntropy>(x, vocab, scale), scale);
    const RowGradient c =
        decide_row<kEntropy>(a, row, in, sums, target_logit, 0.0f, threadIdx.x == 0);
    if (dx) write_row<kEntropy>(x, dx, vocab, in.target, c, 0, Span<T>(x, vocab).packs, true);
  }
}

// Where the objective looks at more of the row than its target.
template <class T>
__global__ void __launch_bounds__(kDivergenceThreads, 1) fused_divergence(const FusedArgs a) {
  DCPO_SHARED(shared);
  BlockTotals block{reinterpret_cast<float4*>(shared)};
  const int64_t vocab = a.shape.vocab;
  const float scale = kLog2E / a.shape.temperature;
  for (int64_t row = blockIdx.x; row < a.shape.rows; row += gridDim.x) {
    T* dx = a.gradient.data ? row_of<T>(a.gradient, row) : nullptr;
    if (skip_idle(a, row, dx)) continue;
    const T* x = row_of<T>(a.logits, row);
    const T* old = a.topk_ids ? nullptr : row_of<const T>(a.old_logits, row);
    const RowInputs in = load_inputs(a, row);
    float target_logit = in_vocabulary(in.target, vocab) ? widen(x[in.target]) : NAN;
    const Sums sums = block.total<true>(read_row<true>(x, vocab, scale), scale);
    Sums old_sums;
    Listed listed;
    float divergence, drift = 0.0f;
    if (!old) {
      divergence = topk_divergence(a, row, x, sums, in, target_logit, block, listed);
      // A NaN would stop no token: an id outside the vocabulary shows in the loss.
      if (!(divergence == divergence)) target_logit = NAN;
    } else if (a.objective.divergence == kFullKl) {
      divergence = full_kl(a, x, old, sums, old_sums, block);
    } else {
      old_sums = block.total<false>(read_row<false>(old, vocab, scale), scale);
      divergence = full_tv(a, x, old, Pair(sums, old_sums, scale), block, drift);
    }
    __syncthreads();  // the row may be overwritten
    const RowGradient c =
        decide_row<true>(a, row, in, sums, target_logit, divergence, threadIdx.x == 0);
    if (!dx) continue;
    if (c.pull == 0.0f)
      write_row<true>(x, dx, vocab, in.target, c, 0, Span<T>(x, vocab).packs, true);
    else if (old)
      write_row_with_full(a, x, dx, old, in.target, c, Pair(sums, old_sums, scale), drift);
    else
      write_row_with_topk(a, x, dx, in, c, block, listed);
  }
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kReadThreads, 4) row_stats(const StatsArgs a) {
  DCPO_SHARED(shared);
  BlockTotals block{reinterpret_cast<float4*>(shared)};
  const int64_t vocab = a.shape.vocab;
  const float temperature = a.shape.temperature, scale = kLog2E / temperature;
  for (int64_t row = blockIdx.x; row < a.shape.rows; row += gridDim.x) {
    float logprob = 0.0f, entropy = 0.0f, max = 0.0f, log_sum = 0.0f;
    if (!a.counts || a.counts[row]) {
      const T* x = row_of<const T>(a.logits, row);
      const int64_t target = a.target_ids[row];
      const float target_logit = in_vocabulary(target, vocab) ? widen(x[target]) : NAN;
      const Sums sums = block.total<kEntropy>(read_row<kEntropy>(x, vocab, scale), scale);
      logprob = logprob_of(sums, target_logit, temperature);
      entropy = kEntropy ? entropy_of(sums) : 0.0f;
      max = sums.max;
      log_sum = log_sum_of(sums);
    }
    if (threadIdx.x == 0) {
      a.logprobs[row] = logprob;
      if (kEntropy) a.entropy[row] = entropy;
      a.row_max[row] = max;
      a.log_sum[row] = log_sum;
    }
  }
}

// A row in pieces of `piece` packs, each of one block. (With four blocks to a multiprocessor it
// would spill.)
template <class T>
__global__ void __launch_bounds__(kReadThreads, 3)
    row_gradient(const GradientArgs a, const int64_t pieces, const int64_t piece) {
  const int64_t vocab = a.shape.vocab;
  for (int64_t item = blockIdx.x; item < a.shape.rows * pieces; item += gridDim.x) {
    const int64_t row = item / pieces, begin = item % pieces * piece;
    const T* x = row_of<const T>(a.logits, row);
    const int64_t target = a.target_ids[row], packs = Span<T>(x, vocab).packs;
    const int64_t end = begin + piece < packs ? begin + piece : packs;
    RowGradient c =
        row_gradient_of<true>(a.g[row], a.h ? a.h[row] : 0.0f, a.row_max[row], a.log_sum[row],
                              a.entropy ? a.entropy[row] : 0.0f, a.shape.temperature);
    if (!in_vocabulary(target, vocab)) c.b = NAN;
    write_row<true>(x, row_of<T>(a.gradient, row), vocab, target, c, begin, end, begin == 0);
  }
}

// ---- launches -----------------------------------------------------------------------------------

// Blocks of a persistent grid: what runs at once, and no more than there is work.
template <class... P>
int64_t persistent_blocks(PerDevice<int64_t>& cache, void (*kernel)(P...), int device, int threads,
                          int64_t work) {
  const int64_t most = cache.get(device, reinterpret_cast<const void*>(kernel), threads, [&] {
    return static_cast<int64_t>(limits(device).multiprocessors) *
           blocks_per_multiprocessor(kernel, threads, kPartBytes);
  });
  return most < work ? most : work;
}
PerDevice<int64_t> persistent;

// Threads of a block that goes over a row twice: as many as find kUnroll packs each. One such block
// to a multiprocessor keeps the rows in flight small enough for the second-level cache.
int threads_for(int64_t row_bytes, int most) {
  int threads = kReadThreads;
  while (threads < most && threads * 16 * kUnroll < row_bytes) threads *= 2;
  return threads;
}

template <class T>
void fused_with(const FusedArgs& args, int device, uintptr_t stream) {
  const bool divergence = args.topk_ids || args.old_logits.data;
  const auto kernel = divergence     ? fused_divergence<T>
                      : args.entropy ? fused_streaming<T, true>
                                     : fused_streaming<T, false>;
  const int most = !args.gradient.data ? kReadThreads
                   : divergence        ? kDivergenceThreads
                                       : kMaxThreads;
  const int threads = threads_for(args.shape.vocab * sizeof(T), most);
  const Grid grid{persistent_blocks(persistent, kernel, device, threads, args.shape.rows), threads,
                  kPartBytes, 0};
  Launcher(grid, stream).run(divergence ? "fused_divergence" : "fused_streaming", kernel, args);
}

template <class T>
void stats_with(const StatsArgs& args, int device, uintptr_t stream) {
  const auto kernel = args.entropy ? row_stats<T, true> : row_stats<T, false>;
  const Grid grid{persistent_blocks(persistent, kernel, device, kReadThreads, args.shape.rows),
                  kReadThreads, kPartBytes, 0};
  Launcher(grid, stream).run("row_stats", kernel, args);
}

template <class T>
void gradient_with(const GradientArgs& args, int device, uintptr_t stream) {
  const int64_t piece = kReadThreads * kUnroll * 2, packs = args.shape.vocab / kPack<T> + 1;
  const int64_t pieces = (packs + piece - 1) / piece;
  const Grid grid{persistent_blocks(persistent, row_gradient<T>, device, kReadThreads,
                                    args.shape.rows * pieces),
                  kReadThreads, kPartBytes, 0};
  Launcher(grid, stream).run("row_gradient", row_gradient<T>, args, pieces, piece);
}

#define DCPO_FOR_DTYPE(function)                       \
  switch (args.shape.dtype) {                          \
    case kBFloat16:                                    \
      return function<BFloat16>(args, device, stream); \
    case kFloat16:                                     \
      return function<Float16>(args, device, stream);  \
    case kFloat32:                                     \
      return function<float>(args, device, stream);    \
  }

}  // namespace

void launch_streaming(const FusedArgs& args, int device,
                      uintptr_t stream){DCPO_FOR_DTYPE(fused_with)}

Plan cuda_plan(const FusedArgs& args, int device, int cluster) {
  const int64_t size = args.shape.dtype == kFloat32 ? 4 : 2;
  auto on_16_bytes = [size](const View& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.row_stride * size % 16 == 0 &&
           view.batch_stride * size % 16 == 0;
  };
  if (cluster == 0 || !args.gradient.data || args.topk_ids || args.old_logits.data ||
      args.shape.vocab * size % 16 != 0 || !on_16_bytes(args.logits) || !on_16_bytes(args.gradient))
    return {};
  static PerDevice<Limits> cache;
  const Limits gpu = cache.get(device, nullptr, 0, [device] { return limits(device); });
  return cluster == kByTable ? choose_plan(args.shape.vocab * size, gpu.major, gpu.shared_bytes)
                             : cluster_plan(args.shape.vocab * size, cluster, gpu.shared_bytes);
}

void cuda_fused(const FusedArgs& args, int device, uintptr_t stream, int cluster) {
  if (args.shape.rows == 0 || args.shape.vocab == 0) return;
  DeviceGuard guard(device);
  const Plan plan = cuda_plan(args, device, cluster);
  if (plan.cluster > 0)
    launch_cluster(args, plan, device, stream);
  else
    launch_streaming(args, device, stream);
}

void cuda_stats(const StatsArgs& args, int device, uintptr_t stream) {
  if (args.shape.rows == 0 || args.shape.vocab == 0) return;
  DeviceGuard guard(device);
  DCPO_FOR_DTYPE(stats_with)
}

void cuda_gradient(const GradientArgs& args, int device, uintptr_t stream) {
  if (args.shape.rows == 0 || args.shape.vocab == 0) return;
  DeviceGuard guard(device);
  DCPO_FOR_DTYPE(gradient_with)
}

#undef DCPO_FOR_DTYPE

}  // namespace dcpo
