// What a status says to machines, beside its code and message: that trying again helps, and why it
// failed. The server turns these into google.rpc.RetryInfo and google.rpc.ErrorInfo.
#pragma once

#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/cord.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace entropyserve {

inline constexpr char kRetryAfterPayload[] = "entropyserve/retry_after_seconds";
inline constexpr char kReasonPayload[] = "entropyserve/reason";

// Reasons, as callers see them.
inline constexpr char kSessionBusy[] = "SESSION_BUSY";
inline constexpr char kSessionLost[] = "SESSION_LOST";
inline constexpr char kNoChatTemplate[] = "NO_CHAT_TEMPLATE";

// `status` with the advice to try again after `seconds`: a queue is full, not "can never fit".
inline absl::Status WithRetryAfter(absl::Status status, double seconds) {
  status.SetPayload(kRetryAfterPayload, absl::Cord(absl::StrCat(seconds)));
  return status;
}

// Absent: trying again does not help.
inline std::optional<double> RetryAfterSeconds(const absl::Status& status) {
  const auto payload = status.GetPayload(kRetryAfterPayload);
  double seconds = 0;
  if (!payload.has_value() || !absl::SimpleAtod(std::string(*payload), &seconds))
    return std::nullopt;
  return seconds;
}

inline bool IsRetryable(const absl::Status& status) {
  return RetryAfterSeconds(status).has_value();
}

// `status` with a reason such as kSessionBusy.
inline absl::Status WithReason(absl::Status status, const char* reason) {
  status.SetPayload(kReasonPayload, absl::Cord(reason));
  return status;
}

// Empty: none was given.
inline std::string Reason(const absl::Status& status) {
  const auto payload = status.GetPayload(kReasonPayload);
  return payload.has_value() ? std::string(*payload) : std::string();
}

}  // namespace entropyserve
