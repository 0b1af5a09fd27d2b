// One Generate call: its reader on one side, its sequence in the engine on the other, an outbox
// between.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

namespace entropyserve {

class ServiceCore;

// Starts the call. `core` outlives it; gRPC owns nothing: the call frees itself once gRPC and the
// engine are done.
grpc::ServerWriteReactor<grpc::ByteBuffer>* StartGenerateCall(ServiceCore* core,
                                                              grpc::CallbackServerContext* context,
                                                              const grpc::ByteBuffer& request);

}  // namespace entropyserve
