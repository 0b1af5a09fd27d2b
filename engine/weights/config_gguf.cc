#include "engine/weights/config_gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/config_check.h"

namespace entropyserve {
namespace {

struct Architecture {
  const char* key;     // general.architecture, and the prefix of its metadata
  const char* family;  // ModelConfig::family
  bool qk_norm;
};

constexpr Architecture kArchitectures[] = {
    {"llama", "llama", false},
    {"qwen2", "qwen2", false},
    {"qwen3", "qwen3", true},
    {"pangu-embedded", "pangu_embedded", false},
};

constexpr double kNever = std::numeric_limits<double>::quiet_NaN();

// Metadata (after the architecture's prefix) that changes the maths and its harmless value.
struct RefusedKey {
  const char* key;
  double neutral;  // kNever: none is
};

constexpr RefusedKey kRefused[] = {
    {"expert_count", 0},
    {"expert_used_count", 0},
    {"use_parallel_residual", 0},
    {"attention.sliding_window", 0},
    {"attention.causal", 1},
    {"attention.max_alibi_bias", 0},
    {"attention.clamp_kqv", 0},
    {"attention.scale", 0},
    {"attention.output_scale", 1},
    {"attention.temperature_length", 0},
    {"attention.temperature_scale", 0},
    {"attention.q_lora_rank", 0},
    {"attention.kv_lora_rank", 0},
    {"attention.shared_kv_layers", 0},
    {"attn_logit_softcapping", 0},
    {"final_logit_softcapping", 0},
    {"logit_scale", 1},
    {"residual_scale", 1},
    {"embedding_scale", 1},
    {"rope.scaling.attn_factor", 1},
    {"rope.scaling.yarn_attn_factor", 1},
    {"rope.scaling.yarn_ext_factor", 1},
    {"rope.scaling.yarn_log_multiplier", 0},
    {"rope.scaling.alpha", 0},
    {"rope.dimension_sections", kNever},
    {"nextn_predict_layers", 0},
};

// Control tokens that end a turn whatever the file's ids say, from the families served here.
constexpr const char* kEndOfTurn[] = {"<|im_end|>",    "<|eot_id|>", "<|end_of_text|>",
                                      "<|endoftext|>", "<|eom_id|>", "<|end|>"};
constexpr int32_t kControlToken = 3;  // a value of tokenizer.ggml.token_type

// The file's metadata under one architecture's prefix.
class Keys {
 public:
  Keys(const GgufFile& file, const char* architecture)
      : file_(file), prefix_(absl::StrCat(architecture, ".")) {}

  std::string Name(const char* key) const { return prefix_ + key; }
  bool Has(const char* key) const { return file_.Has(Name(key)); }
  absl::StatusOr<int64_t> Int(const char* key) const { return file_.Int(Name(key)); }
  absl::StatusOr<int64_t> Int(const char* key, int64_t value) const {
    return file_.IntOr(Name(key), value);
  }
  absl::StatusOr<double> Double(const char* key, double value) const {
    return file_.FloatOr(Name(key), value);
  }
  absl::StatusOr<std::string> String(const char* key, const char* value) const {
    return file_.StringOr(Name(key), value);
  }
  absl::Status Unsupported(const char* key, const std::string& what) const {
    return absl::UnimplementedError(absl::StrCat(file_.name(), ": ", Name(key), ": ", what));
  }
  const GgufFile& file() const { return file_; }

 private:
  const GgufFile& file_;
  const std::string prefix_;
};

absl::StatusOr<const Architecture*> FindArchitecture(const GgufFile& file) {
  ASSIGN_OR_RETURN(const std::string name, file.String("general.architecture"));
  for (const Architecture& architecture : kArchitectures) {
    if (name == architecture.key) return &architecture;
  }
  return absl::UnimplementedError(
      absl::StrCat(file.name(), ": general.architecture: '", name.substr(0, 60),
                   "' is not supported; these are: llama, qwen2, qwen3, pangu-embedded"));
}

absl::Status CheckKeys(const Keys& keys) {
  for (const auto& [key, neutral] : kRefused) {
    if (!keys.Has(key)) continue;
    const GgufValue& value = keys.file().metadata().find(keys.Name(key))->second;
    bool harmless = false;
    if (!value.is_array && value.type == GgufType::kBool) {
      harmless = double(value.bytes[0] != 0) == neutral;
    } else if (!value.is_array && value.type != GgufType::kString) {
      ASSIGN_OR_RETURN(const double x, keys.Double(key, neutral));
      harmless = x == neutral;
    }
    if (!harmless) return keys.Unsupported(key, "this value is not supported");
  }
  return absl::OkStatus();
}

// Rows and columns of the embedding: GGUF's own vocab_size may be missing.
absl::StatusOr<int64_t> VocabularyRows(const GgufFile& file) {
  const auto it = file.tensors().find("token_embd.weight");
  if (it == file.tensors().end() || it->second.shape.size() != 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.name(), ": token_embd.weight is missing or not a matrix"));
  }
  return it->second.shape[0];
}

absl::Status ReadDimensions(const Keys& keys, ModelConfig* config) {
  const std::string& where = keys.file().name();
  ASSIGN_OR_RETURN(const int64_t layers, keys.Int("block_count"));
  ASSIGN_OR_RETURN(const int64_t hidden, keys.Int("embedding_length"));
  ASSIGN_OR_RETURN(const int64_t ffn, keys.Int("feed_forward_length"));
  ASSIGN_OR_RETURN(const int64_t heads, keys.Int("attention.head_count"));
  ASSIGN_OR_RETURN(const int64_t kv_heads, keys.Int("attention.head_count_kv", heads));
  ASSIGN_OR_RETURN(const int64_t context, keys.Int("context_length"));
  ASSIGN_OR_RETURN(const int64_t vocab, VocabularyRows(keys.file()));
  RETURN_IF_ERROR(
      CheckDimensions(where, {{"block_count", layers, kMaxLayers, &config->layers},
                              {"embedding_length", hidden, kMaxHidden, &config->hidden},
                              {"feed_forward_length", ffn, kMaxFfn, &config->ffn},
                              {"attention.head_count", heads, kMaxHeads, &config->heads},
                              {"attention.head_count_kv", kv_heads, kMaxHeads, &config->kv_heads},
                              {"context_length", context, kMaxContext},
                              {"rows of token_embd.weight", vocab, kMaxVocab, &config->vocab}}));
  if (!keys.Has("attention.key_length") && hidden % heads != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": embedding_length is not a multiple of attention.head_count, and ",
                     keys.Name("attention.key_length"), " is missing"));
  }
  ASSIGN_OR_RETURN(const int64_t head_dim, keys.Int("attention.key_length", hidden / heads));
  RETURN_IF_ERROR(
      CheckDimensions(where, {{"attention.key_length", head_dim, kMaxHeadDim, &config->head_dim}}));
  ASSIGN_OR_RETURN(const int64_t value_dim, keys.Int("attention.value_length", head_dim));
  if (value_dim != head_dim) {
    return keys.Unsupported("attention.value_length", "differs from the key length");
  }
  ASSIGN_OR_RETURN(const int64_t rotated, keys.Int("rope.dimension_count", head_dim));
  if (rotated != head_dim) {
    return keys.Unsupported("rope.dimension_count", "partial rotary embedding is not supported");
  }
  config->context = context;
  return absl::OkStatus();
}

absl::Status ReadFreqFactors(const GgufFile& file, RopeConfig* rope) {
  const auto it = file.tensors().find("rope_freqs.weight");
  if (it == file.tensors().end()) return absl::OkStatus();
  const GgufTensor& tensor = it->second;
  const auto invalid = [&file](const char* what) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": rope_freqs.weight: ", what));
  };
  if (tensor.type != 0 || tensor.shape.size() != 1 || tensor.shape[0] > kMaxHeadDim) {
    return invalid("not an F32 vector of head_dim/2 elements");
  }
  const size_t n = size_t(tensor.shape[0]);
  if (tensor.offset > file.data().size() || n * 4 > file.data().size() - tensor.offset) {
    return invalid("beyond the end of the file (truncated?)");
  }
  std::vector<float> factors(n);
  std::memcpy(factors.data(), file.data().data() + tensor.offset, n * 4);
  bool changes = false;
  for (const float f : factors) changes |= f != 1.0f;
  if (!changes) return absl::OkStatus();
  if (rope->scaling != RopeScaling::kNone) {
    return absl::UnimplementedError(absl::StrCat(
        file.name(), ": rope_freqs.weight together with rope.scaling.type is not supported"));
  }
  rope->freq_factors = std::move(factors);
  return absl::OkStatus();
}

absl::Status ReadRope(const Keys& keys, ModelConfig* config) {
  RopeConfig& rope = config->rope;
  ASSIGN_OR_RETURN(rope.theta, keys.Double("rope.freq_base", 10000.0));
  // Without a type, a factor means linear; rope.scale_linear is its older name.
  ASSIGN_OR_RETURN(const double old_factor, keys.Double("rope.scale_linear", 1.0));
  ASSIGN_OR_RETURN(rope.factor, keys.Double("rope.scaling.factor", old_factor));
  ASSIGN_OR_RETURN(const std::string type, keys.String("rope.scaling.type", "linear"));
  if (type == "yarn") {
    rope.scaling = RopeScaling::kYarn;
    ASSIGN_OR_RETURN(rope.original_context,
                     keys.Int("rope.scaling.original_context_length", config->context));
    ASSIGN_OR_RETURN(rope.beta_fast, keys.Double("rope.scaling.yarn_beta_fast", 32.0));
    ASSIGN_OR_RETURN(rope.beta_slow, keys.Double("rope.scaling.yarn_beta_slow", 1.0));
  } else if (type == "linear") {
    if (rope.factor != 1.0) rope.scaling = RopeScaling::kLinear;
  } else if (type == "none") {
    rope.factor = 1.0;
  } else {
    return keys.Unsupported(
        "rope.scaling.type",
        absl::StrCat("'", type.substr(0, 60), "' is not supported; none, linear ", "and yarn are"));
  }
  return ReadFreqFactors(keys.file(), &rope);
}

absl::Status ReadTokens(const GgufFile& file, ModelConfig* config) {
  ASSIGN_OR_RETURN(const int64_t bos, file.IntOr("tokenizer.ggml.bos_token_id", -1));
  if (bos < -1 || bos >= config->vocab) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": tokenizer.ggml.bos_token_id ",
                                                   bos, " is not in the vocabulary"));
  }
  config->bos_id = int32_t(bos);
  for (const char* key : {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id",
                          "tokenizer.ggml.eom_token_id"}) {
    if (!file.Has(key)) continue;
    ASSIGN_OR_RETURN(const int64_t id, file.Int(key));
    AddEos(id, config);
  }
  if (!file.Has("tokenizer.ggml.tokens") || !file.Has("tokenizer.ggml.token_type")) {
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const auto tokens, file.StringViews("tokenizer.ggml.tokens"));
  ASSIGN_OR_RETURN(const auto types, file.Ints("tokenizer.ggml.token_type"));
  const size_t n = std::min({tokens.size(), types.size(), size_t(config->vocab)});
  for (size_t id = 0; id < n; ++id) {
    if (types[id] != kControlToken) continue;
    for (const char* name : kEndOfTurn) {
      if (tokens[id] == name) AddEos(int64_t(id), config);
    }
  }
  return absl::OkStatus();
}

void ReadBiases(const GgufFile& file, ModelConfig* config) {
  const auto has = [&file](const char* name) {
    return file.tensors().find(std::string_view(name)) != file.tensors().end();
  };
  config->qkv_bias = has("blk.0.attn_q.bias");
  config->o_bias = has("blk.0.attn_output.bias");
  config->mlp_bias = has("blk.0.ffn_gate.bias");
  config->tied_embeddings = !has("output.weight");
}

}  // namespace

absl::StatusOr<ModelConfig> ConfigFromGguf(const GgufFile& file) {
  ASSIGN_OR_RETURN(const Architecture* architecture, FindArchitecture(file));
  const Keys keys(file, architecture->key);
  RETURN_IF_ERROR(CheckKeys(keys));
  ModelConfig config;
  config.family = architecture->family;
  config.qk_norm = architecture->qk_norm;
  ASSIGN_OR_RETURN(config.name, file.StringOr("general.name", ""));
  RETURN_IF_ERROR(ReadDimensions(keys, &config));
  ASSIGN_OR_RETURN(const double eps, file.Float(keys.Name("attention.layer_norm_rms_epsilon")));
  config.norm_eps = float(eps);
  RETURN_IF_ERROR(ReadRope(keys, &config));
  RETURN_IF_ERROR(ReadTokens(file, &config));
  ReadBiases(file, &config);
  RETURN_IF_ERROR(CheckConfig(file.name(), config));
  ExtendContext(&config);
  return config;
}

}  // namespace entropyserve
