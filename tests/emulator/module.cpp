// The CUDA kernels for Python, on a CPU: what csrc/cuda/bind.cpp binds, and the settings of the
// emulator. Built by tests/emulator.py, in no wheel.
#include "bind.h"
#include "cuda/device.h"
#include "cuda_runtime.h"

namespace dcpo {

int device_count() noexcept { return 1; }
DeviceProperties device_properties(int) {
  const emu::Settings& s = emu::settings();
  return {"emulated", s.major, 0, s.multiprocessors, 0, s.shared_bytes, 0};
}
int driver_version() noexcept { return 0; }
int runtime_version() noexcept { return 0; }
std::string why_not(int) { return ""; }

}  // namespace dcpo

void bind_cuda(pybind11::module_& m);

PYBIND11_MODULE(_emu, m) {
  using namespace pybind11::literals;
  dcpo::bind::objective(m);
  bind_cuda(m);
  m.attr("cuda") = true;
  m.attr("cuda_archs") = "emulated";
  m.def(
      "set",
      [](uint64_t seed, int major, int multiprocessors, size_t shared_bytes) {
        emu::settings() = {seed, major, multiprocessors, shared_bytes};
      },
      "seed"_a = 0, "major"_a = 9, "multiprocessors"_a = 4, "shared_bytes"_a = 232448);
}
