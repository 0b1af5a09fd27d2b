// Conversations whose KV cache stays between calls.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/cache/sequence_cache.h"
#include "engine/engine.h"

namespace entropyserve {

struct Session {
  std::string id;
  std::string owner;
  std::unique_ptr<SequenceCache> cache;
  // Fed before the next turn's prompt: the last sampled token, which no step has read yet, and the
  // template's end of turn.
  std::vector<int32_t> pending;
  std::vector<bool> seen;  // [vocab] tokens of the conversation, for the repetition penalty
  int64_t turns = 0;
  bool busy = false;
  bool deleted = false;  // while busy: dropped at the end of the turn
  TimePoint last_used{};
  std::string kv_policy;
};

// Owned by the engine thread; not thread-safe.
class SessionStore {
 public:
  SessionStore(const Clock* clock, int64_t max_sessions)
      : clock_(clock), max_sessions_(max_sessions) {}

  // 128 random bits as 32 hexadecimal digits. RESOURCE_EXHAUSTED: max_sessions reached.
  absl::StatusOr<Session*> Create(const std::string& owner, std::unique_ptr<SequenceCache> cache);
  // NOT_FOUND: no such session of this owner (somebody else's looks the same).
  absl::StatusOr<Session*> Find(const std::string& owner, const std::string& id);
  std::vector<Session*> List(const std::string& owner);
  void Erase(const std::string& id) { sessions_.erase(id); }
  void Clear() { sessions_.clear(); }
  int64_t size() const { return int64_t(sessions_.size()); }
  int64_t positions() const;  // that all sessions hold; forks count in full
  SessionInfo Describe(const Session& session) const;

 private:
  const Clock* const clock_;
  const int64_t max_sessions_;
  std::map<std::string, std::unique_ptr<Session>> sessions_;
};

}  // namespace entropyserve
