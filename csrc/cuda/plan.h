// Which kernel runs `fused`, and how a row is laid over a cluster's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dcpo {

// Shared memory of a block of the cluster kernel (fused_cluster.cu), S stages, W warps of the
// cluster:
//
//   rings     8 warps x S chunks x 2048 bytes     a chunk: 4 16-byte accesses for each of 32 lanes
//   parts     2 rows x W warps x 16 bytes         (max, sum, entropy sum, target logit)
//   barriers  8 warps x S x 8 bytes, and 2 x 8
//
//   sm_90, sm_100: 232,448 bytes a block, S = 14: 229,376 + at most 2,048 + 896 + 16 = 232,336
//   sm_120:        101,376 bytes a block, S = 6:   98,304 + at most 2,048 + 384 + 16 = 100,752
//
// A row is dealt to the W warps chunk by chunk: `rounds` chunks each. The write of a row trails its
// read by `lag` = rounds + slack chunks, so a ring holds `lag` chunks between the two; one more is
// being stored; the S - lag - 1 left are being loaded. Two rows of parts suffice where
// slack + 2 <= rounds: by the time that a warp sends its part of a row, every warp has read the
// totals of the row before the last (by induction over rows: it sends a part only after the totals
// of the last row came, for which every warp had to send, one row earlier).
//
//   logits in bf16     row bytes    blocks    rounds    loading, bytes a multiprocessor
//    32,000               64,000      1          4        7 x 2048 x 8 = 112 KiB
//   128,256              256,512      2          8        4 x 2048 x 8 =  64 KiB
//   151,936              303,872      4          5        6 x 2048 x 8 =  96 KiB
//   262,144              524,288      4          8        4 x 2048 x 8 =  64 KiB
constexpr int kClusterWarps = 8;  // of a block
constexpr int kChunkPacks = 4;
constexpr int kChunkBytes = 32 * 16 * kChunkPacks;
constexpr int kPartRows = 2;
constexpr int kMaxCluster = 8;  // what every GPU with clusters can launch

struct Plan {
  int cluster = 0;  // blocks that hold a row; 0: the streaming kernel
  int stages = 0, rounds = 0, slack = 0;
  size_t shared_bytes = 0;
};

constexpr size_t cluster_shared_bytes(int stages, int cluster) {
  return static_cast<size_t>(kClusterWarps) * stages * (kChunkBytes + 8) +
         kPartRows * (static_cast<size_t>(cluster) * kClusterWarps * 16 + 8);
}

// A row over `cluster` blocks; cluster 0 in the result where it does not fit.
inline Plan cluster_plan(int64_t row_bytes, int cluster, size_t shared_bytes) {
  const int64_t chunks = (row_bytes + kChunkBytes - 1) / kChunkBytes;
  const int64_t warps = static_cast<int64_t>(cluster) * kClusterWarps;
  const int64_t rounds = (chunks + warps - 1) / warps;
  int stages = 0;
  while (cluster_shared_bytes(stages + 1, cluster) <= shared_bytes) ++stages;
  if (rounds < 2 || rounds + 2 > stages) return {};
  // What is not held is for loads first; a slack of 2 hides the exchange over the cluster.
  const int spare = stages - static_cast<int>(rounds) - 2;
  int slack = spare >= 6 ? 2 : spare >= 2 ? 1 : 0;
  if (slack > rounds - 2) slack = static_cast<int>(rounds) - 2;
  return {cluster, stages, static_cast<int>(rounds), slack, cluster_shared_bytes(stages, cluster)};
}

// The smallest cluster that leaves six chunks a warp beside the row, for loads and stores in
// flight; else the largest one that holds the row at all.
inline Plan choose_plan(int64_t row_bytes, int major, size_t shared_bytes) {
  Plan best;
  if (major < 9) return best;
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const Plan plan = cluster_plan(row_bytes, cluster, shared_bytes);
    if (plan.cluster != 0) best = plan;
    if (plan.cluster != 0 && plan.stages - plan.rounds >= 6) break;
  }
  return best;
}

}  // namespace dcpo
