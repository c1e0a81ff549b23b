// The few primitives that Hopper (sm_90) added and fused_resident.cu uses: bulk loads into shared
// memory, mbarriers that count their bytes, and a cluster's shared memory.
// tests/emulator/cuda/hopper.cuh is the twin that runs on a CPU; change both.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace dcpo::hopper {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- mbarriers: a phase ends when `arrivals` threads have come and all expected bytes landed ----

__device__ __forceinline__ void init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// After init, before cluster_arrive: makes it visible to the copy engine and to peers.
__device__ __forceinline__ void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and wait for so many bytes more in this phase, fewer than 2^20. Bytes may land before
// they are expected.
__device__ __forceinline__ void arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Until the phase of this parity (0, 1, 0, ...) has ended; what landed in it is then visible. An
// acquire of the cluster's scope would empty L1 each time.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred ended;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 ended, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, ended;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// Issued by one thread, of 16-byte aligned addresses and a multiple of 16 bytes.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

// ---- cluster ------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Every thread of every block of the cluster. Nothing but fence_init is released by it: a release
// would wait for the memory of the whole GPU.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

// Writes 16 bytes to where `slot` lies in the shared memory of block `rank`, and counts them at
// that block's `barrier`. Both are given as this block's own.
__device__ __forceinline__ void send(float4* slot, float4 value, uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n\t.reg .b32 to, at;\n\t"
      "mapa.shared::cluster.u32 to, %0, %6;\n\t"
      "mapa.shared::cluster.u32 at, %1, %6;\n\t"
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%2, %3, %4, %5}, "
      "[at];\n\t}" ::"r"(shared_address(slot)),
      "r"(shared_address(barrier)), "r"(__float_as_uint(value.x)), "r"(__float_as_uint(value.y)),
      "r"(__float_as_uint(value.z)), "r"(__float_as_uint(value.w)), "r"(rank)
      : "memory");
}

#endif  // __CUDA_ARCH__ >= 900

}  // namespace dcpo::hopper
