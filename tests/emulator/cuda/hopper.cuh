// csrc/cuda/hopper.cuh on a CPU. What the copy engine may do at any time is done at a time drawn
// from the seed, as early or as late as the rules allow: a bulk load and a peer's `send` land when
// they are issued or when their mbarrier is waited on. A kernel that counts on more gets wrong
// numbers.
//
// Checked: alignment and size of copies, that both ends lie where they must, arrivals of mbarriers,
// that a mbarrier is fenced before it is announced to the cluster, that nothing is in flight at the
// end.
#pragma once

#include <cstdint>

#include "cuda_runtime.h"

namespace dcpo::hopper {

void init(uint64_t* barrier, uint32_t arrivals);
void fence_init();
void arrive_expect(uint64_t* barrier, uint32_t bytes);
void wait(uint64_t* barrier, uint32_t parity);
void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier);

inline uint32_t cluster_rank() { return emu::self().block->rank; }
inline uint32_t cluster_size() { return static_cast<uint32_t>(emu::self().cluster->blocks.size()); }
inline uint32_t cluster_index() { return emu::self().block_index.x / cluster_size(); }
void cluster_arrive();
void cluster_wait();
void send(float4* slot, float4 value, uint64_t* barrier, uint32_t rank);

}  // namespace dcpo::hopper

namespace emu::hopper {

void start_cluster();
void finish_cluster();  // every thread has returned from its kernel

}  // namespace emu::hopper
