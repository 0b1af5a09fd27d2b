// The engine's calls about sessions, and what requests in sessions need beyond others.
#include <utility>

#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "engine/engine_impl.h"

namespace entropyserve {

absl::StatusOr<SessionInfo> EngineImpl::CreateSession(const std::string& owner) {
  return Marked(Call<absl::StatusOr<NewSession>>([&]() -> absl::StatusOr<NewSession> {
    RETURN_IF_ERROR(CheckSessionQuota(options_, LoadOf(owner), /*another=*/true));
    ASSIGN_OR_RETURN(Session * session,
                     sessions_.Create(owner, std::make_unique<SequenceCache>(
                                                 backend_.get(), pool_.get(), model_->shape())));
    session->seen.assign(model_->config().vocab, false);
    tiers_.Added();
    PublishStats();
    return NewSession{sessions_.Describe(*session), tiers_.MarkerOf(*session)};
  }));
}

// On the caller's thread, so that steps do not wait for a disk. Without its marker the session
// works, but a kill leaves no trace of it.
absl::StatusOr<SessionInfo> EngineImpl::Marked(absl::StatusOr<NewSession> made) {
  RETURN_IF_ERROR(made.status());
  if (const std::optional<SessionMarker>& marker = made->marker) {
    const bool written = WriteSessionMarker(marker->path, marker->record).ok();
    Post([this, id = made->info.id, written] { tiers_.Marked(id, written); });
  }
  return std::move(made->info);
}

absl::StatusOr<SessionInfo> EngineImpl::GetSession(const std::string& owner,
                                                   const std::string& id) {
  return Call<absl::StatusOr<SessionInfo>>([&]() -> absl::StatusOr<SessionInfo> {
    ASSIGN_OR_RETURN(Session * session, tiers_.Find(owner, id));
    return sessions_.Describe(*session);
  });
}

std::vector<SessionInfo> EngineImpl::ListSessions(const std::string& owner) {
  return Call<std::vector<SessionInfo>>([&] {
    std::vector<SessionInfo> infos;
    for (const Session* session : sessions_.List(owner))
      infos.push_back(sessions_.Describe(*session));
    return infos;
  });
}

absl::StatusOr<SessionInfo> EngineImpl::ForkSession(const std::string& owner,
                                                    const std::string& id) {
  using Made = absl::StatusOr<NewSession>;
  return Marked(CallLater<Made>([this, owner, id](std::function<void(Made)> done) {
    absl::StatusOr<Session*> session = FindIdle(owner, id);
    if (absl::Status quota = CheckSessionQuota(options_, LoadOf(owner), /*another=*/true);
        session.ok() && !quota.ok()) {
      session = quota;
    }
    if (!session.ok()) {
      done(session.status());
      return;
    }
    Session* const source = *session;
    tiers_.Use(source);
    if (source->tier != SessionTier::kDisk) {
      done(ForkIdle(owner, source));
      return;
    }
    tiers_.Load(source, [this, owner, source, done = std::move(done)](absl::Status loaded) {
      if (loaded.ok()) {
        done(ForkIdle(owner, source));
      } else {
        tiers_.Settle(source);
        done(loaded);
      }
    });
  }));
}

// Of a session in use; it is idle afterwards.
absl::StatusOr<EngineImpl::NewSession> EngineImpl::ForkIdle(const std::string& owner,
                                                            Session* source) {
  absl::StatusOr<Session*> fork = source->deleted ? NoSuchSession() : tiers_.Fork(owner, source);
  absl::StatusOr<NewSession> made;
  if (fork.ok()) {
    made = NewSession{sessions_.Describe(**fork), tiers_.MarkerOf(**fork)};
  } else {
    made = fork.status();
  }
  tiers_.Settle(source);
  PublishStats();
  return made;
}

absl::Status EngineImpl::DeleteSession(const std::string& owner, const std::string& id) {
  return Call<absl::Status>([&]() -> absl::Status {
    const absl::StatusOr<Session*> found = tiers_.Find(owner, id);
    const bool lost = Reason(found.status()) == kSessionLost;
    if (!lost) RETURN_IF_ERROR(found.status());
    if (lost) {
      RETURN_IF_ERROR(tiers_.RemoveLost(id));
    } else if ((*found)->busy) {
      (*found)->deleted = true;
      for (auto& [request, sequence] : sequences_) {
        if (sequence->session != *found) continue;
        Finish(sequence.get(), FinishReason::kCancelled,
               absl::CancelledError("the session was deleted"));
        break;
      }
    } else {
      RETURN_IF_ERROR(tiers_.Remove(*found));
    }
    PublishStats();
    return absl::OkStatus();
  });
}

// An owner's sessions, for its quotas.
SessionLoad EngineImpl::LoadOf(const std::string& owner) {
  SessionLoad load;
  if (options_.max_owner_sessions == 0 && options_.max_owner_session_bytes == 0) return load;
  for (const Session* session : sessions_.List(owner)) {
    ++load.sessions;
    load.bytes += sessions_.Describe(*session).kv_bytes;
  }
  return load;
}

absl::StatusOr<Session*> EngineImpl::FindIdle(const std::string& owner, const std::string& id) {
  ASSIGN_OR_RETURN(Session * session, tiers_.Find(owner, id));
  if (!session->busy) return session;
  return WithReason(
      absl::FailedPreconditionError("session_id: a request is running in this session"),
      kSessionBusy);
}

// Finds the request's session and takes it; begins to read it when it is in a file.
absl::Status EngineImpl::UseSession(Sequence* s) {
  const EngineRequest& r = s->request;
  ASSIGN_OR_RETURN(Session * session, FindIdle(r.owner, r.session_id));
  const bool empty = session->cache->position() == 0;
  if (r.first_turn.value_or(empty) != empty) {
    return WithReason(absl::FailedPreconditionError(
                          "session_id: another request began or cancelled this session's first "
                          "turn while this one was tokenized; send it again"),
                      kSessionBusy);
  }
  if (r.prefill.params.whole_prompt && !r.prefill.params.full && !empty) {
    return absl::InvalidArgumentError(
        absl::StrCat("policy.prefill: ", r.prefill.name, " works in a session's first turn only"));
  }
  RETURN_IF_ERROR(CheckSessionQuota(options_, LoadOf(r.owner), /*another=*/false));
  tiers_.Use(session);
  s->session = session;
  if (session->tier != SessionTier::kDisk) return absl::OkStatus();
  s->loading = true;
  tiers_.Load(session,
              [this, id = s->id, session](absl::Status loaded) { AfterLoad(id, session, loaded); });
  return absl::OkStatus();
}

void EngineImpl::AfterLoad(RequestId id, Session* session, const absl::Status& loaded) {
  const auto found = sequences_.find(id);
  if (found == sequences_.end()) {  // cancelled meanwhile
    tiers_.Settle(session);
    return;
  }
  Sequence* const s = found->second.get();
  s->loading = false;
  if (loaded.ok()) {
    Start(s);
  } else {
    Finish(s, FinishReason::kError, loaded);
  }
}

// A session's tokens that are not in the pool need pages too.
int64_t EngineImpl::PagesToStart(const Sequence& s) const {
  const int64_t turn = s.cache->WorstCasePages(s.plan);
  return s.cache->resident() ? turn : turn + s.cache->state().pages();
}

// Idle sessions move out of the way of the request that comes next; they are dropped for it only
// where nothing that runs will give its memory back.
void EngineImpl::MakeRoomForWaiting() {
  const SchedulerRequest* const next = scheduler_.NextToAdmit();
  if (next) tiers_.MakeRoom(next->pages, /*may_drop=*/scheduler_.running() == 0 && !compare_);
}

void EngineImpl::FlushSessions() {
  Call<bool>([this] {
    WriteSessions();
    PublishStats();
    return true;
  });
}

void EngineImpl::WriteSessions() {
  while (tiers_.moving()) {
    tiers_.Advance(0);
    tiers_.WaitForIo();
    RunTasks();
  }
  tiers_.WriteAll();
}

}  // namespace entropyserve
