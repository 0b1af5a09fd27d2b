// Where idle sessions live: in pages of the pool, in host memory, in files. The session that was
// used longest ago moves down first; what no tier can take is dropped, and its owner is told that
// it is lost. A session is brought back when a request in it is admitted. Busy sessions never move.
//
// Host memory holds what its limit allows and, beyond that, one session that is copied out, at most
// kMostInTransit on their way to files, and as many that were read back and wait for pages. Copies
// between pool and host are made on the engine thread, so many bytes a step; files are
// written and read on an I/O thread, whose results come back through `post`.
#pragma once

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/model/model.h"
#include "engine/sessions/session_dir.h"
#include "engine/sessions/session_io.h"
#include "engine/sessions/session_store.h"

namespace entropyserve {

// A small file that is written when a session is made: a server that starts where another was
// killed knows from it that the session is lost, not unknown.
struct SessionMarker {
  std::string path;
  SessionRecord record;
};

// Owned by the engine thread; not thread-safe.
class SessionTiers {
 public:
  struct Parts {
    const EngineOptions* options = nullptr;
    const Clock* clock = nullptr;
    Backend* backend = nullptr;
    PagePool* pool = nullptr;
    const Model* model = nullptr;
    std::string model_identity;
    EngineObserver* observer = nullptr;
    SessionStore* store = nullptr;
    std::unique_ptr<SessionDir> dir;  // null: no files
    // Runs a task on the engine thread, later.
    std::function<void(std::function<void()>)> post;
    bool inline_io = false;  // for tests: no I/O thread, files are read and written at once
  };
  explicit SessionTiers(Parts parts);  // adds the files that are there to the store

  // NOT_FOUND, SESSION_LOST: see SessionStore::Find; looks into the folder too. SESSION_BUSY:
  // another server on the same folder has it. UNAVAILABLE, retryable: its file cannot be read now.
  absl::StatusOr<Session*> Find(const std::string& owner, const std::string& id);
  void Added() { tally_stale_ = true; }  // a session, to the store
  // For a session that was just made; whoever writes it says so with Marked. None: no folder.
  std::optional<SessionMarker> MarkerOf(const Session& session) const;
  void Marked(const std::string& id, bool written);
  // An idle session, and its file. SESSION_BUSY: another server took it just now.
  absl::Status Remove(Session* session);
  // A session that Find has just called lost, and its file if there still is one: it is unknown
  // afterwards. SESSION_BUSY, UNAVAILABLE: as for Find.
  absl::Status RemoveLost(const std::string& id);

  // ---- A request in a session: Use, Load if it is on the disk, Bring when it is admitted, Changed
  // when its turn is kept, Settle at the end in any case.
  void Use(Session* session);
  // Reads the file of a session in use, then calls `done` on the engine thread. Not OK:
  // SESSION_LOST or SESSION_BUSY as for Find; RESOURCE_EXHAUSTED, UNAVAILABLE, both retryable.
  void Load(Session* session, std::function<void(absl::Status)> done);
  // Copies its tokens into the pages that its cache has taken: now what this step may still copy,
  // the rest in the next steps. The turn runs when it is no longer Arriving.
  void Bring(Session* session);
  bool Arriving(const Session* session) const;
  void Changed(Session* session);
  void Settle(Session* session);

  // A copy of a session in use between turns, which Load has read if it was on the disk; call
  // EnforceLimits afterwards. RESOURCE_EXHAUSTED: too many sessions, or no room
  // (retryable).
  absl::StatusOr<Session*> Fork(const std::string& owner, Session* session);

  // At the beginning of a step: sessions that are entering or leaving the pool go on.
  // `rows`: of the step before; the larger the steps, the more is copied between them.
  void Advance(int64_t rows);
  bool copying() const { return leaving_.session || !entering_.empty(); }  // the next step goes on
  // Moves idle sessions out of the pool if that can make `pages` available.
  void MakeRoom(int64_t pages, bool may_drop);
  // What does not fit now may fit when what is on its way has arrived.
  bool moving() const { return writing_ + reading_ > 0 || leaving_.session; }
  void EnforceLimits();
  void Expire();
  // Seconds until a session may expire; negative: none will.
  double SecondsToExpiry() const;

  // Waits for the I/O thread: what it has done is posted.
  void WaitForIo() {
    if (io_) io_->WaitIdle();
  }
  // Writes every idle session into the folder; nothing may be in transit.
  void WriteAll();

  void FillStats(EngineStats* stats);
  int64_t idle_positions() { return tally().idle_positions; }

 private:
  static constexpr int kMostInTransit = 2;  // one is copied while another is written or read

  enum class Result {
    kDone,
    kLater,  // too much is in transit
    kNo,     // no tier can take it, and it may not be dropped
  };
  // An idle session on its way from the pool to host memory. It is in the pool until all of it is
  // copied: when it is used or dropped meanwhile, the copy is thrown away.
  struct Leaving {
    Session* session = nullptr;  // null: none
    std::shared_ptr<HostBuffer> pages;
    int64_t copied = 0;  // bytes
    SessionMove why = SessionMove::kLimit;
    bool to_disk = false;
  };
  // A session in use on its way into pages. Until all is copied its tier is what it was, and it
  // can go back there.
  struct Entering {
    Session* session = nullptr;
    int64_t copied = 0;  // bytes
  };
  struct PendingLoad {
    Session* session;
    std::function<void(absl::Status)> done;
  };
  struct Tally {
    int64_t sessions[kSessionTiers] = {}, bytes[kSessionTiers] = {};
    int64_t idle_device = 0;     // bytes
    int64_t idle_positions = 0;  // that idle sessions in the pool hold; forks count in full
    int64_t settled_host = 0;    // bytes that are not on their way to a file
  };

  // session_tiers.cc: moving down, and copies.
  const Tally& tally();
  Session* Oldest(SessionTier tier);
  int64_t FreeablePages() const;
  Result MoveDown(Session* session, SessionMove why, bool may_drop);
  int64_t TakeStepPages(int64_t left);
  Result CopyMore();
  void Stay(const Session* session);
  Result HostRoom(int64_t bytes, bool may_drop);
  Result MoveToDisk(Session* session, bool may_drop);
  bool DiskRoom(const Session& session, int64_t bytes);
  void StartWrite(Session* session);
  void AfterWrite(const std::string& id, uint64_t number, const std::string& temporary,
                  int64_t bytes, const absl::Status& written);
  bool BecomeFile(Session* session, const std::string& temporary);
  void Drop(Session* session, SessionMove move, const char* why);
  SessionRecord Record(const Session& session) const;

  // session_loads.cc: files, and moving up.
  void AddFiles();
  void AbsorbLost();
  absl::Status Refresh(Session* session);
  absl::StatusOr<Session*> Adopt(const std::string& owner, const std::string& id);
  bool Matches(const SessionRecord& record) const;
  void Apply(const SessionHeader& header, Session* session);
  TimePoint WhenWritten(const SessionHeader& header) const;
  void CopyIn();
  void Entered(Session* session);
  void GoBack(Session* session);
  void PumpLoads();
  void AfterRead(PendingLoad load, absl::StatusOr<StoredSession> stored);
  absl::Status LoadError(Session* session, const absl::Status& status);
  void PutBack(Session* session);
  bool RemoveFile(Session* session);

  const EngineOptions& options_;
  const Clock* const clock_;
  Backend* const backend_;
  PagePool* const pool_;
  const Model* const model_;
  const std::string model_identity_;
  EngineObserver* const observer_;
  SessionStore* const store_;
  const std::unique_ptr<SessionDir> dir_;
  const std::function<void(std::function<void()>)> post_;
  const ByteMeter meter_ = std::make_shared<std::atomic<int64_t>>(0);

  Leaving leaving_;
  std::deque<Entering> entering_;  // the first is copied; bounded by the requests that run
  int64_t step_bytes_left_;        // that may be copied before the next step
  int writing_ = 0;                // sessions that the I/O thread writes
  int reading_ = 0;                // and reads
  int loaded_ = 0;                 // that were read and have not started yet
  int64_t writing_bytes_ = 0;      // of files that are being written
  uint64_t writes_ = 0;
  std::deque<PendingLoad> loads_;  // bounded by the requests that wait for them
  bool tally_stale_ = true;
  Tally tally_;
  TimePoint next_expiry_{};        // no session expires before
  std::unique_ptr<SessionIo> io_;  // null: no files
};

}  // namespace entropyserve
