#include "client/request_flags.h"

#include <limits>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "engine/base/status_macros.h"
#include "proto/policy_flags.h"

namespace entropyserve {
namespace {

using Sampling = v1::SamplingParams;

void AddFloat(FlagSet* flags, const char* name, const char* help, Sampling* sampling,
              void (Sampling::*set)(float)) {
  flags->AddCustom(name, "", help, [=](std::string_view text) -> absl::Status {
    ASSIGN_OR_RETURN(const double value, ParseNumber(text));
    (sampling->*set)(static_cast<float>(value));
    return absl::OkStatus();
  });
}

template <typename Int>
void AddInt(FlagSet* flags, const char* name, const char* help, Sampling* sampling,
            void (Sampling::*set)(Int)) {
  flags->AddCustom(name, "", help, [=](std::string_view text) -> absl::Status {
    Int value = 0;
    if (!absl::SimpleAtoi(absl::string_view(text.data(), text.size()), &value)) {
      return absl::InvalidArgumentError("expected a whole number");
    }
    (sampling->*set)(value);
    return absl::OkStatus();
  });
}

}  // namespace

absl::Status ParseIds(std::string_view text, google::protobuf::RepeatedField<int32_t>* ids) {
  for (const auto part : absl::StrSplit(absl::string_view(text.data(), text.size()),
                                        absl::ByAnyChar(", \n\t"), absl::SkipEmpty())) {
    int32_t id = 0;
    if (!absl::SimpleAtoi(part, &id)) {
      return absl::InvalidArgumentError("expected token ids, e.g. 1,2,3");
    }
    ids->Add(id);
  }
  return absl::OkStatus();
}

void AddRequestFlags(FlagSet* flags, v1::GenerateRequest* request) {
  flags->Section("Sampling (absent: the server's default)");
  Sampling* s = request->mutable_sampling();
  AddFloat(flags, "temperature", "0: greedy", s, &Sampling::set_temperature);
  AddFloat(flags, "top-p", "keep the likeliest tokens of this mass", s, &Sampling::set_top_p);
  AddInt<int32_t>(flags, "top-k", "keep this many tokens; 0: off", s, &Sampling::set_top_k);
  AddFloat(flags, "min-p", "drop tokens below this share of the likeliest", s,
           &Sampling::set_min_p);
  AddFloat(flags, "repetition-penalty", "1: off", s, &Sampling::set_repetition_penalty);
  AddFloat(flags, "presence-penalty", "0: off", s, &Sampling::set_presence_penalty);
  AddFloat(flags, "frequency-penalty", "0: off", s, &Sampling::set_frequency_penalty);
  AddInt<uint64_t>(flags, "seed", "the same seed gives the same noise; absent: drawn by the server",
                   s, &Sampling::set_seed);
  flags->AddCustom("stop", "", "end before this text; may be repeated", [s](std::string_view text) {
    s->add_stop(std::string(text));
    return absl::OkStatus();
  });
  flags->AddCustom(
      "stop-token-ids", "", "end after one of these ids, e.g. 1,2",
      [s](std::string_view text) { return ParseIds(text, s->mutable_stop_token_ids()); });
  AddInt<int64_t>(flags, "max-new-tokens", "longest answer", s, &Sampling::set_max_new_tokens);
  AddInt<int64_t>(flags, "min-new-tokens", "shortest answer", s, &Sampling::set_min_new_tokens);
  flags->AddSwitch("ignore-eos", "false", "do not end at the model's end tokens",
                   [s](bool value) { s->set_ignore_eos(value); });
  AddInt<int32_t>(flags, "logprobs", "report this many of the likeliest, 0 to 20; with --json", s,
                  &Sampling::set_logprobs);
  flags->AddCustom(
      "forced-token-ids", "", "the answer's first tokens, e.g. 1,2",
      [s](std::string_view text) { return ParseIds(text, s->mutable_forced_token_ids()); });
  flags->Section("Policy (absent: the server's default)");
  AddPolicyFlags(flags, request->mutable_policy());
}

}  // namespace entropyserve
