// The row kernels of a GPU, for a stream (a cudaStream_t) of a device. csrc/args.h says what
// the arguments mean; every pointer is to memory of the device. Throws std::runtime_error with
// CUDA's message.
#pragma once

#include <cstdint>

#include "args.h"

namespace dcpo {

// How `fused` runs: a cluster of this many blocks holds a row, or 0: two sweeps over a row
// (streaming.cu). kByTable leaves it to plan.h.
constexpr int kByTable = -1;

void cuda_fused(const FusedArgs& args, int device, uintptr_t stream, int cluster);
void cuda_stats(const StatsArgs& args, int device, uintptr_t stream);
void cuda_gradient(const GradientArgs& args, int device, uintptr_t stream);

// By 1: nothing is read.
void cuda_multiply(const MultiplyArgs& args, int device, uintptr_t stream);

// Parts of cuda_fused. A plan says how many blocks hold a row; `launch_cluster` takes one that
// fits.
struct Plan;
Plan cuda_plan(const FusedArgs& args, int device, int cluster);
void launch_cluster(const FusedArgs& args, const Plan& plan, int device, uintptr_t stream);
void launch_streaming(const FusedArgs& args, int device, uintptr_t stream);

// Loads the cluster kernels and sets their attributes, so that a first launch may be captured.
void prepare_cluster(int device);

}  // namespace dcpo
