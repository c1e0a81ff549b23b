// csrc/cuda/hopper.cuh on a CPU. What the copy engine may do at any time is done at a time drawn
// from the seed, as early or as late as the rules allow: a bulk load and a peer's `send` land when
// they are issued or when their mbarrier is waited on; a bulk store reads its source when it is
// issued or when its group is waited for. A kernel that counts on more gets wrong numbers.
//
// Checked: alignment and size of copies, that both ends lie where they must, arrivals of mbarriers,
// that every lane has fenced what a bulk store reads, that nothing is in flight at the end.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

namespace dcpo::hopper {

void init(uint64_t* barrier, uint32_t arrivals);
inline void fence_init() {}
void arrive_expect(uint64_t* barrier, uint32_t bytes);
void wait(uint64_t* barrier, uint32_t parity);

void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* global, const void* shared, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending);
template <int kPending>
void bulk_wait_read() {
  bulk_wait(kPending);
}
inline void bulk_wait_all() { bulk_wait(0); }
void fence_async();

inline uint32_t cluster_rank() { return emu::self().block->rank; }
inline uint32_t cluster_size() { return static_cast<uint32_t>(emu::self().cluster->blocks.size()); }
inline void cluster_barrier() {
  emu::self().cluster->barrier.arrive_and_wait(true, "the cluster's barrier");
}
void send(float4* slot, float4 value, uint64_t* barrier, uint32_t rank);

}  // namespace dcpo::hopper

namespace emu::hopper {

void start_cluster();
void finish_thread();   // a thread returns from its kernel
void finish_cluster();  // all have

}  // namespace emu::hopper
