// The GPU side of dcpo_kernels._C.
#include "bind.h"

#include "cuda/device.h"
#include "cuda/rows.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

py::list devices() {
  py::list all;
  for (int i = 0; i < dcpo::device_count(); ++i) {
    const dcpo::DeviceProperties p = dcpo::device_properties(i);
    all.append(py::dict("name"_a = p.name, "capability"_a = py::make_tuple(p.major, p.minor),
                        "multiprocessors"_a = p.multiprocessors, "l2_bytes"_a = p.l2_bytes,
                        "shared_bytes"_a = p.shared_bytes, "total_bytes"_a = p.total_bytes));
  }
  return all;
}

py::dict versions() {
  return py::dict("driver"_a = dcpo::driver_version(), "runtime"_a = dcpo::runtime_version());
}

py::dict plan(int64_t row_bytes, int device, int cluster) {
  const dcpo::Plan p = dcpo::cuda_plan(row_bytes, device, cluster);
  return py::dict("cluster"_a = p.cluster, "threads"_a = p.threads, "slice"_a = p.slice,
                  "shared_bytes"_a = p.shared_bytes);
}

}  // namespace

void bind_cuda(py::module_& m) {
  using namespace dcpo;
  m.def("cuda_devices", &devices, "Properties of each GPU; empty where there is none.");
  m.def("cuda_versions", &versions, "CUDA versions of the driver (0: none) and of the runtime.");
  m.def("cuda_why_not", &why_not, "device"_a, "Why kernels can't run there; empty if they can.");
  // cluster: blocks that hold a row, 0 the streaming kernel, kByTable as plan.h says
  m.def("cuda_plan", &plan, "row_bytes"_a, "device"_a, "cluster"_a = kByTable,
        "How fused holds a row on 16 bytes; cluster 0: the streaming kernel.");
  bind::launcher(m, "cuda_fused", bind::kFusedFields, cuda_fused, "device", "stream", "cluster",
                 "polynomial");
  bind::launcher(m, "cuda_stats", bind::kStatsFields, cuda_stats, "device", "stream");
  bind::launcher(m, "cuda_gradient", bind::kGradientFields, cuda_gradient, "device", "stream");
  bind::launcher(m, "cuda_multiply", bind::kMultiplyFields, cuda_multiply, "device", "stream");
  bind::launcher(m, "cuda_token_weights", bind::kTokenWeightsFields, cuda_token_weights, "device",
                 "stream");
  bind::launcher(m, "cuda_decide", bind::kDecideFields, cuda_decide, "device", "stream");
  bind::launcher(m, "cuda_finish", bind::kFinishFields, cuda_finish, "device", "stream");
}
