// The row kernels of a GPU, for a stream (a cudaStream_t) of a device. csrc/args.h says what
// the arguments mean; every pointer is to memory of the device. Throws std::runtime_error with
// CUDA's message.
#pragma once

#include <cstdint>

#include "args.h"
#include "cuda/plan.h"

namespace dcpo {

// cluster: so many blocks hold a row, or 0: two sweeps over a row (streaming.cu); kByTable leaves
// it to plan.h. polynomial: as in Plan, with kByTable; 0 but for bf16 without an entropy.
void cuda_fused(const FusedArgs& args, int device, uintptr_t stream, int cluster, int polynomial);
void cuda_stats(const StatsArgs& args, int device, uintptr_t stream);
void cuda_gradient(const GradientArgs& args, int device, uintptr_t stream);

// By 1: nothing is read.
void cuda_multiply(const MultiplyArgs& args, int device, uintptr_t stream);

// Parts of cuda_fused: how rows on 16 bytes are held, whether the device has room for that, and the
// two ways to run.
Plan cuda_plan(int64_t row_bytes, int device, int cluster);
bool resident_fits(const Plan& plan, int device);
void launch_resident(const FusedArgs& args, const Plan& plan, uintptr_t stream);
void launch_streaming(const FusedArgs& args, int device, uintptr_t stream);

// Each file loads its kernels: load_kernels in device.h.
void load_streaming();
void load_resident(int device);
void load_multiply();
void load_responses();

}  // namespace dcpo
