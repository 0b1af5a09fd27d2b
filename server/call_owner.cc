#include "server/call_owner.h"

#include <grpcpp/security/auth_context.h>
#include <grpcpp/server_context.h>

#include <string_view>
#include <vector>

#include "server/auth.h"

namespace entropyserve {

absl::StatusOr<std::string> CallOwner(const grpc::ServerContextBase& context,
                                      const Authenticator& authenticator) {
  if (authenticator.has_keys()) {
    const auto found = context.client_metadata().find("authorization");
    if (found == context.client_metadata().end()) return authenticator.Owner("");
    return authenticator.Owner(std::string_view(found->second.data(), found->second.size()));
  }
  const auto identity = context.auth_context();
  if (identity == nullptr || !identity->IsPeerAuthenticated()) return std::string();
  const std::vector<grpc::string_ref> names = identity->GetPeerIdentity();
  if (names.empty()) return std::string();
  return "cert:" + std::string(names.front().data(), names.front().size());
}

}  // namespace entropyserve
