// Policies as one word of a command line: "entropy:base=1024:dense_prefix=1024+latent:budget=1024".
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

struct PolicySpec {
  std::string name;         // as written: what tables and records call it
  std::string prefill, kv;  // its two halves
  v1::Policy policy;
};

// PREFILL+KV, each a preset's name or "default" (the server's) and any number of ":key=value", the
// keys those of generate's flags without --prefill- or --kv-; "_" and "-" are the same. Without
// "+KV": kv "full". INVALID_ARGUMENT: a wrong key or value. Presets are the server's to check.
absl::StatusOr<PolicySpec> ParsePolicySpec(std::string_view text);

// Of a comma-separated list. INVALID_ARGUMENT: also one that is empty or names a policy twice.
absl::StatusOr<std::vector<PolicySpec>> ParsePolicySpecs(std::string_view text);

}  // namespace entropyserve
