// entropyserve.v1.EntropyServe over gRPC's callback API.
#pragma once

#include <memory>

namespace grpc {
class Service;
}

namespace entropyserve {

class ServiceCore;

// `core` outlives the service.
std::unique_ptr<grpc::Service> MakeService(ServiceCore* core);

}  // namespace entropyserve
