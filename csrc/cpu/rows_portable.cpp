// The row kernels in whatever every machine of this kind has.
#define DCPO_VECTOR_BYTES 16
#include "dispatch.h"
#include "rows.inc"

const dcpo::RowKernels dcpo::kRowKernelsPortable = {fused, stats, gradient, multiply};
