// What a CPU kernel is given: a view of the logits, the scalars of each row, where the results go.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../objective.h"

namespace dcpo {

enum DType : int { kBFloat16, kFloat16, kFloat32 };

// Row i of [batch, per_batch, vocab] logits begins at (i / per_batch) * batch_stride + (i %
// per_batch) * row_stride elements; the vocabulary is contiguous.
struct View {
  void* data = nullptr;
  int64_t per_batch = 1, batch_stride = 0, row_stride = 0;
};

static inline int64_t offset(const View& view, int64_t row) {
  return row / view.per_batch * view.batch_stride + row % view.per_batch * view.row_stride;
}

struct Shape {
  int64_t rows, vocab;
  DType dtype;
  float temperature;
};

// Read, decide, write. Pointers to one value a row; optional ones may be null.
struct FusedArgs {
  Shape shape;
  View logits,
      gradient;  // gradient.data null: read and decide only; equal to logits.data: in place
  const int64_t* target_ids;
  const float *old_logprobs, *advantages, *weights;
  const float *ref_logprobs, *importance_weights;
  const int64_t* topk_ids;  // [rows, k]
  const float* topk_logprobs;
  int64_t k;
  View old_logits;
  Objective objective;
  bool skip_zero_advantage;
  float *token_loss, *logprobs, *entropy, *ratio;  // entropy may be null where its coefficient is 0
  int8_t* clipped;
};

struct StatsArgs {
  Shape shape;
  View logits;
  const int64_t* target_ids;
  const uint8_t* counts;                          // rows that are read; null: all
  float *logprobs, *entropy, *row_max, *log_sum;  // entropy may be null
};

// dx_j = 1/T [g (1[j = y] - p_j) - h p_j (log p_j + H)]
struct GradientArgs {
  Shape shape;
  View logits, gradient;
  const int64_t* target_ids;
  const float *row_max, *log_sum, *entropy;  // entropy may be null where every h is 0
  const float *g, *h;                        // h may be null
};

// x times a factor, rows in place.
struct MultiplyArgs {
  Shape shape;
  View x;
  const float* factor;
};

// One compiled body for each instruction set: a single row of each kernel.
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
void cpu_multiply(const MultiplyArgs& args, int threads);

}  // namespace dcpo
