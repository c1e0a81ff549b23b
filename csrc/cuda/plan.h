// Which kernel runs `fused`, and how a row is laid over a cluster's shared memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dcpo {

constexpr int kByTable = -1;
constexpr int kMaxCluster = 8;        // what every GPU with clusters can launch
constexpr int kMostThreads = 256;     // of a block of fused_resident,
constexpr int kLeastBlocks = 4;       // so many of which have the registers of a multiprocessor
constexpr size_t kBesideSlice = 384;  // bytes of a block's shared memory behind its slice

struct Plan {
  int cluster = 0;             // blocks that hold a row; 0: the streaming kernel
  int threads = 0, slice = 0;  // of a block; the slice in packs of 16 bytes
  int polynomial = 0;          // quarters of the write's exponentials that are multiply-adds
  size_t shared_bytes = 0;
};

// A row over `cluster` blocks, slices beginning on 128 bytes of the row. A small slice has half the
// threads, so that more blocks have their registers.
inline Plan resident_plan(int64_t row_bytes, int cluster) {
  const int64_t slice = (row_bytes + cluster * 128 - 1) / (cluster * 128) * 128;
  return {cluster, slice > 40 << 10 ? kMostThreads : kMostThreads / 2, static_cast<int>(slice / 16),
          0, static_cast<size_t>(slice) + kBesideSlice};
}

// How a row of `fused` that begins on 16 bytes is held, for a GPU whose blocks may have so much
// shared memory. Not measured yet.
//
// A block only loads, only computes or only stores, so a multiprocessor needs several: three hide
// the latencies of each other on sm_90, where a slice's turn (load 1.5 us, read 0.9, exchange and
// decide 2.5, write 1.5) may take 14 us at the bandwidth of an H200; a B200 moves nearly twice as
// much per multiprocessor, and its table wants six, which are half as long. A larger cluster than
// that costs a decision more per block. A multiprocessor has as much as a block may have and 1 KiB,
// of which each block costs 1 KiB:
//
//   logits in bf16     row bytes    sm_90: blocks of a row, on a multiprocessor    sm_100
//     8,192               16,384                 1, 8 (registers)                  1, 8
//    32,000               64,000                 1, 3                              2, 6
//   128,256              256,512                 4, 3                              8, 6
//   151,936              303,872                 4, 3                              8, 5
//   262,144              524,288                 8, 3                              8, 3
//
// A B200 has memory for two exponentials per bf16 logit at 13 or 14 of the 16 per clock that it can
// do: a quarter or a half of the write's as a polynomial (bf16, no entropy) is there to be
// measured, and nothing takes it yet.
//
// A row of which not even an eighth fits is streamed. sm_120 has 100 KiB: 5, 3, 3, 2 and 1 blocks.
inline Plan choose_plan(int64_t row_bytes, int major, size_t shared_bytes, int cluster) {
  if (major < 9 || cluster == 0) return {};
  const size_t wanted = major == 10 ? 6 : 3;
  Plan plan = resident_plan(row_bytes, cluster == kByTable ? 1 : cluster);
  while (cluster == kByTable && plan.cluster < kMaxCluster &&
         (shared_bytes + 1024) / (plan.shared_bytes + 1024) < wanted)
    plan = resident_plan(row_bytes, 2 * plan.cluster);
  return plan.shared_bytes <= shared_bytes ? plan : Plan{};
}

}  // namespace dcpo
