#include "engine/sessions/session_store.h"

#include <cstdio>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/sessions/session_file.h"

namespace entropyserve {
namespace {

// Ids of lost sessions that are remembered, so that their owners hear SESSION_LOST.
constexpr size_t kMostLost = 10000;

std::string RandomId() {
  std::random_device random;  // the system's generator: ids must not be guessable
  char id[33];
  std::snprintf(id, sizeof(id), "%08x%08x%08x%08x", random(), random(), random(), random());
  return id;
}

}  // namespace

absl::Status NoSuchSession() {
  return absl::NotFoundError("session_id: no such session; CreateSession makes one");
}

absl::Status LostSession(const char* why) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        "session_id: the session is lost: ", why, "; start another one")),
                    kSessionLost);
}

absl::StatusOr<Session*> SessionStore::Create(const std::string& owner,
                                              std::unique_ptr<SequenceCache> cache) {
  if (size() >= max_sessions_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the server holds ", size(), " sessions, its limit; delete some"));
  }
  auto session = std::make_unique<Session>();
  session->id = RandomId();
  session->owner = OwnerDigest(owner);
  session->cache = std::move(cache);
  return Add(std::move(session));
}

Session* SessionStore::Add(std::unique_ptr<Session> session) {
  Session* const raw = session.get();
  Touch(raw, clock_->Now());
  sessions_[raw->id] = std::move(session);
  return raw;
}

void SessionStore::Touch(Session* session, TimePoint when) {
  session->last_used = when;
  session->last_use = ++uses_;
}

absl::StatusOr<Session*> SessionStore::Find(const std::string& owner, const std::string& id) {
  const std::string digest = OwnerDigest(owner);
  const auto it = sessions_.find(id);
  if (it != sessions_.end() && it->second->owner == digest && !it->second->deleted) {
    return it->second.get();
  }
  const auto lost = lost_.find(id);
  if (it == sessions_.end() && lost != lost_.end() && lost->second.owner == digest) {
    return LostSession(lost->second.why);
  }
  return NoSuchSession();
}

Session* SessionStore::Get(const std::string& id) {
  const auto it = sessions_.find(id);
  return it == sessions_.end() ? nullptr : it->second.get();
}

std::vector<Session*> SessionStore::List(const std::string& owner) {
  const std::string digest = OwnerDigest(owner);
  std::vector<Session*> sessions;
  for (auto& [id, session] : sessions_) {
    if (session->owner == digest && !session->deleted) sessions.push_back(session.get());
  }
  return sessions;
}

void SessionStore::Lose(const Session& session, const char* why) {
  RememberLost(session.id, session.owner, why);
  Erase(std::string(session.id));
}

void SessionStore::RememberLost(const std::string& id, const std::string& owner, const char* why) {
  if (!lost_.emplace(id, Lost{owner, why}).second) return;
  lost_order_.push_back(id);
  if (lost_order_.size() <= kMostLost) return;
  lost_.erase(lost_order_.front());
  lost_order_.pop_front();
}

void SessionStore::ForgetLost(const std::string& id) {
  if (lost_.erase(id) == 1) std::erase(lost_order_, id);
}

SessionInfo SessionStore::Describe(const Session& session) const {
  SessionInfo info;
  info.id = session.id;
  info.positions = session.cache->position();
  info.kv_bytes = session.cache->resident() ? session.cache->kv_bytes() : session.kv_bytes;
  info.kept_tokens = int64_t(session.cache->MeanLength());
  info.turns = session.turns;
  info.busy = session.busy;
  info.idle_seconds = session.busy ? 0 : Seconds(session.last_used, clock_->Now());
  info.kv_policy = session.kv_policy;
  info.tier = session.tier;
  return info;
}

}  // namespace entropyserve
