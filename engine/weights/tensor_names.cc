#include "engine/weights/tensor_names.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace entropyserve {
namespace {

constexpr std::pair<std::string_view, std::string_view> kGlobal[] = {
    {"token_embd.weight", "model.embed_tokens.weight"},
    {"output_norm.weight", "model.norm.weight"},
    {"output.weight", "lm_head.weight"},
};

// GGUF's part after "blk.N.", without .weight or .bias, and ours after "model.layers.N.".
constexpr std::pair<std::string_view, std::string_view> kPerLayer[] = {
    {"attn_norm", "input_layernorm"},    {"attn_q", "self_attn.q_proj"},
    {"attn_k", "self_attn.k_proj"},      {"attn_v", "self_attn.v_proj"},
    {"attn_output", "self_attn.o_proj"}, {"attn_q_norm", "self_attn.q_norm"},
    {"attn_k_norm", "self_attn.k_norm"}, {"ffn_norm", "post_attention_layernorm"},
    {"ffn_gate", "mlp.gate_proj"},       {"ffn_up", "mlp.up_proj"},
    {"ffn_down", "mlp.down_proj"},
};

void AddLinear(const std::string& name, int64_t rows, int64_t columns, bool bias, int rope_heads,
               std::vector<TensorSpec>* out) {
  out->push_back({absl::StrCat(name, ".weight"), {rows, columns}, false, rope_heads});
  if (bias) out->push_back({absl::StrCat(name, ".bias"), {rows}, false, rope_heads});
}

}  // namespace

std::vector<TensorSpec> TensorsOf(const ModelConfig& config) {
  const int64_t hidden = config.hidden, ffn = config.ffn, d = config.head_dim;
  const int64_t q = config.heads * d, kv = config.kv_heads * d;
  std::vector<TensorSpec> out;
  out.push_back({"model.embed_tokens.weight", {config.vocab, hidden}});
  out.push_back({"model.norm.weight", {hidden}});
  out.push_back({"lm_head.weight", {config.vocab, hidden}, config.tied_embeddings});
  for (int layer = 0; layer < config.layers; ++layer) {
    const std::string at = absl::StrCat("model.layers.", layer, ".");
    out.push_back({at + "input_layernorm.weight", {hidden}});
    out.push_back({at + "post_attention_layernorm.weight", {hidden}});
    AddLinear(at + "self_attn.q_proj", q, hidden, config.qkv_bias, config.heads, &out);
    AddLinear(at + "self_attn.k_proj", kv, hidden, config.qkv_bias, config.kv_heads, &out);
    AddLinear(at + "self_attn.v_proj", kv, hidden, config.qkv_bias, 0, &out);
    AddLinear(at + "self_attn.o_proj", hidden, q, config.o_bias, 0, &out);
    if (config.qk_norm) {
      out.push_back({at + "self_attn.q_norm.weight", {d}});
      out.push_back({at + "self_attn.k_norm.weight", {d}});
    }
    AddLinear(at + "mlp.gate_proj", ffn, hidden, config.mlp_bias, 0, &out);
    AddLinear(at + "mlp.up_proj", ffn, hidden, config.mlp_bias, 0, &out);
    AddLinear(at + "mlp.down_proj", hidden, ffn, config.mlp_bias, 0, &out);
  }
  return out;
}

std::string CanonicalName(std::string_view name) {
  for (const auto& [gguf, canonical] : kGlobal) {
    if (name == gguf) return std::string(canonical);
  }
  constexpr std::string_view kPrefix = "blk.";
  if (name.substr(0, kPrefix.size()) != kPrefix) return "";
  name.remove_prefix(kPrefix.size());
  const size_t first_dot = name.find('.'), last_dot = name.rfind('.');
  if (first_dot == std::string_view::npos || first_dot == 0 || first_dot == last_dot) return "";
  const std::string_view layer = name.substr(0, first_dot);
  const std::string_view part = name.substr(first_dot + 1, last_dot - first_dot - 1);
  const std::string_view suffix = name.substr(last_dot);
  if (layer.find_first_not_of("0123456789") != std::string_view::npos) return "";
  if (suffix != ".weight" && suffix != ".bias") return "";
  for (const auto& [gguf, canonical] : kPerLayer) {
    if (part != gguf) continue;
    return absl::StrCat("model.layers.", std::string(layer), ".", std::string(canonical),
                        std::string(suffix));
  }
  return "";
}

}  // namespace entropyserve
