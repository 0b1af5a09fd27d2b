// What the engine needs of a model: one ragged step over a paged cache. Transformer is the real
// one; tests put a fake here that records what it reads through the page tables.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "engine/weights/model_config.h"
#include "kernels/backend.h"

namespace entropyserve {

class Model {
 public:
  virtual ~Model() = default;

  // Makes room for a step of `rows` tokens (an exclusive whole-prompt step can be larger than an
  // ordinary one), and gives back what only a larger one before it needed. RESOURCE_EXHAUSTED: it
  // does not fit; smaller steps still work.
  virtual absl::Status EnsureRows(int64_t rows) = 0;

  // One step over all layers. Writes K and V of the batch's tokens into `pool`; returns raw logits
  // [num_logits, vocab] of the batch rows in `logit_rows` (backend memory, [num_logits]), valid
  // until the next call; null when num_logits is 0.
  virtual const float* Forward(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                               int64_t num_logits) = 0;

  // The same step, for what it leaves of every row: f32 [rows, config().hidden], before the final
  // norm; valid until the next call. (Forward computes of the last layer what its logits need.)
  virtual const float* ForwardResidual(const Batch& batch, const KvPool& pool) = 0;
  // Raw logits [n, vocab] of n rows of such a residual stream; n is at most kMaxLogitsRows.
  virtual void Logits(const float* residual, int64_t n, float* logits) = 0;
  static constexpr int64_t kMaxLogitsRows = 64;

  virtual const ModelConfig& config() const = 0;
  virtual DType dtype() const = 0;
  virtual int64_t weight_bytes() const = 0;
  virtual int64_t activation_bytes() const = 0;

  AttentionShape shape() const {
    const ModelConfig& c = config();
    return {c.layers, c.heads, c.kv_heads, c.head_dim};
  }
};

}  // namespace entropyserve
