// What the row kernels are given, on a CPU and on a GPU: views of the logits, the scalars of each
// row, where the results go. Named as the records of dcpo_kernels/ops/; an array holds one value
// per row unless noted. A null pointer: that tensor was not given.
#pragma once

#include <cstdint>

#include "decide.h"

namespace dcpo {

enum DType : int { kBFloat16, kFloat16, kFloat32 };

// Row i of [batch, per_batch, vocab] logits begins at (i / per_batch) * batch_stride + (i %
// per_batch) * row_stride elements; the vocabulary is contiguous.
struct View {
  void* data = nullptr;
  int64_t per_batch = 1, batch_stride = 0, row_stride = 0;
};

// The rows, and what it takes to read one.
struct Batch {
  int64_t rows, vocab;
  DType dtype;
  float temperature;          // of all rows, where
  const float* temperatures;  // is null
  float softcap;              // x~ = softcap tanh(x / softcap), before the temperature; 0: x itself
  View logits;
  const int64_t* target_ids;
};

// Read, decide, write.
struct FusedArgs : Batch {
  View gradient;               // null: read and decide only; the logits: in place
  const int64_t* topk_ids;     // [rows, k]
  const float* topk_logprobs;  // [rows, k]
  int64_t k;
  View old_logits;
  DType old_dtype;
  Objective objective;
  const float* old_logprobs;  // null: those of the policy itself, the ratio is 1
  const float *advantages, *weights, *ref_logprobs, *importance_weights;
  const float* log_ratio;         // that the ratio is taken from; null: logp - old_logp
  const float* rollout_logprobs;  // by the engine that sampled; null: no correction
  const float* entropy_weights;   // of the entropy term, as multiples of the weight; null: 1
  float *token_loss, *logprobs, *entropy, *ratio;  // entropy: null where nobody asked for it
  int8_t *clipped, *has_gradient;
};

// Read only.
struct StatsArgs : Batch {
  int64_t k = 1;        // targets of each row: target_ids and logprobs are [rows, k]
  const uint8_t* mask;  // the rows that are read; null: all
  float *logprobs, *entropy, *row_max, *log_sum;
};

// Write only: dx_j = factor/T [sum_k g_k (1[j = y_k] - p_j) - h p_j (log p_j + H)]
struct GradientArgs : Batch {
  int64_t k = 1;  // targets of each row: target_ids and g are [rows, k]
  View gradient;
  const float *row_max, *log_sum, *entropy, *g, *h;
  const float* factor;  // one number, where it lies; null: 1
};

// x times a factor, rows in place.
struct MultiplyArgs {
  int64_t rows, vocab;
  DType dtype;
  View x;
  const float* factor;  // one number, where it lies
};

}  // namespace dcpo
