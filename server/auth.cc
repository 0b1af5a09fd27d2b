#include "server/auth.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cctype>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/base/read_file.h"

namespace entropyserve {
namespace {

std::string Sha256(std::string_view text) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

bool IsHexDigest(const std::string& text) {
  return text.size() == 2 * SHA256_DIGEST_LENGTH &&
         std::all_of(text.begin(), text.end(), [](unsigned char c) { return std::isxdigit(c); });
}

}  // namespace

absl::StatusOr<Authenticator> Authenticator::FromFile(const std::string& path) {
  const absl::StatusOr<std::string> text = ReadFile(path);
  if (!text.ok()) {
    return absl::NotFoundError(absl::StrCat("--key-file: ", text.status().message()));
  }
  return FromText(*text, path);
}

absl::StatusOr<Authenticator> Authenticator::FromText(std::string_view text,
                                                      const std::string& source) {
  Authenticator authenticator;
  int number = 0;
  for (const auto line : absl::StrSplit(absl::string_view(text.data(), text.size()), '\n')) {
    ++number;
    const std::vector<std::string> words =
        absl::StrSplit(line, absl::ByAnyChar(" \t\r"), absl::SkipEmpty());
    if (words.empty() || words[0][0] == '#') continue;
    if (words.size() != 2 || !IsHexDigest(words[1])) {
      return absl::InvalidArgumentError(absl::StrCat(
          source, ":", number, ": expected NAME and the key's SHA-256 as 64 hexadecimal digits"));
    }
    authenticator.keys_.push_back({words[0], absl::HexStringToBytes(words[1])});
  }
  if (authenticator.keys_.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(source, ": holds no key"));
  }
  return authenticator;
}

absl::StatusOr<std::string> Authenticator::Owner(std::string_view authorization) const {
  if (keys_.empty()) return std::string();
  constexpr std::string_view kBearer = "Bearer ";
  // A scheme's name has no case (RFC 9110, 11.1).
  if (!absl::StartsWithIgnoreCase({authorization.data(), authorization.size()},
                                  {kBearer.data(), kBearer.size()})) {
    return absl::UnauthenticatedError("authorization: expected Bearer and a key");
  }
  const std::string digest = Sha256(authorization.substr(kBearer.size()));
  // Every key is compared in full, so that time says nothing about which one is near.
  const Key* found = nullptr;
  for (const Key& key : keys_) {
    if (CRYPTO_memcmp(key.digest.data(), digest.data(), digest.size()) == 0) found = &key;
  }
  if (found == nullptr) return absl::UnauthenticatedError("authorization: unknown key");
  return found->owner;
}

}  // namespace entropyserve
