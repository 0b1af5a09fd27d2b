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

// Every choice of one alternative in every place; places are what ":", "=" and "+" divide.
std::vector<std::string> Alternatives(const std::string& text) {
  std::vector<std::string> names = {""};
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find_first_of(":=+", begin), text.size());
    std::vector<std::string> longer;
    for (const std::string& name : names) {
      for (const auto choice : absl::StrSplit(text.substr(begin, end - begin), '|')) {
        longer.push_back(absl::StrCat(name, choice, text.substr(end, 1)));
      }
    }
    names = std::move(longer);
    begin = end + 1;
  }
  return names;
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
    for (const std::string& name : Alternatives(std::string(part))) {
      ASSIGN_OR_RETURN(PolicySpec spec, ParsePolicySpec(name));
      const bool known = std::any_of(specs.begin(), specs.end(), [&spec](const PolicySpec& other) {
        return other.name == spec.name;
      });
      if (!known) specs.push_back(std::move(spec));
    }
  }
  return specs;
}

std::string SweepPolicies(std::string_view kv) {
  constexpr const char* kPrefills[] = {
      "entropy:dense_prefix=1024:base=1024|2048|4096:correction=0|32",
      "entropy:dense_prefix=1024:budget=fixed:base=1024|2048|4096:correction=0|32",
      "entropy:dense_prefix=1024:budget=coverage:coverage=0.8|0.95",
      "coverage:dense_prefix=1024:coverage=0.8|0.9|0.95|0.98:correction=0|32",
      "coverage:dense_prefix=1024:budget=fixed:base=1024|2048:correction=0|32",
      "coverage:dense_prefix=1024:budget=entropy:base=1024|2048:correction=0|32",
      "entropy|coverage:dense_prefix=1024:correction=64|128",
      "entropy|coverage:dense_prefix=0|4096",
      "entropy|coverage:dense_prefix=1024:segment_tokens=256|1024",
      "critiprefill:dense_prefix=1024:base=1024|2048",
  };
  std::string list;
  for (const char* prefill : kPrefills) {
    absl::StrAppend(&list, list.empty() ? "" : ",", prefill, "+",
                    absl::string_view(kv.data(), kv.size()));
  }
  return list;
}

}  // namespace entropyserve
