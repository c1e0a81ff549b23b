// Device queries.
#include "cuda/device.h"
#include "cuda/rows.h"
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

void load_kernels(int device) {
  load_streaming();
  load_resident(device);
  load_multiply();
  load_responses();
}

std::string why_not(int device) try {
  DeviceGuard guard(device);
  return "";
} catch (const std::runtime_error& error) {  // no driver, no such device, not built for it
  return error.what();
}

int driver_version() noexcept {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int runtime_version() noexcept { return CUDART_VERSION; }

}  // namespace dcpo
