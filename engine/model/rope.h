// Rotary position embedding: inverse frequencies per family, computed as the transformers library
// does.
#pragma once

#include <vector>

#include "engine/weights/model_config.h"

namespace entropyserve {

struct RopeTable {
  std::vector<float> inv_freq;  // [head_dim / 2] radians per position
  float scale = 1.0f;           // multiplies cos and sin (YaRN's attention factor)
};

RopeTable MakeRopeTable(const RopeConfig& rope, int head_dim, int64_t context);

}  // namespace entropyserve
