#include "engine/model/transformer.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

// Blocks that one segment may list: the largest budget the engine accepts over the smallest block,
// for the context at hand.
int64_t ListCapacity(int64_t max_context) {
  constexpr int64_t kSmallestBlock = 8;
  return std::max<int64_t>(1, CeilDiv(max_context, kSmallestBlock));
}

constexpr int64_t kSmallestSegment = 128;

// FNV-1a over whole words.
class StepKey {
 public:
  void Add(const void* p) { Add(reinterpret_cast<uint64_t>(p)); }
  void Add(uint64_t x) { hash_ = (hash_ ^ x) * 0x100000001b3u; }
  // The multiplication moves bits up only.
  uint64_t hash() const { return hash_ ^ (hash_ >> 32); }

 private:
  uint64_t hash_ = 0xcbf29ce484222325u;
};

}  // namespace

absl::Status Transformer::EnsureRows(int64_t rows) {
  rows = std::max(rows, options_.step_rows);
  if (rows == rows_ || (rows < rows_ && rows_ == options_.step_rows)) return absl::OkStatus();
  const ModelConfig& c = config_;
  const int64_t q_width = int64_t{c.heads} * c.head_dim;
  const int64_t qkv_width = q_width + 2 * int64_t{c.kv_heads} * c.head_dim;
  const int64_t slice = std::min(rows, options_.step_rows);
  // Every sequence of a step may end in a short segment.
  const int64_t segments = rows / kSmallestSegment + options_.max_seqs + 1;
  const int64_t capacity = ListCapacity(std::max(options_.max_context, rows));
  activation_bytes_ = 0;
  bool ok = true;
  auto take = [&]<typename T>(DeviceArray<T>& array, int64_t size) {
    array = {};  // the old one first, so that both never exist at once
    array = DeviceArray<T>(backend_, size);
    ok = ok && array.ok();
    activation_bytes_ += size * int64_t{sizeof(T)};
  };
  take(x_, rows * c.hidden);
  take(normed_, rows * c.hidden * int64_t(Act()));
  take(qkv_, rows * qkv_width * int64_t(Act()));
  take(q_, rows * q_width * int64_t(Act()));
  take(attention_, rows * q_width * int64_t(Act()));
  take(gate_up_, slice * 2 * c.ffn * int64_t(Act()));
  take(mlp_, slice * c.ffn * int64_t(Act()));
  take(scales_, options_.e4m3_linears ? rows : 1);
  take(wanted_, options_.max_seqs * c.hidden);
  take(probe_out_, rows * q_width);
  take(list_counts_, segments * c.kv_heads);
  take(list_blocks_, segments * c.kv_heads * capacity);
  take(logits_, options_.max_seqs * c.vocab);
  if (!ok) {
    const int64_t bytes = activation_bytes_, fallback = rows_;
    rows_ = 0;
    if (fallback > 0) Check(EnsureRows(fallback).ok(), "activations that fitted before");
    return absl::ResourceExhaustedError(
        absl::StrCat("activations of a step of ", rows, " tokens need ", bytes, " bytes"));
  }
  lists_ = {list_counts_.data(), list_blocks_.data(), int32_t(capacity)};
  rows_ = rows;
  return absl::OkStatus();
}

const float* Transformer::Forward(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                                  int64_t num_logits) {
  Check(num_logits <= options_.max_seqs, "more logits than sequences");
  Run(batch, pool, logit_rows, num_logits, /*every_row=*/false);
  return num_logits > 0 ? logits_.data() : nullptr;
}

const float* Transformer::ForwardResidual(const Batch& batch, const KvPool& pool) {
  Run(batch, pool, nullptr, 0, /*every_row=*/true);
  return x_.data();
}

void Transformer::Run(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                      int64_t num_logits, bool every_row) {
  Check(batch.rows <= rows_, "a step larger than its activations");
  const auto step = [&] { RunStep(batch, pool, logit_rows, num_logits, every_row); };
  if (batch.num_segments > 0) return step();
  // Decodes only: work of a few kernels a layer, where launching them one by one shows.
  backend_->Replay(DecodeKey(batch, pool, logit_rows, num_logits, every_row), step);
}

// Everything that the operators of a decode step take from the host.
uint64_t Transformer::DecodeKey(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                                int64_t num_logits, bool every_row) const {
  StepKey key;
  for (int64_t n : {int64_t{batch.rows}, int64_t{batch.num_seqs}, int64_t{batch.num_decodes},
                    num_logits, int64_t{every_row}, rows_}) {
    key.Add(uint64_t(n));
  }
  for (const void* p :
       {static_cast<const void*>(batch.device_seqs), static_cast<const void*>(batch.device_decodes),
        static_cast<const void*>(batch.tokens), static_cast<const void*>(batch.row_seq),
        static_cast<const void*>(logit_rows), static_cast<const void*>(pool.k),
        static_cast<const void*>(pool.v), static_cast<const void*>(pool.positions),
        static_cast<const void*>(x_.data()), static_cast<const void*>(normed_.data()),
        static_cast<const void*>(qkv_.data()), static_cast<const void*>(q_.data()),
        static_cast<const void*>(attention_.data()), static_cast<const void*>(gate_up_.data()),
        static_cast<const void*>(mlp_.data()), static_cast<const void*>(scales_.data()),
        static_cast<const void*>(wanted_.data()), static_cast<const void*>(logits_.data())}) {
    key.Add(p);
  }
  // The bounds' kernel runs where a sequence still has them.
  bool bounds = false;
  for (int32_t i = 0; i < batch.num_seqs; ++i) bounds |= batch.seqs[i].bounds != nullptr;
  key.Add(uint64_t{bounds});
  return key.hash();
}

void Transformer::RunStep(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                          int64_t num_logits, bool every_row) {
  const ModelConfig& c = config_;
  float* x = x_.data();
  char* attention = attention_.data();
  int64_t rows = batch.rows;
  backend_->Embed({batch.tokens, embedding_, x, rows});
  for (int i = 0; i < c.layers; ++i) {
    Attention(layers_[i], i, batch, pool);
    if (i + 1 == c.layers && !every_row && num_logits < rows) {
      // K and V are written: of the rest of the last layer, only rows with logits matter.
      if (num_logits == 0) return;
      const int64_t attention_bytes = int64_t{c.heads} * c.head_dim * int64_t(Act());
      backend_->GatherRows(
          {x, logit_rows, wanted_.data(), num_logits, c.hidden * int64_t{sizeof(float)}});
      backend_->GatherRows({attention, logit_rows, qkv_.data(), num_logits, attention_bytes});
      x = wanted_.data();
      attention = qkv_.data();
      rows = num_logits;
      logit_rows = nullptr;
    }
    AttentionOutput(layers_[i], attention, x, rows);
    Mlp(layers_[i], x, rows);
  }
  if (num_logits > 0) Head(x, logit_rows, num_logits, logits_.data());
}

void Transformer::Head(const float* x, const int32_t* rows, int64_t n, float* logits) {
  Check(n <= rows_, "more logits than activations have rows");
  backend_->RmsNorm({.x = x,
                     .row_index = rows,
                     .weight = final_norm_,
                     .out = normed_.data(),
                     .out_dtype = options_.dtype,
                     .rows = n,
                     .hidden = config_.hidden,
                     .eps = config_.norm_eps});
  backend_->Linear({.x = normed_.data(), .w = head_, .out = logits, .rows = n});
}

void Transformer::Norm(const float* x, const float* weight, int64_t n) {
  backend_->RmsNorm({.x = x,
                     .weight = weight,
                     .out = normed_.data(),
                     .out_dtype = LinearType(),
                     .rows = n,
                     .hidden = config_.hidden,
                     .eps = config_.norm_eps,
                     .scales = Scales()});
}

void Transformer::Attention(const Layer& layer, int index, const Batch& batch, const KvPool& pool) {
  const ModelConfig& c = config_;
  const DType dtype = options_.dtype;
  Norm(x_.data(), layer.attention_norm, batch.rows);
  backend_->Linear({.x = normed_.data(),
                    .w = layer.qkv,
                    .bias = layer.qkv_bias,
                    .out = qkv_.data(),
                    .out_dtype = dtype,
                    .rows = batch.rows,
                    .x_scales = Scales()});
  backend_->QkvPost({.batch = &batch,
                     .pool = pool,
                     .shape = shape(),
                     .layer = index,
                     .qkv = qkv_.data(),
                     .q = q_.data(),
                     .dtype = dtype,
                     .q_norm = layer.q_norm,
                     .k_norm = layer.k_norm,
                     .norm_eps = c.norm_eps,
                     .inv_freq = inv_freq_,
                     .rope_scale = rope_scale_});
  if (batch.num_segments > 0) {
    backend_->SelectBlocks({.batch = &batch,
                            .pool = pool,
                            .shape = shape(),
                            .layer = index,
                            .q = q_.data(),
                            .lists = lists_,
                            .probe_out = probe_out_.data()});
    backend_->PrefillAttention({.batch = &batch,
                                .pool = pool,
                                .shape = shape(),
                                .layer = index,
                                .q = q_.data(),
                                .lists = lists_,
                                .probe_out = probe_out_.data(),
                                .out = attention_.data()});
  }
  if (batch.num_decodes > 0) {
    backend_->DecodeAttention({.batch = &batch,
                               .pool = pool,
                               .shape = shape(),
                               .layer = index,
                               .q = q_.data(),
                               .out = attention_.data()});
  }
}

void Transformer::AttentionOutput(const Layer& layer, char* attention, float* x, int64_t n) {
  const void* in = attention;
  if (options_.e4m3_linears) {
    char* const quantized = attention == qkv_.data() ? attention_.data() : qkv_.data();
    backend_->Quantize({attention, options_.dtype, reinterpret_cast<e4m3_t*>(quantized),
                        scales_.data(), n, int64_t{config_.heads} * config_.head_dim});
    in = quantized;
  }
  backend_->Linear({.x = in,
                    .w = layer.o,
                    .bias = layer.o_bias,
                    .out = x,
                    .accumulate = true,
                    .rows = n,
                    .x_scales = Scales()});
}

// In slices, so that gate and up of a large step fit.
void Transformer::Mlp(const Layer& layer, float* x, int64_t n) {
  const ModelConfig& c = config_;
  for (; n > 0; n -= options_.step_rows, x += options_.step_rows * c.hidden) {
    const int64_t rows = std::min(options_.step_rows, n);
    Norm(x, layer.mlp_norm, rows);
    backend_->Linear({.x = normed_.data(),
                      .w = layer.gate_up,
                      .bias = layer.gate_up_bias,
                      .out = gate_up_.data(),
                      .out_dtype = options_.dtype,
                      .rows = rows,
                      .x_scales = Scales()});
    backend_->SwiGlu({gate_up_.data(), mlp_.data(), options_.dtype, rows, c.ffn, Scales()});
    backend_->Linear({.x = mlp_.data(),
                      .w = layer.down,
                      .bias = layer.down_bias,
                      .out = x,
                      .accumulate = true,
                      .rows = rows,
                      .x_scales = Scales()});
  }
}

}  // namespace entropyserve
