// ModelConfig from GGUF metadata.
#pragma once

#include "absl/status/statusor.h"
#include "engine/weights/gguf.h"
#include "engine/weights/model_config.h"

namespace entropyserve {

// Architectures llama, qwen2, qwen3 and pangu-embedded. Biases and tied embeddings are read off the
// tensor directory, as GGUF has no fields for them; rope_freqs.weight becomes rope.freq_factors.
// INVALID_ARGUMENT: a key is missing, of another type, or out of range. UNIMPLEMENTED: the
// architecture, or a key that changes the maths, is not supported; the message names it.
absl::StatusOr<ModelConfig> ConfigFromGguf(const GgufFile& file);

}  // namespace entropyserve
