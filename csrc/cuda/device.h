// What the rest of the project asks of a GPU, as plain C++: no CUDA header needed to include this.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace dcpo {

struct DeviceProperties {
  std::string name;
  int major, minor;  // compute capability
  int multiprocessors;
  std::size_t l2_bytes;
  std::size_t shared_bytes;  // of one block, opted in
  std::size_t total_bytes;
};

int device_count() noexcept;  // 0 where there is no driver or no device
DeviceProperties device_properties(int device);

// Why the kernels of this build can't run on a device, in CUDA's words; empty if they can.
std::string why_not(int device);

// As CUDA counts, 13000 for 13.0. The runtime is the one linked in; the driver is 0 where there is
// none.
int driver_version() noexcept;
int runtime_version() noexcept;

}  // namespace dcpo
