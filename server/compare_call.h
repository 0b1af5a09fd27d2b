// One Compare call: a callback reactor between its stream and the compare lane's thread.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

namespace entropyserve {

class ServiceCore;

// Starts the call; gRPC owns the reactor, which ends by itself.
grpc::ServerWriteReactor<grpc::ByteBuffer>* StartCompareCall(ServiceCore* core,
                                                             grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer& request);

}  // namespace entropyserve
