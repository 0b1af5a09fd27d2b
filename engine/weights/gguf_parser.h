// Walks the bytes of a GGUF file up to its tensor data.
#pragma once

#include <cstddef>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/weights/gguf.h"

namespace entropyserve {

// Bytes of one value of a fixed-size type, 0 for strings, arrays and unknown codes.
size_t GgufTypeBytes(GgufType type);

// Fills metadata and tensors and sets `data` to the tensor data. Errors: GgufFile::Open.
absl::Status ParseGguf(absl::Span<const uint8_t> bytes, const std::string& name,
                       GgufFile::Metadata* metadata, GgufFile::Tensors* tensors,
                       absl::Span<const uint8_t>* data);

}  // namespace entropyserve
