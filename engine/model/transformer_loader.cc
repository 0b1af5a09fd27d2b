// Reading a checkpoint's tensors into the backend's memory.
#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/model/rope.h"
#include "engine/model/transformer.h"

namespace entropyserve {

class Transformer::Loader {
 public:
  Loader(const Checkpoint& checkpoint, Transformer* model)
      : checkpoint_(checkpoint), model_(model), config_(checkpoint.config()) {}

  absl::Status Load() {
    const int64_t hidden = config_.hidden;
    if (model_->options_.e4m3_linears) RETURN_IF_ERROR(MakeRoomForWide());
    RETURN_IF_ERROR(
        LoadMatrix({{"model.embed_tokens.weight", config_.vocab}}, hidden, &model_->embedding_));
    if (config_.tied_embeddings) {
      model_->head_ = model_->embedding_;
    } else {
      RETURN_IF_ERROR(LoadMatrix({{"lm_head.weight", config_.vocab}}, hidden, &model_->head_));
    }
    RETURN_IF_ERROR(LoadVector({{"model.norm.weight", hidden}}, &model_->final_norm_));
    const RopeTable rope = MakeRopeTable(config_.rope, config_.head_dim, config_.context);
    RETURN_IF_ERROR(Store(rope.inv_freq, &model_->inv_freq_));
    model_->rope_scale_ = rope.scale;
    for (int i = 0; i < config_.layers; ++i) {
      RETURN_IF_ERROR(
          LoadLayer(absl::StrCat("model.layers.", i, "."), &model_->layers_.emplace_back()));
    }
    return absl::OkStatus();
  }

 private:
  struct Part {
    std::string name;
    int64_t rows;
  };

  absl::Status LoadLayer(const std::string& prefix, Layer* layer) {
    const int64_t hidden = config_.hidden, ffn = config_.ffn, head_dim = config_.head_dim;
    const int64_t q = config_.heads * head_dim, kv = config_.kv_heads * head_dim;
    auto qkv = [&](const char* kind) {
      const std::string p = prefix + "self_attn.";
      return std::vector<Part>{{absl::StrCat(p, "q_proj.", kind), q},
                               {absl::StrCat(p, "k_proj.", kind), kv},
                               {absl::StrCat(p, "v_proj.", kind), kv}};
    };
    auto gate_up = [&](const char* kind) {
      return std::vector<Part>{{absl::StrCat(prefix, "mlp.gate_proj.", kind), ffn},
                               {absl::StrCat(prefix, "mlp.up_proj.", kind), ffn}};
    };
    RETURN_IF_ERROR(
        LoadVector({{prefix + "input_layernorm.weight", hidden}}, &layer->attention_norm));
    RETURN_IF_ERROR(
        LoadVector({{prefix + "post_attention_layernorm.weight", hidden}}, &layer->mlp_norm));
    RETURN_IF_ERROR(LoadLinear(qkv("weight"), hidden, &layer->qkv));
    RETURN_IF_ERROR(LoadLinear({{prefix + "self_attn.o_proj.weight", hidden}}, q, &layer->o));
    RETURN_IF_ERROR(LoadLinear(gate_up("weight"), hidden, &layer->gate_up));
    RETURN_IF_ERROR(LoadLinear({{prefix + "mlp.down_proj.weight", hidden}}, ffn, &layer->down));
    if (config_.qkv_bias) RETURN_IF_ERROR(LoadVector(qkv("bias"), &layer->qkv_bias));
    if (config_.o_bias) {
      RETURN_IF_ERROR(LoadVector({{prefix + "self_attn.o_proj.bias", hidden}}, &layer->o_bias));
    }
    if (config_.mlp_bias) {
      RETURN_IF_ERROR(LoadVector(gate_up("bias"), &layer->gate_up_bias));
      RETURN_IF_ERROR(LoadVector({{prefix + "mlp.down_proj.bias", hidden}}, &layer->down_bias));
    }
    if (config_.qk_norm) {
      RETURN_IF_ERROR(LoadVector({{prefix + "self_attn.q_norm.weight", head_dim}}, &layer->q_norm));
      RETURN_IF_ERROR(LoadVector({{prefix + "self_attn.k_norm.weight", head_dim}}, &layer->k_norm));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<char*> Allocate(int64_t bytes, const std::string& name) {
    DeviceArray<char> memory(model_->backend_, bytes);
    if (!memory.ok()) {
      return absl::ResourceExhaustedError(
          absl::StrCat("weights do not fit: ", name, " needs ", bytes, " bytes, ",
                       model_->backend_->FreeMemory(),
                       " are free; a smaller --dtype or another machine is needed"));
    }
    model_->weight_bytes_ += bytes;
    model_->weights_.push_back(std::move(memory));
    return model_->weights_.back().data();
  }

  // Stacks tensors of [rows, cols] on top of each other.
  absl::Status LoadMatrix(const std::vector<Part>& parts, int64_t cols, Matrix* matrix) {
    const DType dtype = model_->options_.dtype;
    const int64_t rows = Rows(parts), row_bytes = cols * int64_t(SizeOf(dtype));
    ASSIGN_OR_RETURN(char* data, Allocate(rows * row_bytes, parts[0].name));
    *matrix = {data, dtype, rows, cols};
    for (const Part& part : parts) {
      RETURN_IF_ERROR(ReadPart(part, cols, data));
      data += part.rows * row_bytes;
    }
    return absl::OkStatus();
  }

  // The same of a layer's linear, which may be quantized: a part at a time, by way of wide_.
  absl::Status LoadLinear(const std::vector<Part>& parts, int64_t cols, Matrix* matrix) {
    if (!model_->options_.e4m3_linears) return LoadMatrix(parts, cols, matrix);
    const int64_t rows = Rows(parts);
    if (rows % kE4M3Multiple != 0 || cols % kE4M3Multiple != 0) {
      return absl::InvalidArgumentError(
          absl::StrCat("--linear-dtype=fp8: ", parts[0].name, " is part of a matrix of ", rows,
                       " x ", cols, ", which must be multiples of ", kE4M3Multiple));
    }
    ASSIGN_OR_RETURN(char* data, Allocate(rows * cols, parts[0].name));
    ASSIGN_OR_RETURN(char* scale_bytes, Allocate(rows * int64_t{sizeof(float)}, "scales"));
    float* scales = reinterpret_cast<float*>(scale_bytes);
    *matrix = {data, DType::kE4M3, rows, cols, scales};
    for (const Part& part : parts) {
      RETURN_IF_ERROR(ReadPart(part, cols, wide_.data()));
      model_->backend_->Quantize({wide_.data(), model_->options_.dtype,
                                  reinterpret_cast<e4m3_t*>(data), scales, part.rows, cols});
      data += part.rows * cols;
      scales += part.rows;
    }
    return absl::OkStatus();
  }

  static int64_t Rows(const std::vector<Part>& parts) {
    int64_t rows = 0;
    for (const Part& part : parts) rows += part.rows;
    return rows;
  }

  // One tensor in the model's dtype, a strip at a time through `staging_`, so that none exists
  // twice in the host's memory.
  absl::Status ReadPart(const Part& part, int64_t cols, char* data) {
    const DType dtype = model_->options_.dtype;
    const int64_t row_bytes = cols * int64_t(SizeOf(dtype));
    model_->parameters_ += part.rows * cols;
    if (const std::optional<uint64_t> seed = checkpoint_.RandomSeed(part.name)) {
      model_->backend_->FillRandom(data, dtype, part.rows * cols, Checkpoint::Range(cols), *seed);
      return absl::OkStatus();
    }
    const int64_t strip = std::max<int64_t>(1, kStagingBytes / row_bytes);
    for (int64_t row = 0; row < part.rows; row += strip) {
      const int64_t end = std::min(part.rows, row + strip);
      staging_.resize((end - row) * row_bytes);
      RETURN_IF_ERROR(
          checkpoint_.Read(part.name, {part.rows, cols}, row, end, dtype, staging_.data()));
      model_->backend_->CopyIn(data, staging_.data(), staging_.size());
      data += staging_.size();
    }
    return absl::OkStatus();
  }

  // The largest tensor of a layer, before it is quantized.
  absl::Status MakeRoomForWide() {
    const int64_t q = int64_t{config_.heads} * config_.head_dim;
    const int64_t bytes = config_.hidden * std::max<int64_t>(q, config_.ffn) *
                          int64_t(SizeOf(model_->options_.dtype));
    wide_ = DeviceArray<char>(model_->backend_, bytes);
    if (wide_.ok()) return absl::OkStatus();
    return absl::ResourceExhaustedError(
        absl::StrCat("weights do not fit: quantizing one takes ", bytes, " bytes more"));
  }

  // Vectors (norms, biases) are f32 whatever the model's dtype is.
  absl::Status LoadVector(const std::vector<Part>& parts, const float** out) {
    std::vector<float> values;
    for (const Part& part : parts) {
      const size_t at = values.size();
      values.resize(at + part.rows);
      RETURN_IF_ERROR(
          checkpoint_.Read(part.name, {part.rows}, 0, 1, DType::kF32, values.data() + at));
    }
    return Store(values, out);
  }

  absl::Status Store(const std::vector<float>& values, const float** out) {
    model_->parameters_ += int64_t(values.size());
    const int64_t bytes = int64_t(values.size() * sizeof(float));
    ASSIGN_OR_RETURN(char* data, Allocate(bytes, "a vector"));
    model_->backend_->CopyIn(data, values.data(), bytes);
    *out = reinterpret_cast<const float*>(data);
    return absl::OkStatus();
  }

  static constexpr int64_t kStagingBytes = 16 << 20;
  static constexpr int64_t kE4M3Multiple = 16;  // tensor cores read 16 bytes at a time
  const Checkpoint& checkpoint_;
  Transformer* const model_;
  const ModelConfig& config_;
  std::vector<char> staging_;
  DeviceArray<char> wide_;
};

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Load(const Checkpoint& checkpoint,
                                                               Backend* backend,
                                                               const ModelOptions& options) {
  std::unique_ptr<Transformer> model(new Transformer(backend, options));
  model->config_ = checkpoint.config();
  model->layers_.reserve(model->config_.layers);
  RETURN_IF_ERROR(Loader(checkpoint, model.get()).Load());
  model->scratch_bytes_ = int64_t(backend->Reserve({.shape = model->shape(),
                                                    .max_rows = options.step_rows,
                                                    .max_context = options.max_context,
                                                    .max_seqs = options.max_seqs,
                                                    .vocab = model->config_.vocab}));
  RETURN_IF_ERROR(model->EnsureRows(options.step_rows));
  return model;
}

}  // namespace entropyserve
