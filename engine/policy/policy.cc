#include "engine/policy/policy.h"

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <span>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// Limits of parameters that size memory or loops and have no natural bound.
constexpr int32_t kMaxWindow = 1024;    // queries kept per sequence, layer and head
constexpr int32_t kMaxPoolReach = 127;  // positions; pooling costs this much per cached token

// ---- Names and presets: a part or a preset is added by one line here
// -----------------------------

template <typename T>
struct Named {
  std::string_view name;
  T value;
};

constexpr Named<Estimator> kEstimators[] = {
    {"box", Estimator::kBox},
    {"probe", Estimator::kProbe},
};

constexpr Named<BudgetRule> kBudgetRules[] = {
    {"entropy", BudgetRule::kEntropy},
    {"fixed", BudgetRule::kFixed},
    {"coverage", BudgetRule::kCoverage},
};

constexpr Named<PrefillParams> kPrefillPresets[] = {
    {"entropy", {}},
    {"coverage",
     {.estimator = Estimator::kProbe, .budget = BudgetRule::kCoverage, .correction = 0}},
    {"entropy_paper", {.whole_prompt = true, .forced = false, .correction = 0}},
    {"critiprefill", {.budget = BudgetRule::kFixed, .forced = false, .correction = 0, .block = 32}},
    {"full", {.full = true}},
};

constexpr Named<KvParams> kKvPresets[] = {
    {"latent", {}},
    {"snapkv", {.rule = KvRule::kSnapKv, .gap = 0, .pool_before = 2, .pool_after = 2}},
    {"adakv",
     {.rule = KvRule::kAdaKv, .pooling = Pooling::kMax, .pool_before = 3, .pool_after = 3}},
    {"full", {.rule = KvRule::kFull}},
};

// What arrives comes back in messages, cut to a length that is safe to print.
std::string Quoted(std::string_view text) {
  constexpr size_t kMaxShown = 40;
  const bool cut = text.size() > kMaxShown;
  return absl::StrCat("\"", std::string(text.substr(0, kMaxShown)), cut ? "...\"" : "\"");
}

template <typename T>
std::vector<std::string> Names(std::span<const Named<T>> table) {
  std::vector<std::string> names;
  for (const auto& entry : table) names.emplace_back(entry.name);
  return names;
}

template <typename T>
absl::StatusOr<T> Find(std::span<const Named<T>> table, std::string_view name,
                       std::string_view field) {
  for (const auto& entry : table) {
    if (entry.name == name) return entry.value;
  }
  return absl::InvalidArgumentError(absl::StrCat(std::string(field), ": unknown name ",
                                                 Quoted(name),
                                                 "; known: ", absl::StrJoin(Names(table), ", ")));
}

template <typename T>
std::string_view NameOf(std::span<const Named<T>> table, T value) {
  for (const auto& entry : table) {
    if (entry.value == value) return entry.name;
  }
  return "";
}

// ---- Bounds
// ---------------------------------------------------------------------------------------

// Collects the first complaint about a message's fields.
class Fields {
 public:
  explicit Fields(std::string_view prefix) : prefix_(prefix) {}

  // The field must be `condition`'s; `rule` completes "must be ...".
  template <typename T>
  void Must(bool condition, std::string_view field, std::string_view rule, T value) {
    if (condition || !status_.ok()) return;
    status_ = absl::InvalidArgumentError(
        absl::StrCat(Path(field), ": must be ", std::string(rule), ", got ", value));
  }

  void OneOf(std::string_view field, int32_t value, std::initializer_list<int32_t> allowed) {
    bool found = false;
    for (int32_t a : allowed) found |= a == value;
    Must(found, field, absl::StrCat("one of ", absl::StrJoin(allowed, ", ")), value);
  }

  void AtLeast(std::string_view field, int64_t value, int64_t least) {
    Must(value >= least, field, absl::StrCat("at least ", least), value);
  }

  // Written so that a NaN is outside every range.
  void NonNegative(std::string_view field, float value) {
    Must(value >= 0 && std::isfinite(value), field, "a finite number of at least 0", value);
  }
  void Positive(std::string_view field, float value) {
    Must(value > 0 && std::isfinite(value), field, "a finite number above 0", value);
  }
  void Share(std::string_view field, float value) {
    Must(value >= 0 && value <= 1, field, "between 0 and 1", value);
  }

  // Two fields that do not go together.
  void Contradiction(bool contradicts, std::string_view field, std::string_view why) {
    if (!contradicts || !status_.ok()) return;
    status_ = absl::InvalidArgumentError(absl::StrCat(Path(field), ": ", std::string(why)));
  }

  absl::Status status() const { return status_; }

 private:
  std::string Path(std::string_view field) const {
    return prefix_.empty() ? std::string(field) : absl::StrCat(prefix_, ".", std::string(field));
  }

  std::string prefix_;
  absl::Status status_;
};

void CheckRanges(const PrefillParams& p, Fields& f) {
  f.OneOf("segment_tokens", p.segment, {128, 256, 512, 1024});
  f.OneOf("block_tokens", p.block, {8, 16, 32, 64});
  f.AtLeast("correction", p.correction, 0);
  f.AtLeast("probe_stride", p.probe_stride, 1);
  f.AtLeast("dense_prefix_tokens", p.dense_prefix, 0);
  f.AtLeast("dense_suffix_tokens", p.dense_suffix, 0);
  f.AtLeast("first_sparse_layer", p.first_sparse_layer, 0);
  f.AtLeast("base_tokens", p.base, 1);
  f.NonNegative("e_t", p.e_t);
  f.NonNegative("delta", p.delta);
  f.NonNegative("alpha", p.alpha);
  f.Positive("temperature", p.temperature);
  f.Positive("coverage", p.coverage);
  f.AtLeast("coverage_min_tokens", p.coverage_min, 0);
  f.AtLeast("coverage_max_tokens", p.coverage_max, 1);
}

// Fields against each other; ranges hold already.
void CheckTogether(const PrefillParams& p, Fields& f) {
  f.Contradiction(
      p.correction > 0 && p.segment % p.correction != 0, "correction",
      absl::StrCat("stride ", p.correction, " does not divide segment_tokens ", p.segment));
  f.Contradiction(
      p.segment % p.probe_stride != 0, "probe_stride",
      absl::StrCat("stride ", p.probe_stride, " does not divide segment_tokens ", p.segment));
  f.Contradiction(
      p.coverage_max < p.coverage_min, "coverage_max_tokens",
      absl::StrCat(p.coverage_max, " is less than coverage_min_tokens ", p.coverage_min));
  // The forced blocks are read inside the budget: it must hold them.
  const int64_t forced = p.forced ? int64_t{p.segment} + p.block : 0;
  const bool coverage = p.budget == BudgetRule::kCoverage;
  const std::string needs = absl::StrCat(
      " tokens do not hold the forced blocks (segment_tokens + block_tokens = ", forced, ")");
  f.Contradiction(!coverage && p.base < forced, "base_tokens", absl::StrCat(p.base, needs));
  f.Contradiction(coverage && p.coverage_max < forced, "coverage_max_tokens",
                  absl::StrCat(p.coverage_max, needs));
}

// The released code has no other parts.
void CheckWholePrompt(const PrefillParams& p, Fields& f) {
  f.Contradiction(p.estimator != Estimator::kBox, "estimator", "entropy_paper has only \"box\"");
  f.Contradiction(p.budget != BudgetRule::kEntropy, "budget", "entropy_paper has only \"entropy\"");
  f.Contradiction(p.forced, "forced", "entropy_paper forces no blocks");
  f.Contradiction(p.correction != 0, "correction", "entropy_paper has no correction; give 0");
}

}  // namespace

absl::StatusOr<PrefillPolicy> PrefillPreset(std::string_view name, std::string_view field) {
  ASSIGN_OR_RETURN(const PrefillParams params, Find<PrefillParams>(kPrefillPresets, name, field));
  return PrefillPolicy{std::string(name), params};
}

std::vector<std::string> PrefillPresetNames() { return Names<PrefillParams>(kPrefillPresets); }

absl::StatusOr<KvPolicy> KvPreset(std::string_view name, std::string_view field) {
  ASSIGN_OR_RETURN(const KvParams params, Find<KvParams>(kKvPresets, name, field));
  return KvPolicy{std::string(name), params};
}

std::vector<std::string> KvPresetNames() { return Names<KvParams>(kKvPresets); }

absl::StatusOr<Estimator> ParseEstimator(std::string_view name, std::string_view field) {
  return Find<Estimator>(kEstimators, name, field);
}
absl::StatusOr<BudgetRule> ParseBudgetRule(std::string_view name, std::string_view field) {
  return Find<BudgetRule>(kBudgetRules, name, field);
}
std::string_view Name(Estimator estimator) { return NameOf<Estimator>(kEstimators, estimator); }
std::string_view Name(BudgetRule rule) { return NameOf<BudgetRule>(kBudgetRules, rule); }

absl::Status Validate(const PrefillPolicy& policy, std::string_view field) {
  Fields fields(field);
  CheckRanges(policy.params, fields);
  RETURN_IF_ERROR(fields.status());
  if (policy.params.full) return absl::OkStatus();  // the parts do not act
  CheckTogether(policy.params, fields);
  if (policy.params.whole_prompt) CheckWholePrompt(policy.params, fields);
  return fields.status();
}

absl::Status Validate(const KvPolicy& policy, std::string_view field) {
  const KvParams& p = policy.params;
  Fields fields(field);
  fields.Must(p.window >= 1 && p.window <= kMaxWindow, "window_tokens",
              absl::StrCat("between 1 and ", kMaxWindow), p.window);
  fields.AtLeast("budget_tokens", p.budget, 1);
  fields.Share("fraction", p.fraction);
  fields.AtLeast("gap_tokens", p.gap, 0);
  const std::string reach = absl::StrCat("between 0 and ", kMaxPoolReach);
  fields.Must(p.pool_before >= 0 && p.pool_before <= kMaxPoolReach, "pool_before", reach,
              p.pool_before);
  fields.Must(p.pool_after >= 0 && p.pool_after <= kMaxPoolReach, "pool_after", reach,
              p.pool_after);
  fields.Share("adakv_floor", p.adakv_floor);
  RETURN_IF_ERROR(fields.status());
  if (p.rule == KvRule::kFull) return absl::OkStatus();
  fields.Contradiction(p.budget < p.window + kSinkTokens, "budget_tokens",
                       absl::StrCat(p.budget, " is less than window_tokens + ", kSinkTokens, " = ",
                                    p.window + kSinkTokens));
  fields.Contradiction(p.rule == KvRule::kSnapKv && p.gap != 0, "gap_tokens",
                       "snapkv scores with the prompt's queries only; give 0, or take latent");
  return fields.status();
}

}  // namespace entropyserve
