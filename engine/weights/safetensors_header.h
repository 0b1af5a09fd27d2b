// The JSON header of a safetensors file, as written: types checked, numbers not yet believed.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace entropyserve {

struct SafetensorsHeader {
  struct Tensor {
    std::string name, dtype;
    std::vector<int64_t> shape;         // each >= 0
    std::vector<int64_t> data_offsets;  // exactly two, each >= 0
  };
  std::vector<Tensor> tensors;
  std::map<std::string, std::string> metadata;
};

// INVALID_ARGUMENT: not JSON, an unexpected field, type or nesting, a name that occurs twice; the
// message starts with `file`.
absl::StatusOr<SafetensorsHeader> ParseSafetensorsHeader(std::string_view json,
                                                         const std::string& file);

}  // namespace entropyserve
