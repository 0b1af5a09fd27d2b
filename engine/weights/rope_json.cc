// RoPE parameters: rules and defaults are those of transformers 5 (modeling_rope_utils), which also
// reads the spellings of transformers 4.
#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/weights/config_json.h"

namespace entropyserve {
namespace {

// All that may occur in a rope dictionary; another key would change the maths unseen.
constexpr const char* kKnownKeys[] = {
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "partial_rotary_factor",
};

absl::Status CheckKeys(const JsonFields& rope) {
  for (const auto& [key, value] : rope.object().items()) {
    bool known = value.is_null();
    for (const char* name : kKnownKeys) known |= key == name;
    if (!known) return rope.Unsupported(key, "not supported");
  }
  ASSIGN_OR_RETURN(const double partial, rope.Double("partial_rotary_factor", 1.0));
  if (partial != 1.0) return rope.Unsupported("partial_rotary_factor", "only 1 is supported");
  return absl::OkStatus();
}

absl::StatusOr<std::string> RopeType(const JsonFields& rope) {
  ASSIGN_OR_RETURN(const std::string old_spelling, rope.String("type", ""));
  ASSIGN_OR_RETURN(const std::string type, rope.String("rope_type", ""));
  if (!type.empty() && !old_spelling.empty() && type != old_spelling) {
    return rope.Invalid("type", "differs from rope_type");
  }
  if (type.empty() && old_spelling.empty()) return std::string("default");
  return type.empty() ? old_spelling : type;
}

// YaRN's factor of a length ratio (arXiv 2309.00071, equation 22).
double YarnScale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

absl::Status ReadYarn(const JsonFields& rope, int64_t context, RopeConfig* out) {
  out->scaling = RopeScaling::kYarn;
  ASSIGN_OR_RETURN(out->factor,
                   rope.Double("factor", double(context) / double(out->original_context)));
  ASSIGN_OR_RETURN(out->beta_fast, rope.Double("beta_fast", 32.0));
  ASSIGN_OR_RETURN(out->beta_slow, rope.Double("beta_slow", 1.0));
  ASSIGN_OR_RETURN(out->truncate, rope.Bool("truncate", true));
  if (rope.Has("attention_factor")) {
    ASSIGN_OR_RETURN(out->attention_factor, rope.Double("attention_factor"));
    if (out->attention_factor <= 0.0) return rope.Invalid("attention_factor", "must be over 0");
    return absl::OkStatus();
  }
  ASSIGN_OR_RETURN(const double mscale, rope.Double("mscale", 0.0));
  ASSIGN_OR_RETURN(const double mscale_all_dim, rope.Double("mscale_all_dim", 0.0));
  if (mscale != 0.0 && mscale_all_dim != 0.0) {
    out->attention_factor = YarnScale(out->factor, mscale) / YarnScale(out->factor, mscale_all_dim);
    if (!(out->attention_factor > 0.0)) return rope.Invalid("mscale", "out of range");
  }
  return absl::OkStatus();
}

absl::Status ReadScaling(const JsonFields& config, const JsonFields& rope, int64_t context,
                         RopeConfig* out) {
  RETURN_IF_ERROR(CheckKeys(rope));
  ASSIGN_OR_RETURN(const std::string type, RopeType(rope));
  if (type == "default") return absl::OkStatus();
  // A length beside the dictionary wins over the one inside.
  ASSIGN_OR_RETURN(out->original_context, rope.Int("original_max_position_embeddings", context));
  ASSIGN_OR_RETURN(out->original_context,
                   config.Int("original_max_position_embeddings", out->original_context));
  if (out->original_context < 1) return rope.Invalid("original_max_position_embeddings", "below 1");
  if (type == "yarn") return ReadYarn(rope, context, out);
  if (type == "linear") {
    out->scaling = RopeScaling::kLinear;
  } else if (type == "llama3") {
    out->scaling = RopeScaling::kLlama3;
    ASSIGN_OR_RETURN(out->low_freq_factor, rope.Double("low_freq_factor"));
    ASSIGN_OR_RETURN(out->high_freq_factor, rope.Double("high_freq_factor"));
  } else {
    return rope.Unsupported("rope_type", absl::StrCat("'", type, "' is not supported; default, ",
                                                      "linear, llama3 and yarn are"));
  }
  ASSIGN_OR_RETURN(out->factor, rope.Double("factor"));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<RopeConfig> RopeFromJson(const JsonFields& config, double default_theta,
                                        int64_t context) {
  RopeConfig out;
  ASSIGN_OR_RETURN(out.theta, config.Double("rope_theta", default_theta));
  // rope_scaling wins where a file has both, as in transformers 5.
  const std::string field = config.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  if (!config.Has(field)) return out;
  if (!config.Get(field).is_object()) return config.Invalid(field, "not an object");
  const JsonFields rope(config.Get(field), absl::StrCat(config.where(), ": ", field));
  ASSIGN_OR_RETURN(out.theta, rope.Double("rope_theta", out.theta));
  RETURN_IF_ERROR(ReadScaling(config, rope, context, &out));
  return out;
}

}  // namespace entropyserve
