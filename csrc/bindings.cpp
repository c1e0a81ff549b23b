// The compiled module dcpo_kernels._C. Every function takes raw addresses and sizes: the Python
// launchers have checked them.
#include "bind.h"

namespace py = pybind11;

void bind_cpu(py::module_& m);
void bind_cuda(py::module_& m);

PYBIND11_MODULE(_C, m) {
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
  dcpo::bind::objective(m);
  bind_cpu(m);
#ifdef DCPO_WITH_CUDA
  m.attr("cuda") = true;
  m.attr("cuda_archs") = DCPO_CUDA_ARCHS;
  bind_cuda(m);
#else
  m.attr("cuda") = false;
  m.attr("cuda_archs") = "";
#endif
}
