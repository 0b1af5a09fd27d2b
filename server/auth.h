// Who calls: an owner's name, to which sessions and quotas are bound.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace entropyserve {

// Constant after construction.
class Authenticator {
 public:
  // No keys: none is asked for.
  Authenticator() = default;

  // A line per key: NAME SHA256-HEX-OF-KEY; "#" starts a comment line. Several keys may have one
  // name. NOT_FOUND: no such file. INVALID_ARGUMENT: the line, and what is wrong with it; or no key
  // at all.
  static absl::StatusOr<Authenticator> FromFile(const std::string& path);
  static absl::StatusOr<Authenticator> FromText(std::string_view text, const std::string& source);

  bool has_keys() const { return !keys_.empty(); }

  // `authorization`: the call's metadata of that name, "Bearer KEY"; empty: absent. Compares in
  // constant time. UNAUTHENTICATED: no key, or an unknown one.
  absl::StatusOr<std::string> Owner(std::string_view authorization) const;

 private:
  struct Key {
    std::string owner;
    std::string digest;  // SHA-256, 32 bytes
  };
  std::vector<Key> keys_;
};

}  // namespace entropyserve
