// How a client reaches its server: credentials, channel arguments, the bearer key, and what a
// call's end means. Shared by the client library and by what drives gRPC itself.
#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>
#include <grpcpp/support/channel_arguments.h>
#include <grpcpp/support/status.h>

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/client.h"

namespace entropyserve {

// Does not wait for a connection. Adds to `arguments` what every channel of ours has. NOT_FOUND: a
// TLS file. INVALID_ARGUMENT: half a client certificate, a key or affinity that a header cannot
// carry.
absl::StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const ClientOptions& options,
                                                           grpc::ChannelArguments arguments = {});

// The bearer key and the affinity, where there are such.
void AddHeaders(const ClientOptions& options, grpc::ClientContext* context);

// The same code and message, with retry advice and reason (engine/base/status_details.h).
absl::Status ToAbsl(const grpc::Status& status);

}  // namespace entropyserve
