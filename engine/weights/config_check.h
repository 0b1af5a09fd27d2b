// What every model must satisfy, whichever file described it.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/weights/model_config.h"

namespace entropyserve {

// A dimension as a file gave it: from 1 to `limit`.
struct DimensionField {
  const char* field;
  int64_t value;
  int64_t limit;
  int* to = nullptr;  // set when it is valid
};

// Upper bounds of a dimension: far above any published model, low enough that products of three of
// them fit an int64 and that tables of `layers` entries stay small.
inline constexpr int64_t kMaxLayers = 1024;
inline constexpr int64_t kMaxHidden = 1 << 18;
inline constexpr int64_t kMaxFfn = 1 << 20;
inline constexpr int64_t kMaxHeads = 4096;
inline constexpr int64_t kMaxHeadDim = 1024;
inline constexpr int64_t kMaxVocab = 1 << 24;
inline constexpr int64_t kMaxContext = INT32_MAX;  // positions are int32

// INVALID_ARGUMENT: one of them is out of its range.
absl::Status CheckDimensions(const std::string& where, const std::vector<DimensionField>& fields);

// Relations between fields, norm_eps, RoPE numbers and token ids. INVALID_ARGUMENT names the field.
absl::Status CheckConfig(const std::string& where, const ModelConfig& config);

// YaRN stretches the original context by its factor, and files often keep the original length in
// their maximum: the context becomes the larger of the two. After CheckConfig.
void ExtendContext(ModelConfig* config);

// Appends an id unless it is there already.
void AddEos(int64_t id, ModelConfig* config);

}  // namespace entropyserve
