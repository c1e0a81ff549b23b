// fused, for sm_90 and later: read, decide and write with one read and one write of device memory.
// A row of logits lies in the shared memory of a cluster of blocks, a slice in each, from its load
// until its gradient is stored; probabilities are never materialized, and no row is read twice.
//
//   load      one thread asks for the block's slice, all of it at once
//   read      every thread adds up its part of the slice
//   exchange  a warp sends the block's sums to every block of the cluster, and waits for theirs
//   decide    the same warp; what the others need for the gradient goes to shared memory
//   write     the gradient goes from registers to device memory
//
// The phases of a block follow each other. It is other blocks of the multiprocessor, at other rows,
// that use the memory meanwhile (plan.h).
#include <type_traits>

#include "cuda/hopper.cuh"
#include "cuda/plan.h"
#include "cuda/rows.cuh"
#include "cuda/rows.h"
#include "cuda/runtime.h"

namespace dcpo {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

constexpr int kTilePacks = 4;  // of a thread
constexpr int kTile = 32 * kTilePacks;

// What a block has in shared memory behind its slice.
struct Beside {
  float4 blocks[kMaxCluster];       // the sums of each block, and its target logit or 0
  float4 warps[kMostThreads / 32];  // of each warp
  Slope slope;
  float target_gradient;
  bool zero;
  uint64_t loaded, exchanged;  // mbarriers
};
static_assert(sizeof(Beside) <= kBesideSlice);

// The slice, in tiles of a warp: tile(i) for each whole one, of whose packs i, i + 32, ... are this
// thread's. Then what is left, a pack to a thread: pack(i).
template <class Tile, class Pack>
__device__ __forceinline__ void for_slice(int packs, Tile&& tile, Pack&& pack) {
  const int tiles = packs / kTile, warps = blockDim.x / 32;
  for (int i = threadIdx.x / 32; i < tiles; i += warps) tile(i * kTile + threadIdx.x % 32);
  const int left = tiles * kTile + threadIdx.x;
  if (left < packs) pack(left);
}

#endif

// kPolynomial: so many of a tile's packs have their exponentials from multiply-adds.
template <class T, bool kEntropy, int kPolynomial>
__global__ void __launch_bounds__(kMostThreads, kLeastBlocks)
    fused_resident(const FusedArgs a, const int slice) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  DCPO_SHARED(shared);
  const uint4* from = reinterpret_cast<const uint4*>(shared);
  Beside& beside = *reinterpret_cast<Beside*>(shared + slice * 16);
  const int blocks = hopper::cluster_size(), rank = hopper::cluster_rank();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = hopper::cluster_index();
  const int first = rank * slice, left = static_cast<int>(a.vocab / kPack<T>) - first;
  const int packs = left < 0 ? 0 : left < slice ? left : slice;
  uint4* to = reinterpret_cast<uint4*>(row_of<T>(a.gradient, row)) + first;
  auto zeros = [&] {
    for (int i = threadIdx.x; i < packs; i += blockDim.x) __stcs(to + i, make_uint4(0, 0, 0, 0));
  };

  if (idle(a, row)) {  // in every block of the cluster
    zeros();
    if (rank == 0 && threadIdx.x == 0) write_idle(a, row);
    return;
  }
  if (threadIdx.x == 0) {
    hopper::init(&beside.loaded, 1);
    hopper::init(&beside.exchanged, 1);
    hopper::fence_init();
    hopper::arrive_expect(&beside.exchanged, blocks * static_cast<uint32_t>(sizeof(float4)));
    hopper::arrive_expect(&beside.loaded, packs * 16);
    if (packs > 0)
      hopper::bulk_load(shared, reinterpret_cast<const uint4*>(row_of<T>(a.logits, row)) + first,
                        packs * 16, &beside.loaded);
  }
  hopper::cluster_arrive();
  const float scale = kLog2E / temperature_of(a, row);
  const int64_t place = a.target_ids[row] - static_cast<int64_t>(first) * kPack<T>;
  const int target = place >= 0 && place < packs * kPack<T> ? static_cast<int>(place) : -1;
  hopper::cluster_wait();  // the barriers are there, in every block
  hopper::wait(&beside.loaded, 0);

  Running running;
  for_slice(
      packs,
      [&](int i) {
        const uint4 bits[kTilePacks] = {from[i], from[i + 32], from[i + 64], from[i + 96]};
        absorb<kEntropy, T>(running, bits, scale);
      },
      [&](int i) {
        const uint4 bits[1] = {from[i]};
        absorb<kEntropy, T>(running, bits, scale);
      });
  const Sums part = warp_total<kEntropy>(running.sums(), scale);
  if (lane == 0) beside.warps[warp] = make_float4(part.row_max, part.rest, part.sum_exp_z, 0.0f);
  __syncthreads();

  if (warp == 0) {
    const RowInputs in = load_inputs(a, row);
    Sums sums;
    if (lane < static_cast<int>(blockDim.x) / 32) sums = sums_of(beside.warps[lane]);
    sums = warp_total<kEntropy>(sums, scale);
    float target_logit = target >= 0 ? widen(reinterpret_cast<const T*>(from)[target]) : 0.0f;
    if (lane < blocks)
      hopper::send(beside.blocks + rank,
                   make_float4(sums.row_max, sums.rest, sums.sum_exp_z, target_logit),
                   &beside.exchanged, lane);
    hopper::wait(&beside.exchanged, 0);
    const float4 theirs =
        lane < blocks ? beside.blocks[lane] : make_float4(-INFINITY, -1.0f, 0.0f, 0.0f);
    sums = warp_total<kEntropy>(sums_of(theirs), scale);
    target_logit = warp_sum(theirs.w);
    const RowGradient c =
        decide_row<kEntropy>(a, row, in, sums, target_logit, 0.0f, rank == 0 && lane == 0);
    if (lane == 0) {
      beside.slope = slope_of<kEntropy>(c);
      beside.zero = c.zero;
      if (target >= 0)
        beside.target_gradient = gradient_at<kEntropy>(c, {target_logit, 1.0f}, true);
    }
  }
  __syncthreads();

  if (beside.zero) return zeros();
  const Slope slope = beside.slope;
  for_slice(
      packs,
      [&](int i) {
        const uint4* x = from + i;
        uint4* dx = to + i;
#pragma unroll
        for (int k = 0; k < kTilePacks; ++k) {
          if (k < kPolynomial)
            __stcs(dx + 32 * k, gradient_of<kEntropy, T, true>(slope, x[32 * k]));
          else
            __stcs(dx + 32 * k, gradient_of<kEntropy, T>(slope, x[32 * k]));
        }
      },
      [&](int i) { __stcs(to + i, gradient_of<kEntropy, T>(slope, from[i])); });
  if (target < 0) return;
  __syncthreads();  // over what was just stored in its place
  if (threadIdx.x == 0) narrow(beside.target_gradient, reinterpret_cast<T*>(to)[target]);
#endif
}

template <class T>
auto kernel_of(bool entropy, int polynomial) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (!entropy && polynomial == 1) return fused_resident<T, false, 1>;
    if (!entropy && polynomial == 2) return fused_resident<T, false, 2>;
  }
  return entropy ? fused_resident<T, true, 0> : fused_resident<T, false, 0>;
}

}  // namespace

void load_resident(int device) {
  each_dtype([&](auto t) {
    for (const int variant : {0, 1, 2, 3}) {  // three polynomials, and an entropy
      const auto kernel = kernel_of<decltype(t)>(variant == 3, variant % 3);
      load(kernel);
      if (limits(device).major >= 9) allow_shared(kernel, device);
    }
  });
}

bool resident_fits(const Plan& plan, int device) {
  static PerDevice<bool> fits;
  const auto kernel = kernel_of<BFloat16>(false, 0);
  const int variant = static_cast<int>(plan.shared_bytes) * 2 * kMaxCluster + plan.cluster;
  return fits.get(device, reinterpret_cast<const void*>(kernel), variant, [&] {
    DeviceGuard guard(device);
    const Grid grid{plan.cluster, plan.threads, plan.shared_bytes, plan.cluster};
    return Launcher(grid, 0).active_clusters(kernel) > 0;
  });
}

void launch_resident(const FusedArgs& args, const Plan& plan, uintptr_t stream) {
  with_dtype(args.dtype, [&](auto t) {
    const Grid grid{args.rows * plan.cluster, plan.threads, plan.shared_bytes, plan.cluster};
    Launcher(grid, stream)
        .run("fused_resident", kernel_of<decltype(t)>(args.entropy, plan.polynomial), args,
             plan.slice);
  });
}

}  // namespace dcpo
