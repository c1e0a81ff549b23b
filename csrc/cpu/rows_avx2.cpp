// The row kernels in AVX2.
#if defined(__x86_64__)
#include <immintrin.h>

#define DCPO_VECTOR_BYTES 32
#include "dispatch.h"
#include "rows.inc"

const dcpo::RowKernels dcpo::kRowKernelsAvx2 = {fused, stats, gradient, multiply};
#endif
