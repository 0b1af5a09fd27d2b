#include "engine/session_store.h"

#include <cstdio>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"

namespace entropyserve {
namespace {

std::string RandomId() {
  std::random_device random;  // the system's generator: ids must not be guessable
  char id[33];
  std::snprintf(id, sizeof(id), "%08x%08x%08x%08x", random(), random(), random(), random());
  return id;
}

}  // namespace

absl::StatusOr<Session*> SessionStore::Create(const std::string& owner,
                                              std::unique_ptr<SequenceCache> cache) {
  if (size() >= max_sessions_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the server holds ", size(), " sessions, its limit; delete some"));
  }
  auto session = std::make_unique<Session>();
  session->id = RandomId();
  session->owner = owner;
  session->cache = std::move(cache);
  session->last_used = clock_->Now();
  Session* const raw = session.get();
  sessions_[raw->id] = std::move(session);
  return raw;
}

absl::StatusOr<Session*> SessionStore::Find(const std::string& owner, const std::string& id) {
  const auto it = sessions_.find(id);
  if (it == sessions_.end() || it->second->owner != owner || it->second->deleted) {
    return absl::NotFoundError(
        absl::StrCat("session_id: no such session; CreateSession makes one"));
  }
  return it->second.get();
}

std::vector<Session*> SessionStore::List(const std::string& owner) {
  std::vector<Session*> sessions;
  for (auto& [id, session] : sessions_) {
    if (session->owner == owner && !session->deleted) sessions.push_back(session.get());
  }
  return sessions;
}

int64_t SessionStore::positions() const {
  int64_t positions = 0;
  for (const auto& [id, session] : sessions_) positions += session->cache->position();
  return positions;
}

SessionInfo SessionStore::Describe(const Session& session) const {
  SessionInfo info;
  info.id = session.id;
  info.positions = session.cache->position();
  info.kv_bytes = session.cache->kv_bytes();
  info.kept_tokens = int64_t(session.cache->MeanLength());
  info.turns = session.turns;
  info.busy = session.busy;
  info.idle_seconds = session.busy ? 0 : Seconds(session.last_used, clock_->Now());
  info.kv_policy = session.kv_policy;
  return info;
}

}  // namespace entropyserve
