// Who makes a call: an owner's name, to which its sessions and quotas are bound.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace grpc {
class ServerContextBase;
}

namespace entropyserve {

class Authenticator;

// With keys, the name that belongs to the call's key; else the name in the caller's certificate,
// where the transport has verified one ("cert:NAME"); else "". UNAUTHENTICATED: no key where one is
// asked for, or an unknown one.
absl::StatusOr<std::string> CallOwner(const grpc::ServerContextBase& context,
                                      const Authenticator& authenticator);

}  // namespace entropyserve
