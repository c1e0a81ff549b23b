// The CPU kernels: one compiled body for each instruction set, and the choice among them.
#pragma once

#include <string>
#include <vector>

#include "args.h"
#include "responses.h"

namespace dcpo {

// A single row of each kernel.
struct RowKernels {
  void (*fused)(const FusedArgs&, int64_t row);
  void (*stats)(const StatsArgs&, int64_t row);
  void (*gradient)(const GradientArgs&, int64_t row);
  void (*multiply)(const MultiplyArgs&, int64_t row);
};

extern const RowKernels kRowKernelsAvx512, kRowKernelsAvx2, kRowKernelsPortable;

// Instruction sets this machine can run, best first; the one in use; choose another
// (std::invalid_argument if it is not one of them).
std::vector<std::string> cpu_isas();
std::string cpu_isa();
void cpu_use_isa(const std::string& name);

void cpu_fused(const FusedArgs& args, int threads);
void cpu_stats(const StatsArgs& args, int threads);
void cpu_gradient(const GradientArgs& args, int threads);
void cpu_multiply(const MultiplyArgs& args, int threads);  // by 1: nothing is read

}  // namespace dcpo
