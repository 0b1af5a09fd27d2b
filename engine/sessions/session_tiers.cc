#include "engine/sessions/session_tiers.h"

#include <unistd.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

constexpr double kRetrySeconds = 1.0;  // when what is moving has moved
constexpr char kNoTier[] = "no memory or file was left for it";
constexpr char kIdleTooLong[] = "it was idle for longer than the server keeps sessions";

}  // namespace

SessionTiers::SessionTiers(Parts parts)
    : options_(*parts.options),
      clock_(parts.clock),
      backend_(parts.backend),
      pool_(parts.pool),
      model_(parts.model),
      model_identity_(std::move(parts.model_identity)),
      observer_(parts.observer),
      store_(parts.store),
      dir_(std::move(parts.dir)),
      post_(std::move(parts.post)),
      step_bytes_left_(options_.session_step_bytes) {
  if (!dir_) return;
  io_ = std::make_unique<SessionIo>(parts.inline_io);
  AddFiles();
}

// ---- Requests

void SessionTiers::Use(Session* session) {
  session->busy = true;
  session->writing = 0;  // what is being written will be thrown away
  Stay(session);
  tally_stale_ = true;
}

void SessionTiers::Changed(Session* session) {
  if (session->claim != SessionClaim::kWhole) return;
  dir_->MakeMarker(session->id);
  session->claim = SessionClaim::kMarker;
}

std::optional<SessionMarker> SessionTiers::MarkerOf(const Session& session) const {
  if (!dir_) return std::nullopt;
  return SessionMarker{dir_->ClaimedPath(session.id), Record(session)};
}

void SessionTiers::Marked(const std::string& id, bool written) {
  Session* const session = store_->Get(id);
  if (session && session->claim != SessionClaim::kNone) return;
  if (session && session->tier != SessionTier::kDisk && written) {
    session->claim = SessionClaim::kMarker;
  } else {
    dir_->RemoveClaimed(id);  // deleted, or a file of its own, meanwhile
  }
}

void SessionTiers::Settle(Session* session) {
  Check(session->busy && !session->loading, "a session that nobody used, or that is being read");
  session->busy = false;
  store_->Touch(session, clock_->Now());
  tally_stale_ = true;
  if (Arriving(session)) GoBack(session);
  if (session->tier == SessionTier::kDevice) session->kv_bytes = session->cache->kv_bytes();
  if (session->tier == SessionTier::kDisk && session->pages) PutBack(session);
  if (session->deleted) {
    if (session->lost) {
      store_->Erase(std::string(session->id));
    } else {
      Remove(session).IgnoreError();  // in use here, so nobody else has it
    }
  } else if (session->lost) {
    Drop(session, SessionMove::kLost, "its file was damaged");
  }
  EnforceLimits();
  PumpLoads();
}

absl::Status SessionTiers::Remove(Session* session) {
  Stay(session);
  if (session->tier == SessionTier::kDisk && session->claim == SessionClaim::kNone) {
    if (const absl::Status claim = dir_->Claim(session->id); !claim.ok()) {
      return WithReason(absl::FailedPreconditionError(
                            "session_id: another server has just begun to use this session"),
                        kSessionBusy);
    }
    session->claim = SessionClaim::kWhole;
  }
  if (session->claim != SessionClaim::kNone) dir_->RemoveClaimed(session->id);
  observer_->OnSessionMove(session->tier, session->tier, SessionMove::kDeleted);
  store_->Erase(std::string(session->id));
  tally_stale_ = true;
  return absl::OkStatus();
}

absl::StatusOr<Session*> SessionTiers::Fork(const std::string& owner, Session* session) {
  Check(session->busy, "a fork's source is in use while it is copied");
  store_->Touch(session, clock_->Now());
  const bool resident = session->cache->resident();
  if (!resident) {
    const Result room = HostRoom(session->kv_bytes, /*may_drop=*/false);
    const bool by_file =
        room != Result::kDone && dir_ && DiskRoom(*session, SessionFileBytes(Record(*session)));
    if (room != Result::kDone && !by_file) {
      return WithRetryAfter(
          absl::ResourceExhaustedError("there is no room for a copy of the session now"),
          kRetrySeconds);
    }
  }
  ASSIGN_OR_RETURN(Session * fork, store_->Create(owner, session->cache->Fork()));
  fork->pending = session->pending;
  fork->seen = session->seen;
  fork->turns = session->turns;
  fork->kv_policy = session->kv_policy;
  fork->kv_bytes = session->kv_bytes;
  if (!resident) {
    fork->tier = SessionTier::kHost;
    fork->pages = session->pages;
  }
  tally_stale_ = true;
  return fork;
}

// ---- Moving down

const SessionTiers::Tally& SessionTiers::tally() {
  if (!tally_stale_) return tally_;
  tally_ = {};
  for (const auto& [id, session] : store_->all()) {
    const int tier = int(session->tier);
    ++tally_.sessions[tier];
    tally_.bytes[tier] +=
        session->tier == SessionTier::kDisk ? session->file_bytes : session->kv_bytes;
    if (session->tier == SessionTier::kDevice && !session->busy)
      tally_.idle_device += session->kv_bytes;
    if (session->cache->resident() && !session->busy)
      tally_.idle_positions += session->cache->position();
    if (session->tier == SessionTier::kHost && session->writing == 0)
      tally_.settled_host += session->kv_bytes;
  }
  tally_stale_ = false;
  return tally_;
}

// Of the idle sessions that can move out of `tier`; empty ones stay in the pool, where they cost
// nothing. Null: none.
Session* SessionTiers::Oldest(SessionTier tier) {
  Session* oldest = nullptr;
  for (const auto& [id, session] : store_->all()) {
    if (session->tier != tier || session->busy || session->writing != 0) continue;
    if (tier == SessionTier::kDevice && session->kv_bytes == 0) continue;
    if (!oldest || session->last_use < oldest->last_use) oldest = session.get();
  }
  return oldest;
}

// Pages that would be free if no idle session held any.
int64_t SessionTiers::FreeablePages() const {
  std::vector<int32_t> held(size_t(pool_->total()), 0);
  int64_t freeable = 0;
  for (const auto& [id, session] : store_->all()) {
    if (session->tier != SessionTier::kDevice || session->busy) continue;
    session->cache->ForEachPage([&](int32_t page) {
      // A page is free when the last of those who share it lets go.
      if (++held[page] == pool_->References(page)) ++freeable;
    });
  }
  return freeable;
}

void SessionTiers::MakeRoom(int64_t pages, bool may_drop) {
  if (pool_->available() >= pages) return;
  // Where the operator gave sessions other places, those are full for a reason.
  may_drop = may_drop || dir_ || options_.session_host_bytes > 0;
  if (pool_->available() + FreeablePages() < pages) return;
  while (pool_->available() < pages) {
    Session* const session = Oldest(SessionTier::kDevice);
    if (!session || MoveDown(session, SessionMove::kPressure, may_drop) != Result::kDone) return;
  }
}

void SessionTiers::EnforceLimits() {
  constexpr bool kMayDrop = true;
  while (options_.session_device_bytes > 0 && tally().idle_device > options_.session_device_bytes) {
    Session* const session = Oldest(SessionTier::kDevice);
    if (!session || MoveDown(session, SessionMove::kLimit, kMayDrop) != Result::kDone) break;
  }
  while (tally().settled_host > options_.session_host_bytes) {
    Session* const session = Oldest(SessionTier::kHost);
    if (!session || MoveToDisk(session, kMayDrop) != Result::kDone) break;
  }
}

SessionTiers::Result SessionTiers::MoveDown(Session* session, SessionMove why, bool may_drop) {
  if (leaving_.session) return CopyMore();
  const Result host = HostRoom(session->kv_bytes, may_drop);
  const bool to_disk =
      host != Result::kDone && dir_ && DiskRoom(*session, SessionFileBytes(Record(*session)));
  if (host != Result::kDone) {
    if (to_disk && writing_ >= kMostInTransit) return Result::kLater;
    if (!to_disk && host == Result::kLater) return host;
  }
  std::shared_ptr<HostBuffer> pages;
  if (host == Result::kDone || to_disk) pages = HostBuffer::Create(session->kv_bytes, meter_);
  if (!pages) {
    if (!may_drop) return Result::kNo;
    Drop(session, SessionMove::kLost, kNoTier);
    return Result::kDone;
  }
  leaving_ = {.session = session, .pages = std::move(pages), .why = why, .to_disk = to_disk};
  return CopyMore();
}

// How many of the pages in `left` bytes this step may still copy: at least one, unless it has
// copied all it may.
int64_t SessionTiers::TakeStepPages(int64_t left) {
  if (step_bytes_left_ <= 0) return 0;
  const int64_t page_bytes = pool_->page_bytes();
  const int64_t pages =
      std::min(left / page_bytes, std::max<int64_t>(1, step_bytes_left_ / page_bytes));
  step_bytes_left_ -= pages * page_bytes;
  return pages;
}

SessionTiers::Result SessionTiers::CopyMore() {
  const int64_t page_bytes = pool_->page_bytes();
  const int64_t pages = TakeStepPages(leaving_.pages->size() - leaving_.copied);
  if (pages > 0) {
    leaving_.session->cache->CopyOut(leaving_.pages->data() + leaving_.copied,
                                     leaving_.copied / page_bytes, pages);
    leaving_.copied += pages * page_bytes;
  }
  if (leaving_.copied < leaving_.pages->size()) return Result::kLater;
  const Leaving left_pool = std::exchange(leaving_, {});
  Session* const session = left_pool.session;
  session->cache->PageOut();
  session->pages = left_pool.pages;
  session->tier = SessionTier::kHost;
  tally_stale_ = true;
  observer_->OnSessionMove(SessionTier::kDevice, SessionTier::kHost, left_pool.why);
  if (left_pool.to_disk) MoveToDisk(session, /*may_drop=*/true);
  return Result::kDone;
}

void SessionTiers::Advance(int64_t rows) {
  // A step of a prefill takes as long as many that decode, and what it delays is as much less.
  constexpr int64_t kRowsPerShare = 128;
  step_bytes_left_ = options_.session_step_bytes * (1 + rows / kRowsPerShare);
  CopyIn();  // somebody waits for these
  if (leaving_.session && CopyMore() == Result::kDone) EnforceLimits();
}

// It does not leave the pool after all.
void SessionTiers::Stay(const Session* session) {
  if (leaving_.session == session) leaving_ = {};
}

// Whether host memory can take `bytes` more; others may have to leave it first.
SessionTiers::Result SessionTiers::HostRoom(int64_t bytes, bool may_drop) {
  if (bytes > options_.session_host_bytes) return Result::kNo;
  if (leaving_.session && !leaving_.to_disk) bytes += leaving_.pages->size();
  while (tally().settled_host + bytes > options_.session_host_bytes) {
    Session* const session = Oldest(SessionTier::kHost);
    if (!session) return Result::kNo;
    const Result result = MoveToDisk(session, may_drop);
    if (result != Result::kDone) return result;
  }
  return Result::kDone;
}

// From host memory.
SessionTiers::Result SessionTiers::MoveToDisk(Session* session, bool may_drop) {
  if (dir_ && DiskRoom(*session, SessionFileBytes(Record(*session)))) {
    if (writing_ >= kMostInTransit) return Result::kLater;
    StartWrite(session);
    return Result::kDone;
  }
  if (!may_drop) return Result::kNo;
  Drop(session, SessionMove::kLost, kNoTier);
  return Result::kDone;
}

// Whether the folder may take `bytes` more; sessions that were used before this one make room.
bool SessionTiers::DiskRoom(const Session& session, int64_t bytes) {
  if (options_.session_dir_bytes == 0) return true;
  if (bytes > options_.session_dir_bytes) return false;
  while (tally().bytes[int(SessionTier::kDisk)] + writing_bytes_ + bytes >
         options_.session_dir_bytes) {
    Session* const oldest = Oldest(SessionTier::kDisk);
    if (!oldest || oldest->last_use > session.last_use) return false;
    Drop(oldest, SessionMove::kLost, kNoTier);
  }
  return true;
}

void SessionTiers::StartWrite(Session* session) {
  SessionRecord record = Record(*session);
  const int64_t bytes = SessionFileBytes(record);
  const uint64_t number = session->writing = ++writes_;
  ++writing_;
  writing_bytes_ += bytes;
  tally_stale_ = true;
  io_->Run([this, record = std::move(record), pages = session->pages, bytes, number,
            temporary = dir_->NewTemporaryPath(session->id)]() mutable {
    const absl::Status written =
        WriteSessionFile(temporary, record, {pages->data(), size_t(pages->size())});
    pages.reset();
    post_([this, id = std::move(record.id), number, temporary, bytes, written] {
      AfterWrite(id, number, temporary, bytes, written);
    });
  });
}

void SessionTiers::AfterWrite(const std::string& id, uint64_t number, const std::string& temporary,
                              int64_t bytes, const absl::Status& written) {
  --writing_;
  writing_bytes_ -= bytes;
  tally_stale_ = true;
  Session* const session = store_->Get(id);
  if (!session || session->writing != number) {
    if (written.ok()) unlink(temporary.c_str());  // used or deleted meanwhile
  } else {
    session->writing = 0;
    if (written.ok() && BecomeFile(session, temporary)) {
      observer_->OnSessionMove(SessionTier::kHost, SessionTier::kDisk, SessionMove::kLimit);
      io_->Run([path = dir_->path()] { SessionDir::SyncNames(path); });
    } else {
      Drop(session, SessionMove::kLost, "its file could not be written");
    }
  }
  PumpLoads();
  EnforceLimits();
}

// The file is whole: from now on it is the session.
bool SessionTiers::BecomeFile(Session* session, const std::string& temporary) {
  const absl::StatusOr<SessionHeader> header = ReadSessionHeader(temporary);
  if (!header.ok() || !dir_->Publish(temporary, session->id).ok()) return false;
  if (session->cache->resident()) session->cache->PageOut();
  session->claim = SessionClaim::kNone;
  session->tier = SessionTier::kDisk;
  session->pages.reset();
  session->pending.clear();
  session->seen = {};
  session->file_bytes = header->file_bytes;
  session->file_modified_ns = header->modified_ns;
  tally_stale_ = true;
  return true;
}

// An idle session that nobody asked to delete.
void SessionTiers::Drop(Session* session, SessionMove move, const char* why) {
  Stay(session);
  tally_stale_ = true;
  if (session->tier == SessionTier::kDisk && !session->lost && !RemoveFile(session)) {
    store_->Erase(std::string(session->id));  // another server's now
    return;
  }
  if (session->tier != SessionTier::kDisk && session->claim != SessionClaim::kNone)
    dir_->RemoveClaimed(session->id);
  observer_->OnSessionMove(session->tier, session->tier, move);
  store_->Lose(*session, why);
}

void SessionTiers::Expire() {
  if (options_.session_ttl_seconds <= 0) return;
  const TimePoint now = clock_->Now();
  if (now < next_expiry_) return;
  const auto ttl = std::chrono::duration_cast<TimePoint::duration>(
      std::chrono::duration<double>(options_.session_ttl_seconds));
  std::vector<Session*> expired;
  next_expiry_ = now + ttl;  // of a session that is used from now on
  for (const auto& [id, session] : store_->all()) {
    if (session->busy) continue;
    if (session->last_used + ttl <= now) {
      expired.push_back(session.get());
    } else {
      next_expiry_ = std::min(next_expiry_, session->last_used + ttl);
    }
  }
  for (Session* session : expired) Drop(session, SessionMove::kExpired, kIdleTooLong);
}

double SessionTiers::SecondsToExpiry() const {
  if (options_.session_ttl_seconds <= 0 || store_->size() == 0) return -1;
  return std::max(0.0, Seconds(clock_->Now(), next_expiry_));
}

void SessionTiers::WriteAll() {
  if (!dir_) return;
  leaving_ = {};
  std::vector<Session*> idle;
  for (const auto& [id, session] : store_->all()) {
    if (!session->busy && session->tier != SessionTier::kDisk) idle.push_back(session.get());
  }
  std::sort(idle.begin(), idle.end(),
            [](const Session* a, const Session* b) { return a->last_use > b->last_use; });
  for (Session* session : idle) {
    session->writing = 0;
    SessionRecord record = Record(*session);
    std::shared_ptr<HostBuffer> pages = session->pages;
    if (!pages) {
      pages = HostBuffer::Create(record.kv_bytes(), meter_);
      if (pages) session->cache->CopyOut(pages->data(), 0, record.cache.pages());
    }
    const std::string temporary = dir_->NewTemporaryPath(session->id);
    const bool written =
        pages && DiskRoom(*session, SessionFileBytes(record)) &&
        WriteSessionFile(temporary, record, {pages->data(), size_t(pages->size())}).ok() &&
        BecomeFile(session, temporary);
    if (!written) Drop(session, SessionMove::kLost, kNoTier);
  }
  SessionDir::SyncNames(dir_->path());
}

SessionRecord SessionTiers::Record(const Session& session) const {
  const AttentionShape shape = model_->shape();
  return {.model = model_identity_,
          .id = session.id,
          .owner = session.owner,
          .kv_policy = session.kv_policy,
          .dtype = model_->dtype(),
          .layers = shape.layers,
          .kv_heads = shape.kv_heads,
          .head_dim = shape.head_dim,
          .cache = session.cache->state(),
          .turns = session.turns,
          .pending = session.pending,
          .seen = session.seen};
}

void SessionTiers::FillStats(EngineStats* stats) {
  const Tally& t = tally();
  stats->sessions = store_->size();
  for (int tier = 0; tier < kSessionTiers; ++tier) {
    stats->tier_sessions[tier] = t.sessions[tier];
    stats->tier_bytes[tier] = t.bytes[tier];
  }
  stats->memory.push_back({"session_host", meter_->load()});
}

}  // namespace entropyserve
