// Session files that are found, read back or removed.
#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "engine/sessions/session_tiers.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

constexpr double kRetrySeconds = 1.0;
constexpr char kDamaged[] = "its file was damaged";
constexpr char kGone[] = "its file is gone";
constexpr char kDiedWithIt[] = "the server that held it ended before it could be written";
constexpr char kOtherModel[] = "it was made with another model, type or version of the server";

absl::Status HeldElsewhere() {
  return WithReason(
      absl::FailedPreconditionError("session_id: another server that uses the same --session-dir "
                                    "holds this session; ask that one, or wait until it lets go"),
      kSessionBusy);
}

absl::Status CannotRead(const absl::Status& status) {
  return WithRetryAfter(
      absl::UnavailableError(absl::StrCat("session_id: ", std::string(status.message()))),
      kRetrySeconds);
}

}  // namespace

void SessionTiers::AddFiles() {
  std::vector<SessionHeader> headers = dir_->List();
  AbsorbLost();
  std::erase_if(headers, [&](const SessionHeader& header) { return !Matches(header.record); });
  // The oldest first: the order of last uses. When they are too many, the newest are listed; the
  // others are found when they are asked for.
  std::sort(headers.begin(), headers.end(), [](const SessionHeader& a, const SessionHeader& b) {
    return a.modified_ns < b.modified_ns;
  });
  const int64_t skip = std::max<int64_t>(0, int64_t(headers.size()) - store_->room());
  for (size_t i = size_t(skip); i < headers.size(); ++i) {
    auto session = std::make_unique<Session>();
    Apply(headers[i], session.get());
    Session* const added = store_->Add(std::move(session));
    store_->Touch(added, WhenWritten(headers[i]));
  }
  tally_stale_ = true;
}

void SessionTiers::AbsorbLost() {
  for (const SessionRecord& record : dir_->TakeLost()) {
    store_->RememberLost(record.id, record.owner, kDiedWithIt);
  }
}

bool SessionTiers::Matches(const SessionRecord& record) const {
  const AttentionShape shape = model_->shape();
  return record.model == model_identity_ && record.dtype == model_->dtype() &&
         record.layers == shape.layers && record.kv_heads == shape.kv_heads &&
         record.head_dim == shape.head_dim;
}

// The header's session, on the disk.
void SessionTiers::Apply(const SessionHeader& header, Session* session) {
  const SessionRecord& record = header.record;
  session->id = record.id;
  session->owner = record.owner;
  session->cache = std::make_unique<SequenceCache>(backend_, pool_, model_->shape(), record.cache);
  session->turns = record.turns;
  session->kv_policy = record.kv_policy;
  session->tier = SessionTier::kDisk;
  session->kv_bytes = record.kv_bytes();
  session->file_bytes = header.file_bytes;
  session->file_modified_ns = header.modified_ns;
}

TimePoint SessionTiers::WhenWritten(const SessionHeader& header) const {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto age = std::max(std::chrono::nanoseconds(0),
                            std::chrono::duration_cast<std::chrono::nanoseconds>(now) -
                                std::chrono::nanoseconds(header.modified_ns));
  return clock_->Now() - std::chrono::duration_cast<TimePoint::duration>(age);
}

absl::StatusOr<Session*> SessionTiers::Find(const std::string& owner, const std::string& id) {
  absl::StatusOr<Session*> session = store_->Find(owner, id);
  if (!dir_) return session;
  if (session.ok()) {
    if ((*session)->tier == SessionTier::kDisk && !(*session)->busy) {
      RETURN_IF_ERROR(Refresh(*session));
    }
    return session;
  }
  if (store_->Get(id)) return session;  // somebody else's
  return Adopt(owner, id);
}

// Another server may have used the session since its header was read.
absl::Status SessionTiers::Refresh(Session* session) {
  absl::StatusOr<SessionDir::Found> found = dir_->Find(session->id);
  AbsorbLost();
  if (found.ok()) {
    if (found->elsewhere) return HeldElsewhere();
    const SessionHeader& header = found->header;
    if (!Matches(header.record) || header.record.owner != session->owner) {
      store_->Lose(*session, kOtherModel);
      tally_stale_ = true;
      return LostSession(kOtherModel);
    }
    if (header.modified_ns != session->file_modified_ns ||
        header.file_bytes != session->file_bytes) {
      Apply(header, session);
      tally_stale_ = true;
    }
    return absl::OkStatus();
  }
  if (absl::IsFailedPrecondition(found.status())) return LostSession(kOtherModel);
  const bool damaged = absl::IsDataLoss(found.status());
  if (!damaged && !absl::IsNotFound(found.status())) return CannotRead(found.status());
  const char* const why = damaged ? kDamaged : kGone;
  observer_->OnSessionMove(SessionTier::kDisk, SessionTier::kDisk, SessionMove::kLost);
  store_->Lose(*session, why);
  tally_stale_ = true;
  return LostSession(why);
}

// A session that another server has written since this one looked into the folder.
absl::StatusOr<Session*> SessionTiers::Adopt(const std::string& owner, const std::string& id) {
  absl::StatusOr<SessionDir::Found> found = dir_->Find(id);
  AbsorbLost();
  if (!found.ok()) {
    if (absl::IsUnavailable(found.status())) return CannotRead(found.status());
    return store_->Find(owner, id);  // lost, or unknown
  }
  const SessionHeader& header = found->header;
  if (header.record.owner != OwnerDigest(owner)) return NoSuchSession();
  if (!Matches(header.record)) return LostSession(kOtherModel);
  if (found->elsewhere) return HeldElsewhere();
  if (store_->room() <= 0) {
    return WithRetryAfter(absl::ResourceExhaustedError(absl::StrCat(
                              "the server holds ", store_->size(), " sessions, its limit")),
                          kRetrySeconds);
  }
  auto session = std::make_unique<Session>();
  Apply(header, session.get());
  Session* const added = store_->Add(std::move(session));
  store_->Touch(added, WhenWritten(header));
  next_expiry_ = TimePoint{};
  tally_stale_ = true;
  return added;
}

absl::Status SessionTiers::RemoveLost(const std::string& id) {
  if (Session* const session = store_->Get(id)) return Remove(session);  // another layout's file
  if (dir_ && dir_->Find(id).ok()) {                                     // another model's file
    const absl::Status claim = dir_->Claim(id);
    if (absl::IsNotFound(claim)) return HeldElsewhere();
    if (!claim.ok()) return CannotRead(claim);
    dir_->RemoveClaimed(id);
  }
  store_->ForgetLost(id);
  return absl::OkStatus();
}

void SessionTiers::Load(Session* session, std::function<void(absl::Status)> done) {
  Check(session->busy && session->tier == SessionTier::kDisk && !session->pages,
        "only a session in use is read");
  session->loading = true;
  loads_.push_back({session, std::move(done)});
  PumpLoads();
}

void SessionTiers::Bring(Session* session) {
  entering_.push_back({session});
  CopyIn();
}

bool SessionTiers::Arriving(const Session* session) const {
  return std::any_of(entering_.begin(), entering_.end(),
                     [session](const Entering& e) { return e.session == session; });
}

void SessionTiers::CopyIn() {
  const int64_t page_bytes = pool_->page_bytes();
  while (!entering_.empty()) {
    auto& [session, copied] = entering_.front();
    const int64_t pages = TakeStepPages(session->pages->size() - copied);
    if (pages > 0) {
      session->cache->CopyIn(session->pages->data() + copied, copied / page_bytes, pages);
      copied += pages * page_bytes;
    }
    if (copied < session->pages->size()) return;
    Session* const entered = session;
    entering_.pop_front();
    Entered(entered);
  }
}

void SessionTiers::Entered(Session* session) {
  if (session->tier == SessionTier::kDisk) --loaded_;
  observer_->OnSessionMove(session->tier, SessionTier::kDevice, SessionMove::kRestored);
  session->tier = SessionTier::kDevice;
  session->pages.reset();
  tally_stale_ = true;
  PumpLoads();
}

// Its request ended before all of it was copied.
void SessionTiers::GoBack(Session* session) {
  std::erase_if(entering_, [session](const Entering& e) { return e.session == session; });
  session->cache->PageOut();
}

void SessionTiers::PumpLoads() {
  while (reading_ + loaded_ < kMostInTransit && !loads_.empty()) {
    PendingLoad load = std::move(loads_.front());
    loads_.pop_front();
    Session* const session = load.session;
    if (const absl::Status claim = dir_->Claim(session->id); !claim.ok()) {
      absl::StatusOr<SessionDir::Found> found = dir_->Find(session->id);
      AbsorbLost();
      const bool elsewhere = found.ok() && found->elsewhere;
      if (absl::IsNotFound(found.status()) || absl::IsDataLoss(found.status()))
        session->lost = true;
      const absl::Status status = elsewhere       ? HeldElsewhere()
                                  : session->lost ? LostSession(kGone)
                                                  : CannotRead(claim);
      post_([session, done = std::move(load.done), status] {
        session->loading = false;
        done(status);
      });
      continue;
    }
    session->claim = SessionClaim::kWhole;
    ++reading_;
    auto shared = std::make_shared<PendingLoad>(std::move(load));  // std::function copies
    io_->Run([this, shared, path = dir_->ClaimedPath(session->id)] {
      auto stored = std::make_shared<absl::StatusOr<StoredSession>>(ReadSessionFile(path, meter_));
      post_([this, shared, stored] { AfterRead(std::move(*shared), std::move(*stored)); });
    });
  }
}

void SessionTiers::AfterRead(PendingLoad load, absl::StatusOr<StoredSession> stored) {
  --reading_;
  Session* const session = load.session;
  session->loading = false;
  absl::Status status = stored.status();
  if (status.ok()) {
    SessionRecord& record = stored->record;
    const bool right = record.id == session->id && record.owner == session->owner &&
                       Matches(record) && record.cache == session->cache->state() &&
                       int64_t(record.seen.size()) == model_->config().vocab;
    if (right) {
      session->pending = std::move(record.pending);
      session->seen = std::move(record.seen);
      session->turns = record.turns;
      session->pages = std::move(stored->pages);
      ++loaded_;
    } else {
      status = absl::DataLossError(kDamaged);
    }
  }
  if (!status.ok()) status = LoadError(session, status);
  load.done(status);
  PumpLoads();
}

// The session's file is claimed and cannot be used.
absl::Status SessionTiers::LoadError(Session* session, const absl::Status& status) {
  if (absl::IsResourceExhausted(status) || absl::IsUnavailable(status)) {
    PutBack(session);
    return CannotRead(status);
  }
  dir_->RemoveClaimed(session->id);
  session->claim = SessionClaim::kNone;
  session->lost = true;
  return LostSession(kDamaged);
}

// A session whose file was claimed, and perhaps read, and which nobody continued.
void SessionTiers::PutBack(Session* session) {
  if (session->pages) --loaded_;
  session->pages.reset();
  session->pending.clear();
  session->seen = {};
  if (session->claim == SessionClaim::kNone || session->deleted) return;
  session->claim = SessionClaim::kNone;
  if (!dir_->Unclaim(session->id).ok()) session->lost = true;
}

// False: another server has used the session since; it is that one's.
bool SessionTiers::RemoveFile(Session* session) {
  if (!dir_->Claim(session->id).ok()) return false;
  const absl::StatusOr<SessionHeader> header = ReadSessionHeader(dir_->ClaimedPath(session->id));
  if (header.ok() && header->modified_ns != session->file_modified_ns) {
    dir_->Unclaim(session->id).IgnoreError();
    return false;
  }
  dir_->RemoveClaimed(session->id);
  return true;
}

}  // namespace entropyserve
