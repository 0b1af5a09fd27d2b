#include "proto/policy_flags.h"

#include <limits>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;

struct PolicyFlag {
  const char* flag;
  const char* field;  // of PrefillPolicy or KvPolicy
  const char* help;
};

constexpr PolicyFlag kPrefillFlags[] = {
    {"prefill-policy", "preset", "entropy, coverage, entropy_paper, critiprefill or full"},
    {"prefill-estimator", "estimator", "box or probe: what a segment would look at"},
    {"prefill-budget", "budget", "entropy, fixed or coverage: how much it may read"},
    {"prefill-forced", "forced", "always read the first block and the previous segment"},
    {"prefill-correction", "correction", "stride of the correction's probes, tokens; 0: off"},
    {"prefill-segment-tokens", "segment_tokens", "queries that share a selection: 128 to 1024"},
    {"prefill-block-tokens", "block_tokens", "keys selected together: 8 to 64"},
    {"prefill-probe-stride", "probe_stride", "stride of the probe estimator, tokens"},
    {"prefill-dense-prefix", "dense_prefix_tokens",
     "segments that start before it are dense, tokens"},
    {"prefill-dense-suffix", "dense_suffix_tokens", "the prompt's last tokens, read densely"},
    {"prefill-first-sparse-layer", "first_sparse_layer", "layers below it are dense"},
    {"prefill-base", "base_tokens", "base budget, tokens"},
    {"prefill-e-t", "e_t", "entropy under which a head counts as rigid, nats"},
    {"prefill-delta", "delta", "change of entropy at which a budget stays"},
    {"prefill-alpha", "alpha", "gain of the budget update"},
    {"prefill-temperature", "temperature", "factor on box scores before their softmax"},
    {"prefill-coverage", "coverage", "attention mass that rule coverage reaches"},
    {"prefill-coverage-min", "coverage_min_tokens", "least budget of rule coverage, tokens"},
    {"prefill-coverage-max", "coverage_max_tokens", "largest budget of rule coverage, tokens"},
};

constexpr PolicyFlag kKvFlags[] = {
    {"kv-policy", "preset", "latent, snapkv, adakv or full"},
    {"kv-budget", "budget_tokens", "tokens kept per kv head"},
    {"kv-fraction", "fraction",
     "of the positions so far; the larger of budget and fraction counts"},
    {"kv-gap", "gap_tokens", "tokens generated before compression"},
    {"kv-window", "window_tokens", "last queries, which score and always stay"},
    {"kv-pooling", "pooling", "average or max"},
    {"kv-pool-before", "pool_before",
     "positions before a token that was looked at, which share in it"},
    {"kv-pool-after", "pool_after", "positions after it"},
    {"kv-keep-sinks", "keep_sinks", "the first 4 tokens always stay"},
    {"kv-adakv-floor", "adakv_floor", "share of its budget that every head keeps under adakv"},
};

absl::Status SetField(Message* message, const FieldDescriptor* field, std::string_view text) {
  const google::protobuf::Reflection* reflection = message->GetReflection();
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      reflection->SetString(message, field, std::string(text));
      return absl::OkStatus();
    case FieldDescriptor::CPPTYPE_FLOAT: {
      ASSIGN_OR_RETURN(const double value, ParseNumber(text));
      reflection->SetFloat(message, field, static_cast<float>(value));
      return absl::OkStatus();
    }
    default: {
      ASSIGN_OR_RETURN(const int64_t value, ParseInt(text));
      if (value < std::numeric_limits<int32_t>::min() ||
          value > std::numeric_limits<int32_t>::max()) {
        return absl::InvalidArgumentError("expected a 32-bit whole number");
      }
      reflection->SetInt32(message, field, static_cast<int32_t>(value));
      return absl::OkStatus();
    }
  }
}

// A field's value as --help shows it; empty for an absent one.
std::string Shown(const Message& message, const FieldDescriptor* field) {
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  if (!reflection.HasField(message, field)) return "";
  switch (field->cpp_type()) {
    case FieldDescriptor::CPPTYPE_STRING:
      return reflection.GetString(message, field);
    case FieldDescriptor::CPPTYPE_BOOL:
      return reflection.GetBool(message, field) ? "true" : "false";
    case FieldDescriptor::CPPTYPE_FLOAT:
      return absl::StrCat(reflection.GetFloat(message, field));
    default:
      return absl::StrCat(reflection.GetInt32(message, field));
  }
}

// `part` finds the message at parse time, so that a policy without flags stays empty.
template <typename Part, size_t kCount>
void AddFlags(FlagSet* flags, v1::Policy* policy, const PolicyFlag (&table)[kCount],
              const Message& defaults, Part part) {
  for (const PolicyFlag& entry : table) {
    const FieldDescriptor* field = defaults.GetDescriptor()->FindFieldByName(entry.field);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_BOOL) {
      flags->AddSwitch(entry.flag, Shown(defaults, field), entry.help, [=](bool value) {
        Message* message = part(policy);
        message->GetReflection()->SetBool(message, field, value);
      });
      continue;
    }
    flags->AddCustom(entry.flag, Shown(defaults, field), entry.help,
                     [=](std::string_view text) { return SetField(part(policy), field, text); });
  }
}

}  // namespace

void AddPolicyFlags(FlagSet* flags, v1::Policy* policy, const v1::Policy* defaults) {
  const v1::Policy none;
  const v1::Policy& shown = defaults == nullptr ? none : *defaults;
  AddFlags(flags, policy, kPrefillFlags, shown.prefill(),
           [](v1::Policy* p) -> Message* { return p->mutable_prefill(); });
  AddFlags(flags, policy, kKvFlags, shown.kv(),
           [](v1::Policy* p) -> Message* { return p->mutable_kv(); });
}

absl::Status NameFlag(const absl::Status& status) {
  const auto named = [&status](const char* policy, const auto& table) -> std::string {
    for (const PolicyFlag& entry : table) {
      const std::string field = absl::StrCat(policy, ".", entry.field, ":");
      if (absl::StartsWith(status.message(), field))
        return absl::StrCat("--", entry.flag, ":", status.message().substr(field.size()));
    }
    return "";
  };
  std::string message = named("--prefill-policy", kPrefillFlags);
  if (message.empty()) message = named("--kv-policy", kKvFlags);
  return message.empty() ? status : absl::Status(status.code(), message);
}

}  // namespace entropyserve
