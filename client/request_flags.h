// Flags for what a Generate request says beside its prompt.
#pragma once

#include "engine/base/flag_set.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

// One flag per field of SamplingParams and Policy; each that is given sets its field of `request`,
// which outlives `flags`. Ranges are the server's to check.
void AddRequestFlags(FlagSet* flags, v1::GenerateRequest* request);

// "1,2,3". INVALID_ARGUMENT otherwise.
absl::Status ParseIds(std::string_view text, google::protobuf::RepeatedField<int32_t>* ids);

}  // namespace entropyserve
