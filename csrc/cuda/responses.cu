// The operators around the vocabulary kernel, one launch each. Sums have a fixed order, nothing is
// atomic.
//
// token_weights is one block, since each weight waits for the counts of the whole call; so is the
// summary of finish. Bytes per row: token_weights reads a mask twice and skip_zero, writes weight
// and mask and reads and writes a value twice, 7 + 4 + 8 per value at most; finish reads 25. One
// multiprocessor moves some 30 bytes per ns, so 65,536 rows of them take 40 and 50 us: half a
// percent of the 40 GB that the row kernel moves for the same rows of 151,936 16-bit logits. decide
// moves 25 to 41 bytes per row on all multiprocessors.
#include "cuda/numbers.cuh"
#include "cuda/rows.h"
#include "cuda/runtime.h"
#include "responses.h"

namespace dcpo {
namespace {

constexpr unsigned kEveryLane = 0xffffffffu;
constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kTeam = 256;  // threads that sum a response in decide and finish

__device__ __forceinline__ int warp_index() { return threadIdx.x / 32; }
__device__ __forceinline__ bool first_lane() { return threadIdx.x % 32 == 0; }

template <class T>
__device__ __forceinline__ T sum_of_warp(T x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kEveryLane, x, step);
  return x;
}

// Over `warps` neighbouring warps, in all of their threads. Every thread of the block comes here,
// with one place in `parts` per warp.
template <class T, class Sum>
__device__ __forceinline__ Sum sum_of_warps(T x, int warps, Sum* parts) {
  x = sum_of_warp(x);
  __syncthreads();  // who was here before has read
  if (first_lane()) parts[warp_index()] = static_cast<Sum>(x);
  __syncthreads();
  const int first = warp_index() / warps * warps;
  Sum sum = parts[first];
  for (int k = 1; k < warps; ++k) sum += parts[first + k];
  return sum;
}

// ---- token_weights ------------------------------------------------------------------------------

struct Add {
  static __device__ int64_t of(int64_t a, int64_t b) { return wrapping_add(a, b); }
};
struct Max {
  static __device__ int64_t of(int64_t a, int64_t b) { return a > b ? a : b; }
};

// What the threads before this one have together; 0 for the first. shared: a place per thread.
template <class Op>
__device__ int64_t scan_before(int64_t x, int64_t* shared) {
  const int i = threadIdx.x;
  for (int step = 1; step < kThreads; step *= 2) {
    shared[i] = x;
    __syncthreads();
    if (i >= step) x = Op::of(shared[i - step], x);
    __syncthreads();
  }
  shared[i] = x;
  __syncthreads();
  const int64_t before = i > 0 ? shared[i - 1] : 0;
  __syncthreads();
  return before;
}

// Sets the offsets; they never fall and never leave the rows, whatever the lengths are. Each thread
// has neighbouring responses.
__device__ void lay_out(const TokenWeightsArgs& a, int64_t* shared) {
  const int64_t share = (a.count + kThreads - 1) / kThreads;
  const int64_t first = threadIdx.x * share;
  const int64_t last = first + share < a.count ? first + share : a.count;
  int64_t sum = 0;
  for (int64_t i = first; i < last; ++i) sum = wrapping_add(sum, length_of(a, i));
  const int64_t sum_before = scan_before<Add>(sum, shared);

  int64_t end = 0;
  sum = sum_before;
  for (int64_t i = first; i < last; ++i) {
    sum = wrapping_add(sum, length_of(a, i));
    end = Max::of(end, within(sum, a.rows));
  }
  end = scan_before<Max>(end, shared);
  sum = sum_before;
  for (int64_t i = first; i < last; ++i) {
    sum = wrapping_add(sum, length_of(a, i));
    end = Max::of(end, within(sum, a.rows));
    a.responses.offsets[i + 1] = end;
  }
  if (threadIdx.x == 0) a.responses.offsets[0] = 0;
  __syncthreads();
}

// Few responses are taken one after the other by many warps, many by a warp each.
__global__ void __launch_bounds__(kThreads, 1) token_weights_kernel(const TokenWeightsArgs a) {
  DCPO_SHARED(shared);
  int64_t* parts = reinterpret_cast<int64_t*>(shared);
  lay_out(a, parts);

  const Grouping& g = a.grouping;
  int warps = kWarps;  // of a team
  while (warps > 1 && kWarps / warps < a.count) warps /= 2;
  const int teams = kWarps / warps, team = warp_index() / warps;
  const int threads = 32 * warps, thread = threadIdx.x % threads;

  Counts mine{0, 0, 0};  // of every team's responses, in its first thread
  for (int64_t next = 0; next < a.count; next += teams) {
    const int64_t i = next + team;
    uint32_t n = 0;
    if (i < a.count)
      for (int64_t row = a.responses.offsets[i] + thread; row < a.responses.offsets[i + 1];
           row += threads)
        n += counts(g, row);
    const int64_t here = sum_of_warps(n, warps, parts);
    if (i < a.count && thread == 0) {
      const int64_t length = whole_length(g, i, here);
      a.responses.lengths[i] = length;
      add(mine, length);
    }
  }
  __syncthreads();
  Counts* all = reinterpret_cast<Counts*>(shared);
  if (first_lane()) all[warp_index()] = mine;
  __syncthreads();
  Counts c{0, 0, 0};
  for (int k = 0; k < kWarps; ++k) {
    c.responses += all[k].responses;
    c.tokens += all[k].tokens;
    c.longest = Max::of(c.longest, all[k].longest);
  }

  for (int64_t next = 0; next < a.count; next += teams) {
    const int64_t i = next + team;
    const int64_t begin = i < a.count ? a.responses.offsets[i] : 0;
    const int64_t end = i < a.count ? a.responses.offsets[i + 1] : 0;
    bool whole = false;
    if (g.skip_whole_responses) {
      uint32_t n = 0;
      for (int64_t row = begin + thread; row < end; row += threads)
        n += counts(g, row) && live(g, i, row);
      whole = sum_of_warps(n, warps, parts) > 0;
    }
    const float weight = begin < end ? token_weight(g, c, a.responses.lengths[i]) : 0.0f;
    for (int64_t row = begin + thread; row < end; row += threads)
      write_token(a, i, row, whole, weight);
  }
  for (int64_t row = a.responses.offsets[a.count] + threadIdx.x; row < a.rows; row += kThreads)
    write_rest(a, row);
}

// ---- decide -------------------------------------------------------------------------------------

__global__ void __launch_bounds__(kTeam) decide_kernel(const DecideArgs a) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kTeam + threadIdx.x;
  if (row < a.rows) decide_row(a, row, nullptr);
}

// A block has a response.
__global__ void __launch_bounds__(kTeam, 4) decide_responses_kernel(const DecideArgs a) {
  DCPO_SHARED(shared);
  const ResponseRows r = rows_of(a, blockIdx.x);
  float sum = 0.0f;
  for (int64_t row = r.begin + threadIdx.x; row < r.end; row += kTeam) sum += log_ratio_of(a, row);
  sum = sum_of_warps(sum, kTeam / 32, reinterpret_cast<float*>(shared));
  const float log_ratio = response_log_ratio(a.objective, sum, r.length);
  float pull = 0.0f;
  for (int64_t row = r.begin + threadIdx.x; row < r.last; row += kTeam) {
    const float own = decide_row(a, row, &log_ratio);
    if (row < r.end) pull += own;
  }
  if (!a.spread) return;
  const float share =
      mean(sum_of_warps(pull, kTeam / 32, reinterpret_cast<float*>(shared)), r.length);
  for (int64_t row = r.begin + threadIdx.x; row < r.last; row += kTeam) spread_to(a, row, share);
}

// ---- finish -------------------------------------------------------------------------------------

__device__ void summarize(const FinishArgs& a, Summary<float>* parts) {
  Summary<float> s = nothing_read<float>();
  for (int64_t row = threadIdx.x; row < a.rows; row += kThreads) add(s, of_row<float>(a, row));
  for (int step = 16; step > 0; step /= 2) {
    Summary<float> other;
#pragma unroll
    for (int k = 0; k < kSummaryFields; ++k)
      other.at[k] = __shfl_xor_sync(kEveryLane, s.at[k], step);
    add(s, other);
  }
  if (first_lane()) parts[warp_index()] = s;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int k = 1; k < kWarps; ++k) add(s, parts[k]);
  store(a, s);
}

// The first block has the summary, each other the responses of its teams.
__global__ void __launch_bounds__(kThreads) finish_kernel(const FinishArgs a) {
  DCPO_SHARED(shared);
  if (blockIdx.x == 0) return summarize(a, reinterpret_cast<Summary<float>*>(shared));
  constexpr int kTeams = kThreads / kTeam;
  const int64_t i = static_cast<int64_t>(blockIdx.x - 1) * kTeams + threadIdx.x / kTeam;
  float sum = 0.0f;
  if (i < a.count)
    for (int64_t row = a.offsets[i] + threadIdx.x % kTeam; row < a.offsets[i + 1]; row += kTeam)
      sum += a.token_loss[row];
  sum = sum_of_warps(sum, kTeam / 32, reinterpret_cast<float*>(shared));
  if (i < a.count && threadIdx.x % kTeam == 0) a.response_loss[i] = mean(sum, a.lengths[i]);
}

}  // namespace

void load_responses() {
  load(token_weights_kernel, decide_kernel, decide_responses_kernel, finish_kernel);
}

void cuda_token_weights(const TokenWeightsArgs& args, int device, uintptr_t stream) {
  DeviceGuard guard(device);
  const Grid grid{1, kThreads, kThreads * sizeof(int64_t), 0};
  Launcher(grid, stream).run("token_weights", token_weights_kernel, args);
}

void cuda_decide(const DecideArgs& args, int device, uintptr_t stream) {
  if (args.rows == 0) return;
  DeviceGuard guard(device);
  const int64_t blocks =
      args.by_response ? (args.count > 0 ? args.count : 1) : (args.rows + kTeam - 1) / kTeam;
  const Grid grid{blocks, kTeam, kTeam / 32 * sizeof(float), 0};
  Launcher(grid, stream)
      .run("decide", args.by_response ? decide_responses_kernel : decide_kernel, args);
}

void cuda_finish(const FinishArgs& args, int device, uintptr_t stream) {
  DeviceGuard guard(device);
  constexpr int64_t kTeams = kThreads / kTeam;
  const Grid grid{1 + (args.count + kTeams - 1) / kTeams, kThreads, kWarps * sizeof(Summary<float>),
                  0};
  Launcher(grid, stream).run("finish", finish_kernel, args);
}

}  // namespace dcpo
