#include "client/eval/policy_spec.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "engine/base/flag_set.h"
#include "engine/base/status_macros.h"
#include "proto/policy_flags.h"

namespace entropyserve {
namespace {

absl::Status AddHalf(absl::string_view text, const char* kind, std::vector<std::string>* flags) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  if (parts[0].empty()) return absl::InvalidArgumentError(absl::StrCat("no ", kind, " policy"));
  if (parts[0] != "default") flags->push_back(absl::StrCat("--", kind, "-policy=", parts[0]));
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::pair<std::string, std::string> setting =
        absl::StrSplit(parts[i], absl::MaxSplits('=', 1));
    if (setting.second.empty()) {
      return absl::InvalidArgumentError(absl::StrCat("\"", parts[i], "\": expected key=value"));
    }
    flags->push_back(absl::StrCat("--", kind, "-", absl::StrReplaceAll(setting.first, {{"_", "-"}}),
                                  "=", setting.second));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<PolicySpec> ParsePolicySpec(std::string_view text) {
  PolicySpec spec;
  spec.name = std::string(text);
  const size_t plus = text.find('+');
  spec.prefill = std::string(text.substr(0, plus));
  spec.kv = plus == std::string_view::npos ? "full" : std::string(text.substr(plus + 1));
  if (plus == std::string_view::npos) spec.name += "+full";
  std::vector<std::string> flags;
  absl::Status status = AddHalf(spec.prefill, "prefill", &flags);
  status.Update(AddHalf(spec.kv, "kv", &flags));
  if (status.ok()) {
    FlagSet set("", "");
    AddPolicyFlags(&set, &spec.policy);
    status = set.Parse(flags).status();
  }
  if (!status.ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy \"", spec.name, "\": ", status.message()));
  }
  return spec;
}

absl::StatusOr<std::vector<PolicySpec>> ParsePolicySpecs(std::string_view text) {
  std::vector<PolicySpec> specs;
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    ASSIGN_OR_RETURN(PolicySpec spec, ParsePolicySpec({part.data(), part.size()}));
    if (std::any_of(specs.begin(), specs.end(),
                    [&spec](const PolicySpec& other) { return other.name == spec.name; })) {
      return absl::InvalidArgumentError(absl::StrCat("policy \"", spec.name, "\" is named twice"));
    }
    specs.push_back(std::move(spec));
  }
  return specs;
}

}  // namespace entropyserve
