// fused, for sm_90 and later: read, decide and write with one read and one write of device memory.
// A row of logits lies in the shared memory of a cluster of blocks from its load until its gradient
// has been stored from the same place; probabilities are never materialized, and no row is read
// twice.
//
// Every warp works on its own: a ring of 2 KiB chunks in shared memory, filled and emptied by bulk
// copies, and three walks over the same chunks, each some chunks behind the one before it:
//
//   load    asks for a chunk as soon as an older gradient has left its place
//   read    waits for the chunk and adds it to the row's sums; after the warp's last chunk of a
//           row it sends its sums to every block of the cluster
//   write   waits for the sums of all warps, decides, and turns the chunk into its gradient in
//           place, from where a bulk copy stores it
//
// The write trails the read by a row and a little (plan.h), so loads, arithmetic, the exchange over
// the cluster and stores of neighbouring rows all run at once, and no barrier stops a block.
#include <algorithm>

#include "cuda/hopper.cuh"
#include "cuda/plan.h"
#include "cuda/rows.cuh"
#include "cuda/rows.h"
#include "cuda/runtime.h"

namespace dcpo {
namespace {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define DCPO_HAS_CLUSTERS 1
#else
#define DCPO_HAS_CLUSTERS 0
#endif

constexpr int kThreads = kClusterWarps * 32;

#if DCPO_HAS_CLUSTERS

// Where a warp's chunks lie in a row. `warps`: of the cluster.
struct Chunks {
  int warp, warps, lane, rounds;
  int64_t row_bytes;

  __device__ int64_t begin(int round) const {
    return (static_cast<int64_t>(round) * warps + warp) * kChunkBytes;
  }
  __device__ int bytes(int round) const {  // 0 past the end of the row
    const int64_t left = row_bytes - begin(round);
    return left >= kChunkBytes ? kChunkBytes : left > 0 ? static_cast<int>(left) : 0;
  }
};

// The rows of this cluster that are read, in order, and their chunks. The same in every lane.
struct Walk {
  int64_t step;  // between two rows of the cluster
  int64_t base;  // the row of bit 0 of `left`
  uint32_t left;
  int64_t row;  // -1: past the last
  int round, stage;
  uint32_t phase;  // of the stage's barrier

  // To the next row that is read; `skip` is called for each one in between.
  template <class Skip>
  __device__ void next_row(const FusedArgs& a, int lane, Skip&& skip) {
    while (left == 0) {
      base += 32 * step;
      if (base >= a.rows) {
        row = -1;
        return;
      }
      const int64_t mine = base + lane * step;
      const bool there = mine < a.rows;
      const bool reads = there && !idle(a, mine);
      left = __ballot_sync(kAllLanes, reads);
      uint32_t skipped = __ballot_sync(kAllLanes, there && !reads);
      for (; skipped != 0; skipped &= skipped - 1) skip(base + (__ffs(skipped) - 1) * step);
    }
    row = base + (__ffs(left) - 1) * step;
    left &= left - 1;
  }

  __device__ void next_stage(int stages) {
    if (++stage == stages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

struct Nothing {
  __device__ void operator()(int64_t) const {}
};

// The 16 bytes of the chunk that hold element `target` belong to one lane; -1 where the chunk does
// not hold it.
template <class T>
__device__ __forceinline__ int target_in_chunk(int64_t target, int64_t begin, int bytes) {
  const int64_t at = target * static_cast<int64_t>(sizeof(T)) - begin;
  return target >= 0 && at >= 0 && at < bytes ? static_cast<int>(at / sizeof(T)) : -1;
}

template <class T>
__device__ __forceinline__ int owner(int target) {
  return target / kPack<T> % 32;
}

template <bool kEntropy, class T>
__device__ __forceinline__ void read_chunk(Running& sums, const unsigned char* chunk, int bytes,
                                           int lane, float scale) {
  float x[kChunkPacks * kPack<T>];
#pragma unroll
  for (int i = 0; i < kChunkPacks; ++i) {
    const int at = (i * 32 + lane) * 16;
    if (at < bytes) {
      widen<T>(*reinterpret_cast<const uint4*>(chunk + at), x + i * kPack<T>);
    } else {
#pragma unroll
      for (int j = 0; j < kPack<T>; ++j) x[i * kPack<T> + j] = -INFINITY;
    }
  }
  absorb<kEntropy>(sums, x, scale);
}

template <bool kEntropy, class T>
__device__ __forceinline__ void write_chunk(const RowGradient& c, unsigned char* chunk, int bytes,
                                            int lane) {
#pragma unroll
  for (int i = 0; i < kChunkPacks; ++i) {
    const int at = (i * 32 + lane) * 16;
    if (at >= bytes) break;
    uint4* pack = reinterpret_cast<uint4*>(chunk + at);
    *pack = c.zero ? make_uint4(0, 0, 0, 0) : gradient_of<kEntropy, T>(c, *pack);
  }
}

#endif  // DCPO_HAS_CLUSTERS

template <class T, bool kEntropy>
__global__ void __launch_bounds__(kThreads, 1)
    fused_cluster(const FusedArgs a, const int stages, const int rounds, const int slack) {
#if DCPO_HAS_CLUSTERS
  const int blocks = hopper::cluster_size(), rank = hopper::cluster_rank();
  const int lane = threadIdx.x % 32, warp_of_block = threadIdx.x / 32;
  const int warps = blocks * kClusterWarps;
  const Chunks chunks{rank * kClusterWarps + warp_of_block, warps, lane, rounds,
                      a.vocab * static_cast<int64_t>(sizeof(T))};
  const bool first_thread = chunks.warp == 0 && lane == 0;  // of the cluster: writes results

  DCPO_SHARED(shared);
  unsigned char* ring = shared + static_cast<size_t>(warp_of_block) * stages * kChunkBytes;
  float4* parts =
      reinterpret_cast<float4*>(shared + static_cast<size_t>(kClusterWarps) * stages * kChunkBytes);
  uint64_t* totals = reinterpret_cast<uint64_t*>(parts + kPartRows * warps);
  uint64_t* full = totals + kPartRows + static_cast<size_t>(warp_of_block) * stages;

  const uint32_t part_bytes = warps * static_cast<uint32_t>(sizeof(float4));
  if (threadIdx.x == 0) {
    for (int i = 0; i < kPartRows; ++i) hopper::init(totals + i, 1);
    for (int i = 0; i < kClusterWarps * stages; ++i) hopper::init(totals + kPartRows + i, 1);
    hopper::fence_init();
    for (int i = 0; i < kPartRows; ++i) hopper::arrive_expect(totals + i, part_bytes);
  }
  hopper::cluster_barrier();  // nobody sends to a barrier that is not there yet

  auto zero_row = [&](int64_t row) {  // this warp's chunks of a row that is not read
    unsigned char* to = reinterpret_cast<unsigned char*>(row_of<T>(a.gradient, row));
    for (int round = 0; round < rounds; ++round) {
      for (int at = lane * 16; at < chunks.bytes(round); at += 32 * 16)
        *reinterpret_cast<uint4*>(to + chunks.begin(round) + at) = make_uint4(0, 0, 0, 0);
    }
    if (first_thread) write_idle(a, row);
  };

  auto bytes_of = [&](const View& view, int64_t row) {
    return row < 0 ? nullptr : reinterpret_cast<unsigned char*>(row_of<T>(view, row));
  };

  const int64_t step = gridDim.x / blocks;
  const Walk start{step, blockIdx.x / blocks - 32 * step, 0, -1, 0, 0, 0};
  Walk load = start, read = start, write = start;
  load.next_row(a, lane, zero_row);
  const unsigned char* from = bytes_of(a.logits, load.row);
  auto load_chunk = [&] {
    if (load.row < 0) return;
    const int bytes = chunks.bytes(load.round);
    if (lane == 0) {
      uint64_t* barrier = full + load.stage;
      hopper::arrive_expect(barrier, bytes);
      if (bytes > 0)
        hopper::bulk_load(ring + load.stage * kChunkBytes, from + chunks.begin(load.round), bytes,
                          barrier);
    }
    load.next_stage(stages);
    if (++load.round == rounds) {
      load.round = 0;
      load.next_row(a, lane, zero_row);
      from = bytes_of(a.logits, load.row);
    }
  };

  for (int i = 0; i < stages; ++i) load_chunk();
  read.next_row(a, lane, Nothing{});
  write.next_row(a, lane, Nothing{});
  unsigned char* to = bytes_of(a.gradient, write.row);

  Running sums;
  float target_logit = 0.0f;
  int64_t target = read.row >= 0 ? a.target_ids[read.row] : 0;
  float scale = read.row >= 0 ? kLog2E / temperature_of(a, read.row) : 0.0f;
  RowInputs inputs = {};   // of the row that is decided next
  RowGradient gradient{};  // of the row that is being written, and its target
  int64_t write_target = 0;
  int part = 0;  // where the parts of the row that is read go
  int decided_part = 0;
  uint32_t decided_phase = 0;
  int lead = 0;  // chunks by which the read is ahead of the write
  bool stored = false;

  for (;;) {
    if (read.row >= 0) {
      const unsigned char* chunk = ring + read.stage * kChunkBytes;
      const int bytes = chunks.bytes(read.round);
      hopper::wait(full + read.stage, read.phase);
      if (bytes > 0) read_chunk<kEntropy, T>(sums, chunk, bytes, lane, scale);
      const int at = target_in_chunk<T>(target, chunks.begin(read.round), bytes);
      // By the lane that will overwrite it: shuffles don't order another lane's read before that.
      if (at >= 0 && lane == owner<T>(at))
        target_logit = widen(reinterpret_cast<const T*>(chunk)[at]);
      read.next_stage(stages);
      if (++read.round == rounds) {
        const Sums part_sums = warp_total<kEntropy>(sums.sums(), scale);
        target_logit = warp_sum(target_logit);  // all but one are 0
        const float4 mine =
            make_float4(part_sums.row_max, part_sums.rest, part_sums.sum_exp_z, target_logit);
        if (lane < blocks)
          hopper::send(parts + part * warps + chunks.warp, mine, totals + part, lane);
        inputs = load_inputs(a, read.row);
        sums = Running{};
        target_logit = 0.0f;
        part ^= 1;
        read.round = 0;
        read.next_row(a, lane, Nothing{});
        if (read.row >= 0) {
          target = a.target_ids[read.row];
          scale = kLog2E / temperature_of(a, read.row);
        }
      }
    }

    if (lead < rounds + slack) {
      ++lead;
      continue;
    }
    if (write.row < 0) break;

    if (write.round == 0) {
      hopper::wait(totals + decided_part, decided_phase);
      const float scale = kLog2E / temperature_of(a, write.row);
      Sums total;
      float total_target = 0.0f;
      for (int i = lane; i < warps; i += 32) {  // always in this order
        const float4 p = parts[decided_part * warps + i];
        total = merged<kEntropy>(total, Sums{p.x, p.y, p.z}, scale);
        total_target += p.w;
      }
      total = warp_total<kEntropy>(total, scale);
      total_target = warp_sum(total_target);
      // For the row after the next. Its parts may come before this; none comes before every warp
      // has read this row's.
      if (threadIdx.x == 0) hopper::arrive_expect(totals + decided_part, part_bytes);
      gradient =
          decide_row<kEntropy>(a, write.row, inputs, total, total_target, 0.0f, first_thread);
      write_target = inputs.target;
      decided_part ^= 1;
      if (decided_part == 0) decided_phase ^= 1;
    }

    unsigned char* chunk = ring + write.stage * kChunkBytes;
    const int bytes = chunks.bytes(write.round);
    // The target: by the lane that writes its 16 bytes, and from the logit that was there.
    const int at = target_in_chunk<T>(write_target, chunks.begin(write.round), bytes);
    const bool mine = at >= 0 && lane == owner<T>(at) && !gradient.zero;
    T* element = reinterpret_cast<T*>(chunk) + at;
    const float logit = mine ? widen(*element) : 0.0f;
    write_chunk<kEntropy, T>(gradient, chunk, bytes, lane);
    if (mine) narrow(gradient_at<kEntropy>(gradient, logit, true), *element);
    hopper::fence_async();
    __syncwarp();
    if (lane == 0) {
      if (bytes > 0) hopper::bulk_store(to + chunks.begin(write.round), chunk, bytes);
      hopper::bulk_commit();
      hopper::bulk_wait_read<1>();  // the gradient before this one has left its place
    }
    if (stored) load_chunk();
    stored = true;
    write.next_stage(stages);
    if (++write.round == rounds) {
      write.round = 0;
      write.next_row(a, lane, Nothing{});
      to = bytes_of(a.gradient, write.row);
    }
  }

  if (lane == 0) hopper::bulk_wait_all();
  hopper::cluster_barrier();  // no block leaves while another may write to its shared memory
#endif                        // DCPO_HAS_CLUSTERS
}

using Kernel = void (*)(FusedArgs, int, int, int);

PerDevice<int> active;  // clusters that run at once

int active_clusters(Kernel kernel, const Grid& grid, int device, uintptr_t stream) {
  return active.get(device, reinterpret_cast<const void*>(kernel), grid.cluster, [&] {
    allow_shared(kernel, device);
    return Launcher(grid, stream).active_clusters(kernel);
  });
}

template <class T>
void launch(const FusedArgs& args, const Plan& plan, int device, uintptr_t stream) {
  const Kernel kernel = args.entropy ? fused_cluster<T, true> : fused_cluster<T, false>;
  Grid grid{plan.cluster, kThreads, plan.shared_bytes, plan.cluster};
  const int64_t clusters = active_clusters(kernel, grid, device, stream);
  if (clusters == 0) return launch_streaming(args, device, stream);
  grid.blocks = std::min(clusters, args.rows) * plan.cluster;
  Launcher(grid, stream).run("fused_cluster", kernel, args, plan.stages, plan.rounds, plan.slack);
}

}  // namespace

void prepare_cluster(int device) {
  if (limits(device).major < 9) return;
  for (const DType dtype : {kBFloat16, kFloat16, kFloat32})
    with_dtype(dtype, [&](auto t) {
      allow_shared(fused_cluster<decltype(t), false>, device);
      allow_shared(fused_cluster<decltype(t), true>, device);
    });
}

void launch_cluster(const FusedArgs& args, const Plan& plan, int device, uintptr_t stream) {
  with_dtype(args.dtype, [&](auto t) { launch<decltype(t)>(args, plan, device, stream); });
}

}  // namespace dcpo
