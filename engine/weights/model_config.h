// What a checkpoint says about its model. Families differ in these fields only: one transformer
// runs them all (ARCHITECTURE.md, "One transformer").
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace entropyserve {

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3, kYarn };

struct RopeConfig {
  double theta = 10000.0;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1.0;
  // llama3 (and yarn, for the original length).
  double low_freq_factor = 1.0, high_freq_factor = 4.0;
  int64_t original_context = 0;  // tokens
  // yarn
  double beta_fast = 32.0, beta_slow = 1.0;
  double attention_factor =
      0.0;               // multiplies cos and sin; 0: 0.1 ln(factor) + 1 (transformers' rule)
  bool truncate = true;  // yarn: round the correction range outward
  // GGUF's rope_freqs.weight: inverse frequencies are divided by these. Empty: none.
  std::vector<float> freq_factors;  // [head_dim / 2]
};

struct ModelConfig {
  std::string family;  // "llama", "qwen2", "qwen3", "pangu_embedded"
  std::string name;    // general.name, or the folder's or file's name
  int layers = 0;
  int hidden = 0;       // width of the residual stream
  int ffn = 0;          // width inside the MLP
  int heads = 0;        // query heads
  int kv_heads = 0;     // heads of K and V; heads % kv_heads == 0
  int head_dim = 0;     // even; need not be hidden / heads
  int vocab = 0;        // rows of the embedding
  int64_t context = 0;  // tokens: max_position_embeddings; YaRN: at least original_context * factor
  float norm_eps = 1e-5f;
  bool qkv_bias = false;
  bool o_bias = false;
  bool mlp_bias = false;
  bool qk_norm = false;  // RMSNorm per head on q and k before RoPE (Qwen3)
  bool tied_embeddings = false;
  RopeConfig rope;
  int32_t bos_id = -1;  // -1: none
  // Any of these ends an answer. A folder: eos_token_id of config.json, then of
  // generation_config.json. GGUF: its eos, eot and eom ids, then control tokens of its vocabulary
  // that end a turn by name (<|im_end|>, <|eot_id|>, ...), because many files set only one id.
  std::vector<int32_t> eos_ids;

  int group() const { return heads / kv_heads; }
};

}  // namespace entropyserve
