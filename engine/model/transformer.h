// The one transformer. Llama, Qwen2, Qwen3 and openPangu-Embedded differ in ModelConfig's fields
// only.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/model.h"
#include "engine/weights/checkpoint.h"
#include "kernels/backend.h"
#include "kernels/device_array.h"

namespace entropyserve {

struct ModelOptions {
  DType dtype =
      DType::kF32;  // of weights, KV and what enters a matmul; the residual stream stays f32
  // The layers' linears in 8-bit floats, a scale for every row of weights and of activations; the
  // embedding and the LM head stay in dtype.
  bool e4m3_linears = false;
  int64_t step_rows = 2048;  // tokens of the largest ordinary step
  int64_t max_context = 0;   // tokens
  int64_t max_seqs = 64;     // sequences of one step
};

// Thread-compatible; the engine thread runs it.
class Transformer final : public Model {
 public:
  // Reads every weight the config asks for. INVALID_ARGUMENT or NOT_FOUND names a tensor that is
  // missing, has another shape, or a shape that e4m3_linears cannot have; RESOURCE_EXHAUSTED: the
  // weights or the activations do not fit.
  static absl::StatusOr<std::unique_ptr<Transformer>> Load(const Checkpoint& checkpoint,
                                                           Backend* backend,
                                                           const ModelOptions& options);
  Transformer(const Transformer&) = delete;
  Transformer& operator=(const Transformer&) = delete;

  absl::Status EnsureRows(int64_t rows) override;
  const float* Forward(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                       int64_t num_logits) override;
  const float* ForwardResidual(const Batch& batch, const KvPool& pool) override;
  void Logits(const float* residual, int64_t n, float* logits) override {
    Head(residual, nullptr, n, logits);
  }

  const ModelConfig& config() const override { return config_; }
  DType dtype() const override { return options_.dtype; }
  int64_t weight_bytes() const override { return weight_bytes_; }
  int64_t parameters() const { return parameters_; }
  int64_t activation_bytes() const override { return activation_bytes_ + scratch_bytes_; }

 private:
  struct Layer {
    const float* attention_norm = nullptr;  // [hidden]
    Matrix qkv;                             // [(heads + 2 kv_heads) * head_dim, hidden]
    const float* qkv_bias = nullptr;        // [(heads + 2 kv_heads) * head_dim] or null
    const float* q_norm = nullptr;          // [head_dim] or null
    const float* k_norm = nullptr;          // [head_dim] or null
    Matrix o;                               // [hidden, heads * head_dim]
    const float* o_bias = nullptr;          // [hidden] or null
    const float* mlp_norm = nullptr;        // [hidden]
    Matrix gate_up;                         // [2 * ffn, hidden]
    const float* gate_up_bias = nullptr;    // [2 * ffn] or null
    Matrix down;                            // [hidden, ffn]
    const float* down_bias = nullptr;       // [hidden] or null
  };
  class Loader;

  Transformer(Backend* backend, const ModelOptions& options)
      : backend_(backend), options_(options) {}
  // every_row: rows without logits run to the end of the last layer too.
  void Run(const Batch& batch, const KvPool& pool, const int32_t* logit_rows, int64_t num_logits,
           bool every_row);
  void RunStep(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
               int64_t num_logits, bool every_row);
  uint64_t DecodeKey(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                     int64_t num_logits, bool every_row) const;
  // From the residual stream to what attention returns, in attention_.
  void Attention(const Layer& layer, int index, const Batch& batch, const KvPool& pool);
  // Adds the O projection of attention [n, heads, head_dim] to x [n, hidden]. `attention` is
  // attention_ or qkv_; the other one is scratch.
  void AttentionOutput(const Layer& layer, char* attention, float* x, int64_t n);
  void Mlp(const Layer& layer, float* x, int64_t n);
  void Norm(const float* x, const float* weight, int64_t n);
  // Final norm and LM head of n rows of x: those in `rows`, or the first n without it.
  void Head(const float* x, const int32_t* rows, int64_t n, float* logits);
  size_t Act() const { return SizeOf(options_.dtype); }
  // Of what enters a layer's linears, and the scales that go with it.
  DType LinearType() const { return options_.e4m3_linears ? DType::kE4M3 : options_.dtype; }
  float* Scales() const { return options_.e4m3_linears ? scales_.data() : nullptr; }

  // Constant after Load.
  Backend* const backend_;
  const ModelOptions options_;
  ModelConfig config_;
  std::vector<DeviceArray<char>> weights_;  // owns what the pointers below point to
  Matrix embedding_;                        // [vocab, hidden]
  Matrix head_;                             // [vocab, hidden]; the embedding when tied
  const float* final_norm_ = nullptr;       // [hidden]
  const float* inv_freq_ = nullptr;         // [head_dim / 2]
  float rope_scale_ = 1.0f;
  std::vector<Layer> layers_;
  int64_t weight_bytes_ = 0, parameters_ = 0;

  // Activations; sizes in elements of dtype unless said otherwise. With e4m3_linears, normed_, mlp_
  // and quantized attention hold 8-bit floats instead, their scales are in scales_.
  int64_t rows_ = 0;
  int64_t activation_bytes_ = 0, scratch_bytes_ = 0;  // ours; the operators'
  DeviceArray<float> x_;                              // [rows, hidden] residual stream, f32
  DeviceArray<char> normed_;                          // [rows, hidden]
  DeviceArray<char> qkv_;                             // [rows, heads + 2 kv_heads, head_dim]
  DeviceArray<char> q_;                               // [rows, heads, head_dim]
  DeviceArray<char> attention_;                       // [rows, heads, head_dim]
  DeviceArray<char> gate_up_;                         // [step_rows, 2, ffn]: the MLP runs in slices
  DeviceArray<char> mlp_;                             // [step_rows, ffn]
  DeviceArray<float> scales_;                         // [rows] f32, or a single one
  DeviceArray<float> wanted_;     // [max_seqs, hidden] f32: the last layer's rows with logits
  DeviceArray<float> probe_out_;  // [rows, heads, head_dim] f32
  DeviceArray<int32_t> list_counts_, list_blocks_;
  BlockLists lists_;
  DeviceArray<float> logits_;  // [max_seqs, vocab] f32
};

}  // namespace entropyserve
