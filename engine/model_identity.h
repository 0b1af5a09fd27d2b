// Names a checkpoint's weights, wherever its files lie and whatever they are called.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "engine/weights/checkpoint.h"

namespace entropyserve {

// A digest of the configuration, of every tensor's name, shape and size, of rows of some tensors,
// and of the type that keys and values are stored in: sessions of one identity continue under
// another server's copy of the same model. Errors are Checkpoint::Read's.
absl::StatusOr<std::string> ModelIdentity(const Checkpoint& checkpoint, DType dtype);

}  // namespace entropyserve
