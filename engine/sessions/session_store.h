// Conversations whose KV cache stays between calls: the table of those this server knows.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/cache/sequence_cache.h"
#include "engine/engine.h"
#include "engine/sessions/host_buffer.h"

namespace entropyserve {

// What the server's own subfolder of --session-dir has of a session.
enum class SessionClaim {
  kNone,
  kWhole,   // its file: the state has not changed since
  kMarker,  // that it is, or was, in this server's memory
};

struct Session {
  std::string id;
  std::string owner;  // OwnerDigest
  // In every tier; it holds pages in kDevice only.
  std::unique_ptr<SequenceCache> cache;
  // Fed before the next turn's prompt: the last sampled token, which no step has read yet, and the
  // template's end of turn. These two are in the file only while the session is on the disk.
  std::vector<int32_t> pending;
  std::vector<bool> seen;  // [vocab] tokens of the conversation, for the repetition penalty
  int64_t turns = 0;
  bool busy = false;
  bool deleted = false;  // while busy: dropped at the end of the turn
  TimePoint last_used{};
  uint64_t last_use = 0;  // a counter: the order of last uses
  std::string kv_policy;

  // Where the tokens are; SessionTiers' business.
  SessionTier tier = SessionTier::kDevice;
  int64_t kv_bytes = 0;               // of its pages when it was last idle, shared ones in full
  std::shared_ptr<HostBuffer> pages;  // kHost, and kDisk once read back
  int64_t file_bytes = 0;             // kDisk
  int64_t file_modified_ns = 0;       // kDisk
  uint64_t writing = 0;               // kHost: the number of the write that is under way; 0: none
  bool loading = false;               // kDisk: waits to be read, or is being read
  SessionClaim claim = SessionClaim::kNone;
  bool lost = false;  // while busy: its file turned out to be damaged
};

// Owned by the engine thread; not thread-safe.
class SessionStore {
 public:
  SessionStore(const Clock* clock, int64_t max_sessions)
      : clock_(clock), max_sessions_(max_sessions) {}

  // 128 random bits as 32 hexadecimal digits. RESOURCE_EXHAUSTED: max_sessions reached.
  absl::StatusOr<Session*> Create(const std::string& owner, std::unique_ptr<SequenceCache> cache);
  // Adds one that was made elsewhere, under its id.
  Session* Add(std::unique_ptr<Session> session);
  // NOT_FOUND: no such session of this owner (somebody else's looks the same). FAILED_PRECONDITION,
  // SESSION_LOST: there was one.
  absl::StatusOr<Session*> Find(const std::string& owner, const std::string& id);
  Session* Get(const std::string& id);  // null: unknown
  std::vector<Session*> List(const std::string& owner);
  // Sets the time of its last use, and its place in the order.
  void Touch(Session* session, TimePoint when);
  void Erase(const std::string& id) { sessions_.erase(id); }
  // Erases the session and remembers, for a while, that it was there.
  void Lose(const Session& session, const char* why);
  void RememberLost(const std::string& id, const std::string& owner, const char* why);
  void ForgetLost(const std::string& id);
  void Clear() { sessions_.clear(); }
  int64_t size() const { return int64_t(sessions_.size()); }
  int64_t room() const { return max_sessions_ - size(); }
  const std::map<std::string, std::unique_ptr<Session>>& all() const { return sessions_; }
  SessionInfo Describe(const Session& session) const;

 private:
  struct Lost {
    std::string owner;
    const char* why;
  };

  const Clock* const clock_;
  const int64_t max_sessions_;
  uint64_t uses_ = 0;
  std::map<std::string, std::unique_ptr<Session>> sessions_;
  std::map<std::string, Lost> lost_;
  std::deque<std::string> lost_order_;  // the oldest is forgotten first
};

absl::Status NoSuchSession();
absl::Status LostSession(const char* why);

}  // namespace entropyserve
