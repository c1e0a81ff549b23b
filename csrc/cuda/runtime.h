// The host side of a launch: errors, the current device, its limits. tests/emulator has the
// twin that runs kernels on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

namespace dcpo {

inline void check(cudaError_t status, const std::string& what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // clears it, so that the next call does not report this one again
  throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// What `make` returns for a device, a kernel and a variant of it, made once: asking the runtime
// takes longer than a launch, and a stream that is being captured need not be asked at all.
template <class Value>
class PerDevice {
 public:
  template <class Make>
  Value get(int device, const void* kernel, int variant, Make&& make) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto key = std::make_tuple(device, kernel, variant);
    const auto found = values_.find(key);
    if (found != values_.end()) return found->second;
    return values_[key] = make();
  }

 private:
  std::mutex mutex_;
  std::map<std::tuple<int, const void*, int>, Value> values_;
};

// Loads every kernel on the current device, which is `device`. CUDA would do it at a kernel's first
// launch, which may be in a stream that is being captured.
void load_kernels(int device);

// Makes a device current for a scope, with its kernels loaded. The caller's is put back, because
// torch relies on it, also where loading throws.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : DeviceGuard(device, 0) {
    static PerDevice<bool> loaded;
    loaded.get(device, nullptr, 0, [device] { return load_kernels(device), true; });
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  DeviceGuard(int device, int) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }

  int previous_ = 0;
  int device_;
};

struct Limits {
  int major, multiprocessors;
  size_t shared_bytes;  // of one block, opted in
};

inline Limits limits(int device) {
  auto attribute = [device](cudaDeviceAttr name) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
    return value;
  };
  return {attribute(cudaDevAttrComputeCapabilityMajor), attribute(cudaDevAttrMultiProcessorCount),
          static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))};
}

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes;
  int cluster;  // blocks of a cluster; 0: no clusters
};

// Launches on a stream of the current device.
class Launcher {
 public:
  Launcher(const Grid& grid, uintptr_t stream) {
    config_.gridDim = dim3(static_cast<unsigned>(grid.blocks));
    config_.blockDim = dim3(grid.threads);
    config_.dynamicSmemBytes = grid.shared_bytes;
    config_.stream = reinterpret_cast<cudaStream_t>(stream);
    config_.attrs = &cluster_;
    config_.numAttrs = grid.cluster > 0 ? 1 : 0;
    cluster_.id = cudaLaunchAttributeClusterDimension;
    cluster_.val.clusterDim.x = grid.cluster > 0 ? grid.cluster : 1;
    cluster_.val.clusterDim.y = cluster_.val.clusterDim.z = 1;
  }
  Launcher(const Launcher&) = delete;
  Launcher& operator=(const Launcher&) = delete;

  template <class... P, class... A>
  void run(const char* name, void (*kernel)(P...), const A&... arguments) {
    check(cudaLaunchKernelEx(&config_, kernel, arguments...), std::string("launch of ") + name);
  }

  // How many clusters run at once; 0 where this GPU has no room for one of this size.
  template <class... P>
  int active_clusters(void (*kernel)(P...)) {
    int count = 0;
    if (cudaOccupancyMaxActiveClusters(&count, kernel, &config_) == cudaSuccess) return count;
    cudaGetLastError();
    return 0;
  }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute cluster_{};
};

template <class... P>
int blocks_per_multiprocessor(void (*kernel)(P...), int threads, size_t shared_bytes) {
  int count = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared_bytes),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return count;
}

// Kernels, on the current device.
template <class... Kernels>
void load(Kernels... kernels) {
  cudaFuncAttributes attributes;
  (check(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernels)),
         "loading a kernel"),
   ...);
}

// Lets a kernel ask for as much shared memory as the device has for a block. It has no use for L1.
template <class... P>
void allow_shared(void (*kernel)(P...), int device) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(limits(device).shared_bytes)),
        "cudaFuncSetAttribute");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "cudaFuncSetAttribute");
}

}  // namespace dcpo

// `name`: the block's dynamic shared memory, as bytes.
#define DCPO_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
