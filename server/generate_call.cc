#include "server/generate_call.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/engine.h"
#include "entropyserve/v1/entropyserve.pb.h"
#include "server/call_owner.h"
#include "server/convert.h"
#include "server/outbox.h"
#include "server/service_core.h"
#include "server/status.h"
#include "server/wire.h"

namespace entropyserve {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Threads: gRPC's (Start, OnWriteDone, OnCancel, OnDone), an encode lane (Encode), the engine's
// (the EventSink part), a drain's (Abort), the core's watchdog (CutOff). gRPC never runs a reaction
// inside StartWrite or Finish, so both are called with mutex_ held; the engine is called without
// it, because its events take mutex_ too.
class GenerateCall final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                           public EventSink,
                           public OpenCall,
                           public std::enable_shared_from_this<GenerateCall> {
 public:
  GenerateCall(ServiceCore* core, grpc::CallbackServerContext* context)
      : core_(core), context_(context), outbox_(core->limits().outbox_bytes) {}

  void Start(const grpc::ByteBuffer& request) {
    {
      MutexLock lock(&mutex_);
      self_ = shared_from_this();
    }
    const absl::Status status = Admit(request);
    if (!status.ok()) End(status);
  }

  // --- gRPC ---

  void OnWriteDone(bool ok) override {
    bool finished = false;
    {
      MutexLock lock(&mutex_);
      write_in_flight_ = false;
      finished = engine_finished_;
      if (ok) Pump();
    }
    if (!ok) return ReaderLeft(absl::CancelledError("the connection was lost"));
    if (finished) core_->ExpectReader(this);
    SyncPause();
  }

  // The caller cancelled, its deadline passed, or the connection broke.
  void OnCancel() override {
    const bool late = context_->deadline() <= std::chrono::system_clock::now();
    ReaderLeft(late ? absl::DeadlineExceededError("the deadline passed")
                    : absl::CancelledError("cancelled by the caller"));
  }

  void OnDone() override {
    core_->Close(this);
    std::shared_ptr<GenerateCall> self;
    {
      MutexLock lock(&mutex_);
      self = std::move(self_);  // freed after the lock; the engine may hold another reference
    }
  }

  // --- A drain ---

  void Abort(const absl::Status& why) override {
    std::optional<RequestId> id;
    Engine* engine = nullptr;
    {
      MutexLock lock(&mutex_);
      if (!cancel_.ok()) return;
      cancel_ = why;
      id = id_;
      engine = engine_;
    }
    if (id.has_value()) engine->Cancel(*id, why);
  }

  void CutOff() override {
    {
      MutexLock lock(&mutex_);
      if (finish_called_) return;
      end_status_ = absl::CancelledError("the answer was not read");
      outbox_.Clear();
      trace_.reset();
      last_event_.reset();
    }
    context_->TryCancel();  // ends the write in flight, and so the call
  }

  // --- The engine ---

  void OnAccepted(const AcceptedEvent& event) override {
    core_->metrics().ObservePromptTokens(event.prompt_tokens);
    accepted_ = true;
    prompt_tokens_ = event.prompt_tokens;
    v1::GenerateEvent proto;
    AcceptedToProto(event, &proto);
    Send(std::move(proto));
  }

  void OnProgress(int64_t prefilled, int64_t total) override {
    v1::GenerateEvent proto;
    proto.mutable_progress()->set_prefilled_tokens(prefilled);
    proto.mutable_progress()->set_total_tokens(total);
    Send(std::move(proto));
  }

  void OnTokens(TokensEvent event) override {
    if (last_tokens_.has_value()) {
      core_->metrics().ObserveInterToken(SecondsSince(*last_tokens_));
    } else {
      core_->metrics().ObserveTimeToFirstToken(SecondsSince(start_), prompt_tokens_);
    }
    last_tokens_ = Clock::now();
    v1::GenerateEvent proto;
    TokensToProto(std::move(event), &proto);
    Send(std::move(proto));
  }

  void OnFinished(FinishedEvent event) override {
    core_->ExpectReader(this);
    v1::GenerateEvent proto;
    FinishedToProto(event, policy_, &proto);
    core_->metrics().ObserveFinished(event.reason, event.receipt);
    MutexLock lock(&mutex_);
    engine_finished_ = true;
    if (finish_called_) {
      core_->log().Info("kept_request_finished",
                        {{"request_id", request_id_},
                         {"code", absl::StatusCodeToString(event.status.code())},
                         {"generated_tokens", event.receipt.generated_tokens}});
      return;
    }
    receipt_ = event.receipt;
    if (end_status_.ok()) end_status_ = event.status;
    if (!event.status.ok() && outbox_.wants_pause()) {
      // A reader that does not read cannot be told: the status would wait behind its unread events
      // for ever.
      outbox_.Clear();
      context_->TryCancel();
    }
    if (event.trace) trace_.emplace(std::move(event.trace));
    // What was refused before it was accepted has a status only: clients try again what has
    // RetryInfo as long as no event has come.
    if (accepted_) last_event_ = std::move(proto);
    Pump();
  }

 private:
  absl::Status Admit(const grpc::ByteBuffer& request) {
    ASSIGN_OR_RETURN(owner_, CallOwner(*context_, core_->authenticator()));
    RETURN_IF_ERROR(core_->CheckAccepting());
    RETURN_IF_ERROR(core_->Open(this, owner_));
    deadline_ = core_->Deadline(context_->deadline());
    request_ = request;
    return core_->lanes().Post(static_cast<int64_t>(request.Length()),
                               [self = shared_from_this()] { self->Encode(); });
  }

  // On an encode lane: parse, tokenize, submit.
  void Encode() {
    if (EndIfCancelled()) return;
    const int64_t bytes = static_cast<int64_t>(request_.Length());
    const absl::Status status = ParseMessage(request_, "GenerateRequest", &proto_);
    request_.Clear();
    if (!status.ok()) return End(status);
    // Already here: readers leave while their prompts are tokenized, too.
    keep_on_disconnect_.store(proto_.keep_on_disconnect());
    // Whether BOS and a system message are due depends on the session; ids are used as they are.
    if (proto_.session_id().empty() || proto_.has_token_ids()) return EncodeAndSubmit({});
    const absl::Status posted =
        core_->lanes().PostSession(bytes, [self = shared_from_this()] { self->EncodeTurn(); });
    if (!posted.ok()) End(posted);
  }

  // On the session lane: the same for a turn of a session.
  void EncodeTurn() {
    if (EndIfCancelled()) return;
    const absl::StatusOr<SessionInfo> session =
        (*core_->Model())->engine->GetSession(owner_, proto_.session_id());
    if (!session.ok()) return End(session.status());
    EncodeAndSubmit(session->positions == 0);
  }

  // Absent `first_turn`: no session, or ids.
  void EncodeAndSubmit(std::optional<bool> first_turn) {
    Engine* const engine = (*core_->Model())->engine.get();  // Admit has checked that it is there
    const absl::StatusOr<RequestId> id = Submit(engine, first_turn);
    absl::Status cancel;
    {
      MutexLock lock(&mutex_);
      if (!id.ok()) {
        EndLocked(id.status());
        return;
      }
      engine_ = engine;
      id_ = *id;
      cancel = cancel_;
    }
    // What happened while the id was not known.
    if (!cancel.ok()) engine->Cancel(*id, cancel);
    SyncPause();
  }

  bool EndIfCancelled() {
    MutexLock lock(&mutex_);
    if (!cancel_.ok()) EndLocked(cancel_);
    return !cancel_.ok();
  }

  absl::Status StillWanted() {
    if (Clock::now() >= deadline_) return absl::DeadlineExceededError("the deadline passed");
    MutexLock lock(&mutex_);
    return cancel_;
  }

  absl::StatusOr<RequestId> Submit(Engine* engine, std::optional<bool> first_turn) {
    absl::StatusOr<EngineRequest> request = MakeRequest(first_turn);
    proto_.Clear();
    if (!request.ok()) return request.status();
    return engine->Submit(*std::move(request), shared_from_this());
  }

  absl::StatusOr<EngineRequest> MakeRequest(std::optional<bool> first_turn) {
    const ServedModel& model = **core_->Model();
    RETURN_IF_ERROR(StillWanted());
    ASSIGN_OR_RETURN(EngineRequest request, RequestFromProto(proto_, model));
    {
      MutexLock lock(&mutex_);  // a call whose reader has left may be ending
      request_id_ = request.request_id;
    }
    PolicyToProto(request.prefill, request.kv, &policy_);
    ASSIGN_OR_RETURN(request.prompt, EncodePrompt(proto_, model, first_turn.value_or(true),
                                                  [this] { return StillWanted(); }));
    request.first_turn = first_turn;
    request.owner = owner_;
    request.deadline = deadline_;
    return request;
  }

  // Queues an event for the reader.
  void Send(v1::GenerateEvent event) {
    {
      MutexLock lock(&mutex_);
      if (reader_gone_) return;
      outbox_.Push(std::move(event));
      Pump();
    }
    SyncPause();
  }

  // Writes the next thing, if nothing is being written.
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (write_in_flight_ || finish_called_) return;
    if (reader_gone_) {
      // With keep_on_disconnect the engine goes on; the call itself is over.
      if (engine_finished_ || keep_on_disconnect_.load()) Finish();
      return;
    }
    v1::GenerateEvent event;
    if (!outbox_.empty()) {
      event = outbox_.Pop();
    } else if (trace_.has_value() && !trace_->done()) {
      trace_->Next(&event);  // one at a time: traces are large
    } else if (last_event_.has_value()) {
      event = *std::move(last_event_);
      last_event_.reset();
    } else {
      if (engine_finished_) Finish();
      return;
    }
    writing_ = SerializeMessage(event);
    write_in_flight_ = true;
    StartWrite(&writing_);
  }

  void Finish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { EndLocked(end_status_); }

  void End(const absl::Status& status) {
    MutexLock lock(&mutex_);
    EndLocked(status);
  }

  void EndLocked(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (finish_called_) return;
    finish_called_ = true;
    outbox_.Clear();
    trace_.reset();
    const std::string code = absl::StatusCodeToString(status.code());
    core_->metrics().CountRequest("Generate", code);
    core_->log().Info("request", {{"method", "Generate"},
                                  {"request_id", request_id_},
                                  {"owner", owner_},
                                  {"code", code},
                                  {"error", std::string(status.message())},
                                  {"prompt_tokens", receipt_.prompt_tokens},
                                  {"cached_tokens", receipt_.cached_tokens},
                                  {"generated_tokens", receipt_.generated_tokens},
                                  {"ttft_seconds", receipt_.ttft_seconds},
                                  {"seconds", SecondsSince(start_)}});
    ServerWriteReactor::Finish(ToGrpcStatus(status));
  }

  // The reader is gone: nothing more is written, and the engine stops unless the request is to be
  // kept.
  void ReaderLeft(const absl::Status& why) {
    std::optional<RequestId> id;
    Engine* engine = nullptr;
    {
      MutexLock lock(&mutex_);
      reader_gone_ = true;
      if (end_status_.ok()) end_status_ = why;
      outbox_.Clear();
      if (!keep_on_disconnect_.load() && cancel_.ok()) {
        cancel_ = why;
        id = id_;
        engine = engine_;
      }
      Pump();
    }
    if (id.has_value()) engine->Cancel(*id, why);
    SyncPause();
  }

  // Tells the engine whether the sequence is to pause. Only one thread at a time, so that two
  // changes cannot arrive in the wrong order.
  void SyncPause() {
    {
      MutexLock lock(&mutex_);
      if (syncing_pause_ || !id_.has_value()) return;
      syncing_pause_ = true;
    }
    while (true) {
      bool paused = false;
      {
        MutexLock lock(&mutex_);
        if (engine_finished_ || paused_ == outbox_.wants_pause()) {
          syncing_pause_ = false;
          return;
        }
        paused = paused_ = !paused_;
      }
      engine_->SetPaused(*id_, paused);
    }
  }

  ServiceCore* const core_;
  grpc::CallbackServerContext* const context_;
  const Clock::time_point start_ = Clock::now();

  // Set on the way to the engine, constant afterwards.
  grpc::ByteBuffer request_;
  v1::GenerateRequest proto_;  // until it is submitted
  std::string owner_;
  Clock::time_point deadline_;
  v1::Policy policy_;
  std::atomic<bool> keep_on_disconnect_ = false;

  // The engine thread's.
  bool accepted_ = false;
  std::optional<Clock::time_point> last_tokens_;
  int64_t prompt_tokens_ = 0;

  Mutex mutex_;
  std::string request_id_ ABSL_GUARDED_BY(mutex_);
  std::shared_ptr<GenerateCall> self_ ABSL_GUARDED_BY(mutex_);  // gRPC's reference, until OnDone
  Engine* engine_ = nullptr;                                    // set once, with id_
  std::optional<RequestId> id_;                                 // set once, under mutex_
  Outbox outbox_ ABSL_GUARDED_BY(mutex_);
  grpc::ByteBuffer writing_;  // gRPC's while write_in_flight_
  bool write_in_flight_ ABSL_GUARDED_BY(mutex_) = false;
  bool finish_called_ ABSL_GUARDED_BY(mutex_) = false;
  bool reader_gone_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status cancel_ ABSL_GUARDED_BY(mutex_);  // not OK: to be cancelled, and why
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
  bool syncing_pause_ ABSL_GUARDED_BY(mutex_) = false;
  bool engine_finished_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status end_status_ ABSL_GUARDED_BY(mutex_);
  Receipt receipt_ ABSL_GUARDED_BY(mutex_);
  std::optional<TraceEvents> trace_ ABSL_GUARDED_BY(mutex_);
  std::optional<v1::GenerateEvent> last_event_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* StartGenerateCall(ServiceCore* core,
                                                              grpc::CallbackServerContext* context,
                                                              const grpc::ByteBuffer& request) {
  auto call = std::make_shared<GenerateCall>(core, context);
  call->Start(request);
  return call.get();  // keeps itself alive until OnDone
}

}  // namespace entropyserve
