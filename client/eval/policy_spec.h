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

// Of a comma-separated list. "|" between alternatives, anywhere in a name or value, stands for one
// policy each: "entropy|coverage:correction=0|32+full" is four. A policy that occurs again is left
// out. INVALID_ARGUMENT: also an empty one.
absl::StatusOr<std::vector<PolicySpec>> ParsePolicySpecs(std::string_view text);

// What --sweep walks, as such a list with `kv` as the other half: every estimator with every budget
// rule and several sizes, strides of the correction, dense prefixes and segment sizes. Everything
// but the dense prefixes themselves is measured behind one of 1024 tokens.
std::string SweepPolicies(std::string_view kv);

}  // namespace entropyserve
