// Command line flags for every field of a Policy message: the same names for the server's defaults
// and for a client's requests.
#pragma once

#include "absl/status/status.h"
#include "engine/base/flag_set.h"

namespace entropyserve {

namespace v1 {
class Policy;
}

// Adds --prefill-policy, --kv-policy and one flag per parameter, --prefill-... and --kv-...; each
// that is given sets its field of `policy`, which outlives `flags`. Ranges are checked where the
// policy is used.
// `defaults`: what --help shows; nullptr: nothing.
void AddPolicyFlags(FlagSet* flags, v1::Policy* policy, const v1::Policy* defaults = nullptr);

// A complaint about a field of "--prefill-policy" or "--kv-policy" ("--kv-policy.budget_tokens:
// ...") as one about its flag ("--kv-budget: ..."); any other as it is.
absl::Status NameFlag(const absl::Status& status);

}  // namespace entropyserve
