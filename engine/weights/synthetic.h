// Models without a checkpoint: a published shape with random weights, for speed work.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/weights/checkpoint.h"

namespace entropyserve {

// The part of --model after this prefix is the shape's name.
inline constexpr std::string_view kSyntheticPrefix = "synthetic:";

// llama-3.1-8b, qwen2.5-0.5b, qwen2.5-7b, qwen3-8b, openpangu-7b, tiny.
std::vector<std::string> SyntheticNames();

// INVALID_ARGUMENT: an unknown name; the message lists the known ones. Matrices are not read but
// drawn on the backend (Checkpoint::random_seed); norms are 1, biases 0.
absl::StatusOr<std::unique_ptr<Checkpoint>> OpenSynthetic(std::string_view name);

}  // namespace entropyserve
