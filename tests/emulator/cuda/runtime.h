// csrc/cuda/runtime.h on a CPU: "device memory" is the program's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cuda_runtime.h"

namespace dcpo {

using Grid = emu::Grid;

class DeviceGuard {
 public:
  explicit DeviceGuard(int) {}
  ~DeviceGuard() {}
};

struct Limits {
  int major, multiprocessors;
  size_t shared_bytes;
};
inline Limits limits(int) {
  const emu::Settings& s = emu::settings();
  return {s.major, s.multiprocessors, s.shared_bytes};
}

class Launcher {
 public:
  Launcher(const Grid& grid, uintptr_t) : grid_(grid) {}

  template <class... P, class... A>
  void run(const char*, void (*kernel)(P...), const A&... arguments) {
    emu::launch(grid_, [&] { kernel(arguments...); });
  }
  template <class... P>
  int active_clusters(void (*)(P...)) {
    return grid_.shared_bytes <= emu::settings().shared_bytes;
  }

 private:
  Grid grid_;
};

template <class... P>
int blocks_per_multiprocessor(void (*)(P...), int, size_t) {
  return 1;
}
template <class... Kernels>
void load(Kernels...) {}
template <class... P>
void allow_shared(void (*)(P...), int) {}

// Settings change from one call to the next, so nothing is kept.
template <class Value>
class PerDevice {
 public:
  template <class Make>
  Value get(int, const void*, int, Make&& make) {
    return make();
  }
};

}  // namespace dcpo
