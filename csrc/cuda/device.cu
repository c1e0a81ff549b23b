// Device queries.
#include "cuda/device.h"
#include "cuda/runtime.h"

namespace dcpo {

int device_count() noexcept {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();
  return 0;
}

DeviceProperties device_properties(int device) {
  cudaDeviceProp p;
  check(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  return {p.name,
          p.major,
          p.minor,
          p.multiProcessorCount,
          static_cast<std::size_t>(p.l2CacheSize),
          p.sharedMemPerBlockOptin,
          p.totalGlobalMem};
}

int driver_version() noexcept {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() noexcept { return CUDART_VERSION; }

}  // namespace dcpo
