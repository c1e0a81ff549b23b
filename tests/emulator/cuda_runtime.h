// Enough of CUDA to run the kernels of csrc/cuda on a CPU, for tests. This
// folder comes first on the include path: its cuda_runtime.h and cuda/ take the place of CUDA's and
// of the files of csrc/cuda that speak to the hardware. Kernels keep to what is listed here.
//
// Each CUDA thread is a fiber with a stack of its own. A fiber runs until it waits for others (a
// barrier, a shuffle, an mbarrier); who runs next is drawn from a seed, whole warps being held back
// at random, so that warps and blocks drift apart as they do on a GPU. The blocks of a cluster run
// together, clusters one after the other. A round in which every thread waits in vain is reported
// as a deadlock.
//
// With -DDCPO_EMU_THREADS each CUDA thread is a thread of the system instead, for ThreadSanitizer:
// only what orders memory on a GPU then orders it here (a shuffle does not), so that a missing
// barrier is a data race.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline float __uint_as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T x) {
  *p = x;
}

namespace emu {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

// ---- what a test sets ---------------------------------------------------------------------------

struct Settings {
  uint64_t seed = 0;
  // The GPU that is pretended.
  int major = 9, multiprocessors = 4;
  size_t shared_bytes = 232448;
};
Settings& settings();

// ---- threads ------------------------------------------------------------------------------------

[[noreturn]] void fail(const char* what);  // ends the launch with std::runtime_error

// Returns once `ready()` holds; other threads run meanwhile.
void wait_until(const std::function<bool()>& ready, const char* what);

// A draw that depends on the seed.
bool coin();

// All of `expected` threads come before any leaves.
class Barrier {
 public:
  void expect(int threads) { expected_ = threads; }
  unsigned arrive(bool orders_memory);
  void wait(unsigned generation, bool orders_memory, const char* what);
  void arrive_and_wait(bool orders_memory, const char* what) {
    wait(arrive(orders_memory), orders_memory, what);
  }

 private:
  int expected_ = 0;
  std::atomic<int> arrived_{0};
  std::atomic<unsigned> generation_{0};
};

struct Warp {
  Barrier barrier;
  std::atomic<uint32_t> lanes[2][32];  // what shuffles and votes exchange, in turn
};

struct Block {
  unsigned char* shared = nullptr;
  unsigned rank = 0;  // in the cluster
  Barrier barrier;
  std::vector<Warp> warps;
};

struct Cluster {
  Barrier barrier;
  std::vector<Block> blocks;
};

struct Thread {
  Dim thread_index, block_index;
  Cluster* cluster = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  int lane = 0;
  unsigned turn = 0;      // of the warp's exchanges
  unsigned arrived = 0;   // at the cluster's barrier
  bool unfenced = false;  // has made mbarriers since its last fence
};

Thread& self();
const Dim& block_dim();
const Dim& grid_dim();

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  int cluster;
};
void launch(const Grid& grid, const std::function<void()>& kernel);

// ---- a warp -------------------------------------------------------------------------------------

// Every lane's bits, seen by every lane. Orders no memory.
template <class Use>
auto exchange(uint32_t bits, Use&& use) {
  Thread& t = self();
  auto& lanes = t.warp->lanes[t.turn++ % 2];
  lanes[t.lane].store(bits, std::memory_order_relaxed);
  t.warp->barrier.arrive_and_wait(false, "a shuffle or vote");
  return use(lanes);
}

}  // namespace emu

#define threadIdx (emu::self().thread_index)
#define blockIdx (emu::self().block_index)
#define blockDim (emu::block_dim())
#define gridDim (emu::grid_dim())
#define DCPO_SHARED(name) unsigned char* name = emu::self().block->shared

// A test leaves it out, to see that it would be missed.
inline const bool without_syncthreads = std::getenv("DCPO_EMU_WITHOUT_SYNCTHREADS") != nullptr;
inline void __syncthreads() {
  if (!without_syncthreads) emu::self().block->barrier.arrive_and_wait(true, "__syncthreads");
}

inline float __shfl_sync(unsigned, float x, int lane) {
  return emu::exchange(__float_as_uint(x),
                       [&](auto& all) { return __uint_as_float(all[lane % 32].load()); });
}
inline float __shfl_xor_sync(unsigned mask, float x, int step) {
  return __shfl_sync(mask, x, emu::self().lane ^ step);
}
inline uint32_t __shfl_xor_sync(unsigned mask, uint32_t x, int step) {
  return __float_as_uint(__shfl_xor_sync(mask, __uint_as_float(x), step));
}
