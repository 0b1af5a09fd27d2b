// The tokenizer that a GGUF file carries, as engine/text takes it.
#pragma once

#include "absl/status/statusor.h"
#include "engine/text/tokenizer.h"
#include "engine/weights/gguf.h"

namespace entropyserve {

// NOT_FOUND: the file has no tokenizer. INVALID_ARGUMENT: a key of another type or an id out of
// range; the message names file and key. Opening a path adds GgufFile::Open's errors.
absl::StatusOr<GgufTokenizerData> ReadGgufTokenizer(const GgufFile& file);
absl::StatusOr<GgufTokenizerData> ReadGgufTokenizer(const std::string& path);

}  // namespace entropyserve
