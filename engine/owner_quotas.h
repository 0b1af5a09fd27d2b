// What each owner has queued and running, against its limits: one caller cannot take all of a
// queue.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "engine/engine.h"

namespace entropyserve {

// Not thread-safe. An owner that has nothing queued or running takes no memory.
class OwnerQuotas {
 public:
  explicit OwnerQuotas(const EngineOptions& options)
      : max_requests_(options.max_owner_requests), max_tokens_(options.max_owner_queue_tokens) {}

  // RESOURCE_EXHAUSTED with the advice to try again after `retry_seconds`: one more request of
  // `tokens` prompt tokens is more than the owner may have.
  absl::Status Check(const std::string& owner, int64_t tokens, double retry_seconds) const;

  void Queued(const std::string& owner, int64_t tokens);
  void Admitted(const std::string& owner, int64_t tokens);  // it leaves the queue
  void Finished(const std::string& owner);                  // after Admitted

  bool empty() const { return loads_.empty(); }

 private:
  struct Load {
    int64_t requests = 0;       // queued and running
    int64_t queued = 0;         // of them, in the queue
    int64_t queued_tokens = 0;  // of their prompts
  };

  const int64_t max_requests_, max_tokens_;  // 0: no limit
  std::map<std::string, Load> loads_;
};

// What an owner's sessions are and hold, in all tiers.
struct SessionLoad {
  int64_t sessions = 0;
  int64_t bytes = 0;  // KV
};
// The same for them. `another`: a session is about to be made, otherwise one is about to grow. OK
// when what there is lies below the limits.
absl::Status CheckSessionQuota(const EngineOptions& options, const SessionLoad& load, bool another);

}  // namespace entropyserve
