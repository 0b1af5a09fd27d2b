#include "engine/weights/config_check.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// Ids that end an answer; a model has one to five.
constexpr size_t kMaxEosIds = 64;

absl::Status Invalid(const std::string& where, const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat(where, ": ", what));
}

absl::Status CheckRope(const std::string& where, const RopeConfig& rope, int head_dim) {
  if (!(rope.theta > 1.0 && rope.theta < 1e12)) return Invalid(where, "rope theta must be over 1");
  if (rope.scaling != RopeScaling::kNone && !(rope.factor > 0.0 && rope.factor <= 1e6)) {
    return Invalid(where, "rope scaling factor must be over 0");
  }
  const bool needs_context =
      rope.scaling == RopeScaling::kLlama3 || rope.scaling == RopeScaling::kYarn;
  if (needs_context && (rope.original_context < 1 || rope.original_context > kMaxContext)) {
    return Invalid(where, "rope scaling: the original context length is out of range");
  }
  if (rope.scaling == RopeScaling::kLlama3 &&
      !(rope.low_freq_factor > 0.0 && rope.high_freq_factor > rope.low_freq_factor)) {
    return Invalid(where,
                   "rope scaling: high_freq_factor must be over low_freq_factor, both over 0");
  }
  if (rope.scaling == RopeScaling::kYarn &&
      !(rope.beta_slow > 0.0 && rope.beta_fast >= rope.beta_slow && rope.attention_factor >= 0.0)) {
    return Invalid(where, "rope scaling: beta_fast, beta_slow or attention_factor is out of range");
  }
  if (rope.freq_factors.empty()) return absl::OkStatus();
  if (rope.freq_factors.size() != size_t(head_dim) / 2) {
    return Invalid(where, absl::StrCat("rope_freqs.weight has ", rope.freq_factors.size(),
                                       " elements, head_dim/2 is ", head_dim / 2));
  }
  for (const float f : rope.freq_factors) {
    if (!(f > 0.0f) || !std::isfinite(f)) return Invalid(where, "rope_freqs.weight must be over 0");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckDimensions(const std::string& where, const std::vector<DimensionField>& fields) {
  for (const auto& [field, value, limit, to] : fields) {
    if (value < 1 || value > limit) {
      return Invalid(where, absl::StrCat(field, " is ", value, ", expected 1 to ", limit));
    }
    if (to != nullptr) *to = int(value);
  }
  return absl::OkStatus();
}

absl::Status CheckConfig(const std::string& where, const ModelConfig& config) {
  RETURN_IF_ERROR(CheckDimensions(where, {{"layers", config.layers, kMaxLayers},
                                          {"hidden size", config.hidden, kMaxHidden},
                                          {"intermediate size", config.ffn, kMaxFfn},
                                          {"heads", config.heads, kMaxHeads},
                                          {"kv heads", config.kv_heads, kMaxHeads},
                                          {"head_dim", config.head_dim, kMaxHeadDim},
                                          {"vocabulary", config.vocab, kMaxVocab},
                                          {"context length", config.context, kMaxContext}}));
  if (config.heads % config.kv_heads != 0) {
    return Invalid(where, absl::StrCat(config.heads, " heads are not a multiple of ",
                                       config.kv_heads, " kv heads"));
  }
  if (config.head_dim % 2 != 0) return Invalid(where, "head_dim must be even");
  if (!(config.norm_eps >= 0.0f && config.norm_eps < 1.0f)) {
    return Invalid(where, "the norm's epsilon must be from 0 to 1");
  }
  if (config.bos_id < -1 || config.bos_id >= config.vocab) {
    return Invalid(where, absl::StrCat("bos id ", config.bos_id, " is not in the vocabulary"));
  }
  if (config.eos_ids.size() > kMaxEosIds) return Invalid(where, "too many eos ids");
  for (const int32_t id : config.eos_ids) {
    if (id < 0 || id >= config.vocab) {
      return Invalid(where, absl::StrCat("eos id ", id, " is not in the vocabulary"));
    }
  }
  return CheckRope(where, config.rope, config.head_dim);
}

void ExtendContext(ModelConfig* config) {
  if (config->rope.scaling != RopeScaling::kYarn) return;
  const double stretched = double(config->rope.original_context) * config->rope.factor;
  config->context = std::max(config->context, int64_t(std::min(stretched, double(kMaxContext))));
}

void AddEos(int64_t id, ModelConfig* config) {
  // Out of int32 becomes -1, which CheckConfig refuses.
  const int32_t narrow = id < 0 || id > INT32_MAX ? -1 : int32_t(id);
  if (std::find(config->eos_ids.begin(), config->eos_ids.end(), narrow) == config->eos_ids.end()) {
    config->eos_ids.push_back(narrow);
  }
}

}  // namespace entropyserve
