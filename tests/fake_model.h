// A model without weights that catches a mistake in paging. It writes (token, tag) into the K rows
// it is given and reads everything back through the page tables: its next token is a hash of every
// (position, token) it finds, and a row with another sequence's tag, or out of order, is reported.
//
// A sequence's tag is the first token of its first turn.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <vector>

#include "engine/model/model.h"
#include "engine/text/tokenizer.h"

namespace entropyserve {

inline ModelConfig FakeConfig() {
  ModelConfig config;
  config.family = "fake";
  config.layers = 2;
  config.heads = 4;
  config.kv_heads = 2;
  config.head_dim = 8;
  config.hidden = 1;
  config.vocab = 1000;
  config.context = 4096;
  config.eos_ids = {1};
  return config;
}

// The hash of what one kv head holds, built a token at a time.
class FakeHash {
 public:
  void Add(int64_t position, int32_t token);
  int32_t Next() const;  // the model's next token; never an end id

 private:
  uint64_t hash_ = 0;
};

// The token that follows a conversation of `tokens` whose cache is whole; never an end id.
int32_t NextFakeToken(const std::vector<int32_t>& tokens);

class FakeModel final : public Model {
 public:
  explicit FakeModel(Backend* backend);

  absl::Status EnsureRows(int64_t rows) override;
  const float* Forward(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                       int64_t num_logits) override;
  // One number a row: the token that follows it.
  const float* ForwardResidual(const Batch& batch, const KvPool& pool) override {
    Forward(batch, pool, nullptr, 0);
    return residual_.data();
  }
  void Logits(const float* residual, int64_t n, float* logits) override;
  const ModelConfig& config() const override { return config_; }
  DType dtype() const override { return DType::kF32; }
  int64_t weight_bytes() const override { return 0; }
  int64_t activation_bytes() const override { return 0; }

  // Rows that were not what their sequence had written. Any thread.
  int64_t corruptions() const { return corruptions_; }
  // Called on the engine thread before every step: to make it slow, or to wait.
  std::function<void()> before_step;
  // Called with every step's batch: a test that plants an error in it.
  std::function<void(const Batch&)> tamper;
  // A step of more rows than this does not fit.
  int64_t max_rows = 1 << 20;

 private:
  void Write(const Batch& batch, const BatchSeq& seq, const KvPool& pool);
  void ReadBack(const BatchSeq& seq, const KvPool& pool);

  Backend* const backend_;
  const ModelConfig config_ = FakeConfig();
  std::vector<float> logits_, residual_;
  std::atomic<int64_t> corruptions_{0};
};

// Tokens are their numbers: id 65 is the text "A" for ids under 128, "<n>" above.
class FakeTokenizer final : public Tokenizer {
 public:
  FakeTokenizer();

 private:
  absl::Status EncodeText(std::string_view text, bool first, WorkMeter* meter,
                          std::vector<int32_t>* ids) const override;
};

}  // namespace entropyserve
