// The row kernels in AVX-512.
#if defined(__x86_64__)
#include <immintrin.h>

#define DCPO_VECTOR_BYTES 64
#include "dispatch.h"
#include "rows.inc"

const dcpo::RowKernels dcpo::kRowKernelsAvx512 = {fused, stats, gradient, multiply};
#endif
