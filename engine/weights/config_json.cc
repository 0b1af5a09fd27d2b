#include "engine/weights/config_json.h"

#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/config_check.h"

namespace entropyserve {
namespace {

// A family's defaults are those of its configuration class, for fields that a file leaves out.
struct Family {
  const char* architecture;
  const char* name;
  double rope_theta;
  double norm_eps;
  int64_t head_dim;        // 0: hidden / heads
  bool qkv_bias;           // always there
  const char* bias_field;  // a boolean for q, k, v and o; null: none
  bool default_bias;       // when that field is absent
  bool qk_norm;
};

constexpr Family kFamilies[] = {
    {"LlamaForCausalLM", "llama", 1e4, 1e-6, 0, false, "attention_bias", false, false},
    {"Qwen2ForCausalLM", "qwen2", 1e4, 1e-6, 0, true, nullptr, false, false},
    {"Qwen3ForCausalLM", "qwen3", 1e4, 1e-6, 128, false, "attention_bias", false, true},
    {"PanguEmbeddedForCausalLM", "pangu_embedded", 1.6e7, 1e-5, 0, false, "bias", true, false},
};

constexpr double kNever = std::numeric_limits<double>::quiet_NaN();

// Fields of other models that change the maths. Absent, null, false, an empty list and the neutral
// number are harmless; anything else is refused.
struct RefusedField {
  const char* field;
  double neutral;  // kNever: no number is
};

constexpr RefusedField kRefused[] = {
    // attention
    {"use_sliding_window", kNever},
    {"attention_chunk_size", kNever},
    {"clip_qkv", kNever},
    {"dual_chunk_attention_config", kNever},
    {"alibi", kNever},
    {"use_alibi", kNever},
    {"attn_temperature_tuning", 0.0},
    {"use_attention_sinks", kNever},
    {"param_sink_number", 0.0},
    {"kv_lora_rank", 0.0},
    {"q_lora_rank", 0.0},
    {"use_bidirectional_attention", kNever},
    {"attn_output_gate", kNever},
    {"add_cross_attention", kNever},
    {"is_encoder_decoder", kNever},
    {"interleaved_sliding_window", kNever},
    {"sliding_window_pattern", kNever},
    // scales
    {"attention_multiplier", kNever},
    {"query_pre_attn_scalar", kNever},
    {"attention_scale", kNever},
    {"softmax_scale", kNever},
    {"embedding_multiplier", 1.0},
    {"residual_multiplier", 1.0},
    {"logits_scaling", 1.0},
    {"logit_scale", 1.0},
    {"scale_emb", 1.0},
    {"scale_depth", kNever},
    {"dim_model_base", kNever},
    {"embedding_scale", 1.0},
    {"attn_logit_softcapping", kNever},
    {"final_logit_softcapping", kNever},
    {"logit_softcapping", kNever},
    // positions
    {"partial_rotary_factor", 1.0},
    {"rotary_pct", 1.0},
    {"rotary_emb_fraction", 1.0},
    {"use_mrope", kNever},
    {"no_rope_layers", kNever},
    {"no_rope_layer_interval", 0.0},
    {"rope_local_base_freq", kNever},
    {"rope_interleave", kNever},
    {"rope_interleaved", kNever},
    // blocks
    {"num_experts", 0.0},
    {"num_local_experts", 0.0},
    {"n_routed_experts", 0.0},
    {"moe_num_experts", 0.0},
    {"num_experts_per_tok", 0.0},
    {"use_parallel_residual", kNever},
    {"parallel_attn", kNever},
    {"sandwich_norm", kNever},
    {"pruned_heads", kNever},
    // stored weights
    {"quantization_config", kNever},
    {"compression_config", kNever},
};

// Normalization of q and k that Llama, Qwen2 and openPangu do not have.
constexpr const char* kQkNormFields[] = {"qk_norm", "use_qk_norm", "qk_layernorm",
                                         "use_qk_layernorm"};

bool IsNeutral(const nlohmann::json& value, double neutral) {
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number()) return value.get<double>() == neutral;
  return value.is_null() || ((value.is_array() || value.is_object()) && value.empty());
}

std::string Shown(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  if (text.size() > 60) text.resize(60);
  return text;
}

absl::Status CheckFields(const JsonFields& in, const Family& family) {
  const auto refuse = [&in](const char* field) {
    return in.Unsupported(field, absl::StrCat(Shown(in.Get(field)), " is not supported"));
  };
  for (const auto& [field, neutral] : kRefused) {
    if (in.Has(field) && !IsNeutral(in.Get(field), neutral)) return refuse(field);
  }
  if (!family.qk_norm) {
    for (const char* field : kQkNormFields) {
      if (in.Has(field) && !IsNeutral(in.Get(field), kNever)) return refuse(field);
    }
  }
  for (const char* field : {"hidden_act", "hidden_activation"}) {
    ASSIGN_OR_RETURN(const std::string act, in.String(field, "silu"));
    if (act != "silu" && act != "swish") return refuse(field);
  }
  if (in.Has("layer_types")) {
    const nlohmann::json& types = in.Get("layer_types");
    if (!types.is_array()) return in.Invalid("layer_types", "not a list");
    for (const nlohmann::json& type : types) {
      if (type != "full_attention") return refuse("layer_types");
    }
  }
  // Qwen configurations carry a window that only use_sliding_window switches on.
  if (in.Has("sliding_window") && !in.Has("use_sliding_window") &&
      std::string(family.name).rfind("qwen", 0) != 0 &&
      !IsNeutral(in.Get("sliding_window"), kNever)) {
    return refuse("sliding_window");
  }
  return absl::OkStatus();
}

absl::StatusOr<const Family*> FindFamily(const JsonFields& in) {
  if (!in.Has("architectures") || !in.Get("architectures").is_array() ||
      in.Get("architectures").size() != 1 || !in.Get("architectures")[0].is_string()) {
    return in.Invalid("architectures", "must be a list of one name");
  }
  const std::string architecture = in.Get("architectures")[0].get<std::string>();
  std::string known;
  for (const Family& family : kFamilies) {
    if (architecture == family.architecture) return &family;
    absl::StrAppend(&known, known.empty() ? "" : ", ", family.architecture);
  }
  return in.Unsupported("architectures",
                        absl::StrCat(Shown(architecture), " is not supported; these are: ", known));
}

absl::Status ReadDimensions(const JsonFields& in, const Family& family, ModelConfig* config) {
  ASSIGN_OR_RETURN(const int64_t layers, in.Int("num_hidden_layers"));
  ASSIGN_OR_RETURN(const int64_t hidden, in.Int("hidden_size"));
  ASSIGN_OR_RETURN(const int64_t ffn, in.Int("intermediate_size"));
  ASSIGN_OR_RETURN(const int64_t heads, in.Int("num_attention_heads"));
  ASSIGN_OR_RETURN(const int64_t kv_heads, in.Int("num_key_value_heads", heads));
  ASSIGN_OR_RETURN(const int64_t vocab, in.Int("vocab_size"));
  ASSIGN_OR_RETURN(const int64_t context, in.Int("max_position_embeddings"));
  RETURN_IF_ERROR(
      CheckDimensions(in.where(), {{"num_hidden_layers", layers, kMaxLayers, &config->layers},
                                   {"hidden_size", hidden, kMaxHidden, &config->hidden},
                                   {"intermediate_size", ffn, kMaxFfn, &config->ffn},
                                   {"num_attention_heads", heads, kMaxHeads, &config->heads},
                                   {"num_key_value_heads", kv_heads, kMaxHeads, &config->kv_heads},
                                   {"vocab_size", vocab, kMaxVocab, &config->vocab},
                                   {"max_position_embeddings", context, kMaxContext}}));
  if (!in.Has("head_dim") && family.head_dim == 0 && hidden % heads != 0) {
    return in.Invalid("hidden_size", "not a multiple of num_attention_heads, and no head_dim");
  }
  ASSIGN_OR_RETURN(const int64_t head_dim,
                   in.Int("head_dim", family.head_dim != 0 ? family.head_dim : hidden / heads));
  RETURN_IF_ERROR(
      CheckDimensions(in.where(), {{"head_dim", head_dim, kMaxHeadDim, &config->head_dim}}));
  config->context = context;
  return absl::OkStatus();
}

absl::Status ReadTokens(const JsonFields& in, const JsonFields& generation, ModelConfig* config) {
  for (const JsonFields* fields : {&in, &generation}) {
    ASSIGN_OR_RETURN(const std::vector<int64_t> ids, fields->IntOrList("eos_token_id"));
    for (const int64_t id : ids) {
      if (id < 0 || id >= config->vocab) {
        return fields->Invalid("eos_token_id", absl::StrCat(id, " is not in the vocabulary"));
      }
      AddEos(id, config);
    }
  }
  ASSIGN_OR_RETURN(const int64_t fallback, generation.Int("bos_token_id", -1));
  ASSIGN_OR_RETURN(const int64_t bos, in.Int("bos_token_id", fallback));
  if (bos < -1 || bos >= config->vocab) {
    return in.Invalid("bos_token_id", absl::StrCat(bos, " is not in the vocabulary"));
  }
  config->bos_id = int32_t(bos);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ConfigFromJson(const nlohmann::json& json, const std::string& where,
                                           const nlohmann::json& generation_json,
                                           const std::string& generation_where) {
  const JsonFields in(json, where), generation(generation_json, generation_where);
  ASSIGN_OR_RETURN(const Family* family, FindFamily(in));
  RETURN_IF_ERROR(CheckFields(in, *family));
  ModelConfig config;
  config.family = family->name;
  RETURN_IF_ERROR(ReadDimensions(in, *family, &config));
  ASSIGN_OR_RETURN(const double norm_eps, in.Double("rms_norm_eps", family->norm_eps));
  config.norm_eps = float(norm_eps);
  config.qkv_bias = family->qkv_bias;
  if (family->bias_field != nullptr) {
    ASSIGN_OR_RETURN(config.o_bias, in.Bool(family->bias_field, family->default_bias));
    config.qkv_bias |= config.o_bias;
  }
  if (std::string(family->name) == "llama") {
    ASSIGN_OR_RETURN(config.mlp_bias, in.Bool("mlp_bias", false));
  }
  config.qk_norm = family->qk_norm;
  ASSIGN_OR_RETURN(config.tied_embeddings, in.Bool("tie_word_embeddings", false));
  ASSIGN_OR_RETURN(config.rope, RopeFromJson(in, family->rope_theta, config.context));
  RETURN_IF_ERROR(ReadTokens(in, generation, &config));
  RETURN_IF_ERROR(CheckConfig(where, config));
  ExtendContext(&config);
  return config;
}

}  // namespace entropyserve
