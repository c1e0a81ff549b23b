// fused for sm_80 and later, and for what fused_resident does not take: rows that don't fit or
// don't lie on 16 bytes, a softcap, divergences over more than the sampled token, no gradient. Also
// the two halves alone: row_stats (read) and row_gradient (write).
//
// A block reads a row from device memory, decides, and reads it again, last part first, from the
// caches while it writes the gradient. Probabilities are never materialized.
#include <algorithm>

#include "cuda/divergence.cuh"
#include "cuda/plan.h"
#include "cuda/rows.h"
#include "cuda/runtime.h"

namespace dcpo {
namespace {

constexpr int kMaxThreads = 1024;        // of a block that writes
constexpr int kDivergenceThreads = 512;  // of one that also looks at more than the target
constexpr int kReadThreads = 256;  // of a block that only reads: several share a multiprocessor
constexpr int kPartBytes = 2 * 32 * sizeof(float4);
static_assert(kMaxK < kReadThreads, "every block has a thread for each listed token and one more");

// ---- kernels ------------------------------------------------------------------------------------

// Whether the row is not read; then its results and gradient are written.
template <class T>
__device__ bool skip_idle(const FusedArgs& a, int64_t row, T* dx) {
  if (!idle(a, row)) return false;
  if (threadIdx.x == 0) write_idle(a, row);
  if (dx) {
    RowGradient none{};
    none.zero = true;
    write_row<false>(dx, dx, a.vocab, -1, none, 0, Span<T>(dx, a.vocab).packs, true, NoSoftcap());
  }
  return true;
}

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kMaxThreads, 1) fused_streaming(const FusedArgs a) {
  DCPO_SHARED(shared);
  BlockTotals block{reinterpret_cast<float4*>(shared)};
  const int64_t vocab = a.vocab;
  const NoSoftcap cap;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    T* dx = a.gradient.data ? row_of<T>(a.gradient, row) : nullptr;
    if (skip_idle(a, row, dx)) continue;
    const T* x = row_of<T>(a.logits, row);
    const RowInputs in = load_inputs(a, row);
    const float scale = kLog2E / temperature_of(a, row);
    // Before the barrier of the total: after it the row may be overwritten.
    const float target_logit =
        cap.of(in_vocabulary(in.target, vocab) ? widen(x[in.target]) : NAN).value;
    const Sums sums = block.total<kEntropy>(read_row<kEntropy, true>(x, vocab, scale, cap), scale);
    const RowGradient c =
        decide_row<kEntropy>(a, row, in, sums, target_logit, 0.0f, threadIdx.x == 0);
    if (dx) write_row<kEntropy>(x, dx, vocab, in.target, c, 0, Span<T>(x, vocab).packs, true, cap);
  }
}

// Where the objective looks at more of the row than its target, or there is a softcap.
template <class T, class Cap>
__global__ void __launch_bounds__(kDivergenceThreads, 1) fused_divergence(const FusedArgs a) {
  DCPO_SHARED(shared);
  BlockTotals block{reinterpret_cast<float4*>(shared)};
  const int64_t vocab = a.vocab;
  const Cap cap(a.softcap);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    T* dx = a.gradient.data ? row_of<T>(a.gradient, row) : nullptr;
    if (skip_idle(a, row, dx)) continue;
    const T* x = row_of<const T>(a.logits, row);
    const RowInputs in = load_inputs(a, row);
    const float scale = kLog2E / temperature_of(a, row);
    Logit target_logit = cap.of(in_vocabulary(in.target, vocab) ? widen(x[in.target]) : NAN);
    const Sums sums = block.total<true>(read_row<true, true>(x, vocab, scale, cap), scale);
    OldRow old = old_row_of(a, row);
    Listed listed;
    float divergence = 0.0f;
    if (old.data) {
      divergence = full_divergence(a, x, sums, scale, old, block, cap);
    } else if (needs_topk(a.objective)) {
      divergence = topk_divergence(a, row, x, sums, in, target_logit, block, listed, cap);
      // A NaN divergence compares false and would leave the token unmasked: put the NaN into its
      // logit. It comes of an id outside the vocabulary.
      if (!(divergence == divergence)) target_logit.value = NAN;
    }
    __syncthreads();  // the row may be overwritten
    const RowGradient c =
        decide_row<true>(a, row, in, sums, target_logit.value, divergence, threadIdx.x == 0);
    if (!dx) continue;
    if (old.data && c.divergence_coef != 0.0f)
      write_row_with_full(a, x, dx, in.target, c, sums, old, cap);
    else
      write_row_with_topk(a, x, dx, in, c, block, listed, cap);
  }
}

template <class T, bool kEntropy, class Cap>
__global__ void __launch_bounds__(kReadThreads, 4) row_stats(const StatsArgs a) {
  DCPO_SHARED(shared);
  BlockTotals block{reinterpret_cast<float4*>(shared)};
  const int64_t vocab = a.vocab;
  const Cap cap(a.softcap);
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    float logprob = 0.0f, entropy = 0.0f, row_max = 0.0f, log_sum = 0.0f;
    if (!a.mask || a.mask[row]) {
      const float temperature = temperature_of(a, row), scale = kLog2E / temperature;
      const T* x = row_of<const T>(a.logits, row);
      const int64_t target = a.target_ids[row * a.k];
      const float target_logit =
          cap.of(in_vocabulary(target, vocab) ? widen(x[target]) : NAN).value;
      const Sums sums =
          block.total<kEntropy>(read_row<kEntropy, false>(x, vocab, scale, cap), scale);
      logprob = logprob_of(sums, target_logit, temperature);
      entropy = kEntropy ? entropy_of(sums) : 0.0f;
      row_max = sums.row_max;
      log_sum = log_sum_of(sums);
    }
#pragma unroll 1
    for (int64_t i = row * a.k + 1 + threadIdx.x; i < (row + 1) * a.k; i += blockDim.x) {
      const int64_t target = a.target_ids[i];
      const bool inside = in_vocabulary(target, vocab);
      const float logit =
          cap.of(inside ? widen(row_of<const T>(a.logits, row)[target]) : NAN).value;
      const bool reads = !a.mask || a.mask[row];
      a.logprobs[i] = reads ? (logit - row_max) / temperature_of(a, row) - log_sum : 0.0f;
    }
    if (threadIdx.x == 0) {
      a.logprobs[row * a.k] = logprob;
      if (kEntropy && a.entropy) a.entropy[row] = entropy;
      a.row_max[row] = row_max;
      a.log_sum[row] = log_sum;
    }
  }
}

// A row in pieces of `piece` packs, each of one block. (With four blocks to a multiprocessor it
// would spill.) kSeveral: of a row's targets each is the thread's of its place among them, in the
// block that writes its entry.
template <class T, bool kSeveral, class Cap>
__global__ void __launch_bounds__(kReadThreads, 3)
    row_gradient(const GradientArgs a, const int64_t pieces, const int64_t piece) {
  const int64_t vocab = a.vocab;
  const Cap cap(a.softcap);
  for (int64_t item = blockIdx.x; item < a.rows * pieces; item += gridDim.x) {
    const int64_t row = item / pieces, begin = item % pieces * piece;
    const T* x = row_of<const T>(a.logits, row);
    const int64_t target = a.target_ids[row * a.k], packs = Span<T>(x, vocab).packs;
    const int64_t end = begin + piece < packs ? begin + piece : packs;
    if constexpr (!kSeveral) {
      RowGradient c = row_gradient_of<true>(a, row, a.g[row]);
      if (!in_vocabulary(target, vocab)) c.b = NAN;
      write_row<true>(x, row_of<T>(a.gradient, row), vocab, target, c, begin, end, begin == 0, cap);
    } else {
      T* dx = row_of<T>(a.gradient, row);
      const int64_t* targets = a.target_ids + row * a.k;
      float g = 0.0f, pulls = 0.0f;
      for (int64_t i = threadIdx.x % 32; i < a.k; i += 32) {
        g += in_vocabulary(targets[i], vocab) ? a.g[row * a.k + i] : NAN;
        pulls += fabsf(a.g[row * a.k + i]);
      }
      RowGradient c = row_gradient_of<true>(a, row, warp_sum(g));
      c.zero = c.h == 0.0f && warp_sum(pulls) == 0.0f;  // targets whose g cancel have their entries
      const int64_t own = threadIdx.x < a.k ? targets[threadIdx.x] : -1;
      const bool mine = in_vocabulary(own, vocab) && !c.zero && c.b == c.b &&
                        Span<T>(x, vocab).has(own, begin, end, begin == 0);
      const Logit logit = cap.of(mine ? widen(x[own]) : 0.0f);
      __syncthreads();  // the row may be overwritten
      write_row<true>(x, dx, vocab, target, c, begin, end, begin == 0, cap);
      __syncthreads();
      if (mine) narrow(gradient_at_target(a, row, threadIdx.x, c, logit), dx[own]);
    }
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

// Under a softcap there is the kernel that has it all, for what needs less too.
template <class T>
auto fused_kernel(bool more, bool entropy, bool softcap) {
  if (softcap) return fused_divergence<T, Softcap>;
  return more      ? fused_divergence<T, NoSoftcap>
         : entropy ? fused_streaming<T, true>
                   : fused_streaming<T, false>;
}
template <class T>
auto stats_kernel(bool entropy, bool softcap) {
  if (softcap) return row_stats<T, true, Softcap>;
  return entropy ? row_stats<T, true, NoSoftcap> : row_stats<T, false, NoSoftcap>;
}
template <class T>
auto gradient_kernel(bool several, bool softcap) {
  if (softcap) return row_gradient<T, true, Softcap>;
  return several ? row_gradient<T, true, NoSoftcap> : row_gradient<T, false, NoSoftcap>;
}

template <class T>
void fused_with(const FusedArgs& args, int device, uintptr_t stream) {
  const bool softcap = args.softcap > 0.0f;
  const bool more = softcap || args.topk_ids || args.old_logits.data;  // than the target
  const auto kernel = fused_kernel<T>(more, args.entropy, softcap);
  const int most = !args.gradient.data ? kReadThreads : more ? kDivergenceThreads : kMaxThreads;
  const int threads = threads_for(args.vocab * sizeof(T), most);
  const Grid grid{persistent_blocks(persistent, kernel, device, threads, args.rows), threads,
                  kPartBytes, 0};
  Launcher(grid, stream).run(more ? "fused_divergence" : "fused_streaming", kernel, args);
}

template <class T>
void stats_with(const StatsArgs& args, int device, uintptr_t stream) {
  const auto kernel = stats_kernel<T>(args.entropy, args.softcap > 0.0f);
  const Grid grid{persistent_blocks(persistent, kernel, device, kReadThreads, args.rows),
                  kReadThreads, kPartBytes, 0};
  Launcher(grid, stream).run("row_stats", kernel, args);
}

template <class T>
void gradient_with(const GradientArgs& args, int device, uintptr_t stream) {
  const int64_t piece = kReadThreads * kUnroll * 2, packs = args.vocab / kPack<T> + 1;
  const int64_t pieces = (packs + piece - 1) / piece;
  const auto kernel = gradient_kernel<T>(args.k > 1, args.softcap > 0.0f);
  const Grid grid{persistent_blocks(persistent, kernel, device, kReadThreads, args.rows * pieces),
                  kReadThreads, kPartBytes, 0};
  Launcher(grid, stream).run("row_gradient", kernel, args, pieces, piece);
}

}  // namespace

void launch_streaming(const FusedArgs& args, int device, uintptr_t stream) {
  with_dtype(args.dtype, [&](auto t) { fused_with<decltype(t)>(args, device, stream); });
}

void load_streaming() {
  each_dtype([](auto t) {
    using T = decltype(t);
    for (const bool more : {false, true}) {
      for (const bool softcap : {false, true})
        load(fused_kernel<T>(false, more, softcap), fused_kernel<T>(true, more, softcap),
             stats_kernel<T>(more, softcap), gradient_kernel<T>(more, softcap));
    }
  });
}

Plan cuda_plan(int64_t row_bytes, int device, int cluster) {
  static PerDevice<Limits> cache;
  const Limits gpu = cache.get(device, nullptr, 0, [device] { return limits(device); });
  const Plan plan = choose_plan(row_bytes, gpu.major, gpu.shared_bytes, cluster);
  return plan.cluster > 0 && resident_fits(plan, device) ? plan : Plan{};
}

void cuda_fused(const FusedArgs& args, int device, uintptr_t stream, int cluster, int polynomial) {
  if (args.rows == 0 || args.vocab == 0) return;
  DeviceGuard guard(device);
  const int64_t size = size_of(args.dtype);
  auto on_16_bytes = [size](const View& view) {
    return reinterpret_cast<uintptr_t>(view.data) % 16 == 0 && view.row_stride * size % 16 == 0 &&
           view.batch_stride * size % 16 == 0;
  };
  Plan plan;
  if (args.gradient.data && args.softcap == 0.0f && !args.topk_ids && !args.old_logits.data &&
      args.vocab * size % 16 == 0 && on_16_bytes(args.logits) && on_16_bytes(args.gradient))
    plan = cuda_plan(args.vocab * size, device, cluster);
  if (polynomial != kByTable) plan.polynomial = polynomial;
  if (plan.cluster > 0)
    launch_resident(args, plan, stream);
  else
    launch_streaming(args, device, stream);
}

void cuda_stats(const StatsArgs& args, int device, uintptr_t stream) {
  if (args.rows == 0 || args.vocab == 0) return;
  DeviceGuard guard(device);
  with_dtype(args.dtype, [&](auto t) { stats_with<decltype(t)>(args, device, stream); });
}

void cuda_gradient(const GradientArgs& args, int device, uintptr_t stream) {
  if (args.rows == 0 || args.vocab == 0) return;
  DeviceGuard guard(device);
  with_dtype(args.dtype, [&](auto t) { gradient_with<decltype(t)>(args, device, stream); });
}

}  // namespace dcpo
