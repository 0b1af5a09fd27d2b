// absl::Status to what travels: code, message, and details for machines.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace entropyserve {

// Retry advice becomes google.rpc.RetryInfo, a reason google.rpc.ErrorInfo
// (engine/base/status_details.h). The messages of internal errors stay here: they may name files
// and addresses.
grpc::Status ToGrpcStatus(const absl::Status& status);

}  // namespace entropyserve
