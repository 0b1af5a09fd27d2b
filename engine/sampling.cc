#include "engine/sampling.h"

#include <cmath>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/utf8.h"

namespace entropyserve {
namespace {

absl::Status Bad(const char* field, const std::string& why) {
  return absl::InvalidArgumentError(absl::StrCat("sampling.", field, ": ", why));
}

// NaN fails every comparison, so it is out of every range.
absl::Status InRange(const char* field, float value, float low, float high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return Bad(field, absl::StrCat("must be between ", low, " and ", high, ", got ", value));
}

absl::Status ValidateIds(const char* field, const std::vector<int32_t>& ids, int vocab_size) {
  for (int32_t id : ids) {
    if (id < 0 || id >= vocab_size) {
      return Bad(field, absl::StrCat("token ", id, " is not in [0, ", vocab_size, ")"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status Validate(const SamplingParams& p, int vocab_size) {
  constexpr float kMaxTemperature = 100.0f, kMaxRepetition = 100.0f;
  RETURN_IF_ERROR(InRange("temperature", p.temperature, 0.0f, kMaxTemperature));
  RETURN_IF_ERROR(InRange("top_p", p.top_p, 0.0f, 1.0f));
  if (p.top_p == 0.0f)
    return Bad("top_p", "must be above 0; for greedy answers set temperature to 0");
  RETURN_IF_ERROR(InRange("min_p", p.min_p, 0.0f, 1.0f));
  if (p.top_k < 0) return Bad("top_k", "must be 0 (off) or more");
  RETURN_IF_ERROR(InRange("repetition_penalty", p.repetition_penalty, 0.0f, kMaxRepetition));
  if (p.repetition_penalty == 0.0f) return Bad("repetition_penalty", "must be above 0; 1 is off");
  RETURN_IF_ERROR(InRange("presence_penalty", p.presence_penalty, -2.0f, 2.0f));
  RETURN_IF_ERROR(InRange("frequency_penalty", p.frequency_penalty, -2.0f, 2.0f));
  if (p.max_new_tokens < 0) return Bad("max_new_tokens", "must be 0 or more");
  if (p.min_new_tokens < 0) return Bad("min_new_tokens", "must be 0 or more");
  if (p.min_new_tokens > p.max_new_tokens) return Bad("min_new_tokens", "exceeds max_new_tokens");
  if (p.logprobs < -1 || p.logprobs > kMaxLogprobs) {
    return Bad("logprobs", absl::StrCat("must be between 0 and ", kMaxLogprobs));
  }
  if (p.stop.size() > size_t{kMaxStopStrings}) {
    return Bad("stop", absl::StrCat("at most ", kMaxStopStrings, " strings"));
  }
  for (const std::string& stop : p.stop) {
    if (stop.empty() || stop.size() > size_t{kMaxStopStringBytes}) {
      return Bad("stop", absl::StrCat("a stop string has 1 to ", kMaxStopStringBytes, " bytes"));
    }
    if (!IsValidUtf8(stop)) return Bad("stop", "a stop string must be valid UTF-8");
  }
  if (p.stop_token_ids.size() > size_t{kMaxStopTokenIds}) {
    return Bad("stop_token_ids", absl::StrCat("at most ", kMaxStopTokenIds, " ids"));
  }
  RETURN_IF_ERROR(ValidateIds("stop_token_ids", p.stop_token_ids, vocab_size));
  RETURN_IF_ERROR(ValidateIds("forced_token_ids", p.forced_token_ids, vocab_size));
  if (int64_t(p.forced_token_ids.size()) > p.max_new_tokens) {
    return Bad("forced_token_ids", "more ids than max_new_tokens");
  }
  return absl::OkStatus();
}

}  // namespace entropyserve
