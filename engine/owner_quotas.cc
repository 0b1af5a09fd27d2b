#include "engine/owner_quotas.h"

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "kernels/check.h"

namespace entropyserve {

absl::Status OwnerQuotas::Check(const std::string& owner, int64_t tokens,
                                double retry_seconds) const {
  const auto found = loads_.find(owner);
  if (found == loads_.end()) return absl::OkStatus();
  const Load& load = found->second;
  if (max_requests_ > 0 && load.requests >= max_requests_) {
    return WithRetryAfter(absl::ResourceExhaustedError(absl::StrCat(
                              "the caller's quota of requests is used up: ", load.requests,
                              " are queued or running, ", max_requests_,
                              " may be (--max-key-requests); wait until one has finished")),
                          retry_seconds);
  }
  // As for the whole queue: a prompt that is longer than the limit may wait alone.
  if (max_tokens_ > 0 && load.queued > 0 && load.queued_tokens + tokens > max_tokens_) {
    return WithRetryAfter(
        absl::ResourceExhaustedError(
            absl::StrCat("the caller's quota of queued tokens is used up: ", load.queued_tokens,
                         " prompt tokens wait, ", tokens, " more are over ", max_tokens_,
                         " (--max-key-queue-tokens); wait until a request has started")),
        retry_seconds);
  }
  return absl::OkStatus();
}

void OwnerQuotas::Queued(const std::string& owner, int64_t tokens) {
  Load& load = loads_[owner];
  ++load.requests;
  ++load.queued;
  load.queued_tokens += tokens;
}

void OwnerQuotas::Admitted(const std::string& owner, int64_t tokens) {
  Load& load = loads_.at(owner);
  --load.queued;
  load.queued_tokens -= tokens;
}

void OwnerQuotas::Finished(const std::string& owner) {
  const auto found = loads_.find(owner);
  entropyserve::Check(found != loads_.end() && found->second.requests > found->second.queued,
                      "an owner's request ends twice");
  if (--found->second.requests == 0) loads_.erase(found);
}

absl::Status CheckSessionQuota(const EngineOptions& options, const SessionLoad& load,
                               bool another) {
  constexpr double kRetrySeconds = 5.0;  // sessions end by the caller's doing, or by idle time
  if (another && options.max_owner_sessions > 0 && load.sessions >= options.max_owner_sessions) {
    return WithRetryAfter(
        absl::ResourceExhaustedError(absl::StrCat(
            "the caller's quota of sessions is used up: it has ", load.sessions, ", ",
            options.max_owner_sessions, " may be (--max-key-sessions); delete some of them")),
        kRetrySeconds);
  }
  if (options.max_owner_session_bytes > 0 && load.bytes >= options.max_owner_session_bytes) {
    return WithRetryAfter(absl::ResourceExhaustedError(absl::StrCat(
                              "the caller's quota of session memory is used up: its sessions hold ",
                              load.bytes, " bytes of KV cache, ", options.max_owner_session_bytes,
                              " may be (--max-key-session-bytes); delete some of them")),
                          kRetrySeconds);
  }
  return absl::OkStatus();
}

}  // namespace entropyserve
