// ModelConfig from a Hugging Face config.json.
#pragma once

#include <nlohmann/json.hpp>
#include <string>

#include "absl/status/statusor.h"
#include "engine/weights/json_fields.h"
#include "engine/weights/model_config.h"

namespace entropyserve {

// `generation`: generation_config.json, or an empty object. `where` and `generation_where` start
// the messages. `name` is not set. End-of-answer ids: config.json's eos_token_id, then
// generation_config.json's.
// INVALID_ARGUMENT: a field is missing, of another type, or out of range. UNIMPLEMENTED: the
// architecture, or a field that changes the maths, is not supported; the message names it.
absl::StatusOr<ModelConfig> ConfigFromJson(const nlohmann::json& config, const std::string& where,
                                           const nlohmann::json& generation,
                                           const std::string& generation_where);

// The RoPE part: `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters`
// (transformers 5), `type` or `rope_type`. `context` is the default of the original context.
absl::StatusOr<RopeConfig> RopeFromJson(const JsonFields& config, double default_theta,
                                        int64_t context);

}  // namespace entropyserve
