// What a request may ask of the method: which past tokens a prefill reads (PrefillPolicy) and which
// tokens of the KV cache survive it (KvPolicy). A policy only chooses; it never owns a kernel.
// Formulas: ARCHITECTURE.md, "The method"; paper: EntropyInfer, arXiv 2606.09508.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/policy_params.h"

namespace entropyserve {

// A named combination of parts and parameters.
struct PrefillPolicy {
  std::string name = "entropy";  // the preset it started from
  PrefillParams params;
};

struct KvPolicy {
  std::string name = "latent";
  KvParams params;
};

// Presets by name: full, entropy, coverage, entropy_paper, critiprefill.
// INVALID_ARGUMENT names `field` and lists the known names.
absl::StatusOr<PrefillPolicy> PrefillPreset(std::string_view name, std::string_view field);
std::vector<std::string> PrefillPresetNames();

// full, latent, snapkv, adakv.
absl::StatusOr<KvPolicy> KvPreset(std::string_view name, std::string_view field);
std::vector<std::string> KvPresetNames();

// Names of the parts, for the wire and flags: "box", "probe"; "entropy", "fixed", "coverage".
absl::StatusOr<Estimator> ParseEstimator(std::string_view name, std::string_view field);
absl::StatusOr<BudgetRule> ParseBudgetRule(std::string_view name, std::string_view field);
std::string_view Name(Estimator estimator);
std::string_view Name(BudgetRule rule);

// INVALID_ARGUMENT naming the field (prefixed with `field`, e.g. "policy.prefill.block_tokens") when a
// value is out of range, NaN, or contradicts another.
absl::Status Validate(const PrefillPolicy& policy, std::string_view field);
absl::Status Validate(const KvPolicy& policy, std::string_view field);

}  // namespace entropyserve
