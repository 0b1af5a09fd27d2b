// A whole small file at once: keys, certificates, prompts.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace entropyserve {

// The bytes of `path`. NOT_FOUND "cannot read PATH": it is missing, a folder, or not readable.
absl::StatusOr<std::string> ReadFile(const std::string& path);

}  // namespace entropyserve
