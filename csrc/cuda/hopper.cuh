// The few primitives that Hopper (sm_90) added and fused_cluster.cu uses: bulk copies between
// device and shared memory, mbarriers that count their bytes, and a cluster's shared memory.
// tests/emulator/cuda/hopper.cuh is the twin that runs on a CPU; change both.
//
// The copy engine reads and writes memory through the "async proxy". Shared memory that threads
// wrote needs fence_async() in each of them, then a barrier, before a bulk copy reads it. A bulk
// copy takes 16-byte aligned addresses and a multiple of 16 bytes.
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

// After init, before the cluster's barrier: makes it visible to the copy engine and to peers.
__device__ __forceinline__ void fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrive, and wait for so many bytes more in this phase. Bytes may land before they are expected.
__device__ __forceinline__ void arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(
                   shared_address(barrier)),
               "r"(bytes)
               : "memory");
}

// Until the phase of this parity (0, 1, 0, ...) has ended; what landed in it is then visible.
__device__ __forceinline__ void wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n\t.reg .pred ended;\n\t"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, ended;\n\t}"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}

// ---- bulk copies, each issued by one thread -----------------------------------------------------

__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
      : "memory");
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                   __cvta_generic_to_global(global)),
               "r"(shared_address(shared)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Until all but the last kPending groups of this thread's stores have read their shared memory.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// Until all of this thread's stores are done.
__device__ __forceinline__ void bulk_wait_all() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

__device__ __forceinline__ void fence_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- cluster ------------------------------------------------------------------------------------

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

// Every thread of every block of the cluster.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
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
