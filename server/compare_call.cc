#include "server/compare_call.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <memory>
#include <string>
#include <utility>

#include "engine/base/mutex.h"
#include "engine/base/status_macros.h"
#include "engine/engine.h"
#include "entropyserve/v1/entropyserve.pb.h"
#include "server/call_owner.h"
#include "server/convert.h"
#include "server/service_core.h"
#include "server/status.h"
#include "server/wire.h"

namespace entropyserve {
namespace {

using Clock = std::chrono::steady_clock;

// Threads: gRPC's (Start, OnWriteDone, OnCancel, OnDone), the compare lane's (Run), a drain's
// (Abort), the core's watchdog (CutOff). The lane's thread waits inside Engine::Compare, and in the
// sink for a reader that is slow; the engine thread never does.
class CompareCall final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                          public OpenCall,
                          public std::enable_shared_from_this<CompareCall> {
 public:
  CompareCall(ServiceCore* core, grpc::CallbackServerContext* context)
      : core_(core), context_(context) {}

  void Start(const grpc::ByteBuffer& request) {
    {
      MutexLock lock(&mutex_);
      self_ = shared_from_this();
    }
    const absl::Status status = Admit(request);
    if (!status.ok()) Stop(status);
  }

  // --- gRPC ---

  void OnWriteDone(bool ok) override {
    if (!ok) Stop(absl::CancelledError("the connection was lost"));
    bool finished = false;
    {
      MutexLock lock(&mutex_);
      finished = finished_;
      write_in_flight_ = false;
      Pump();
    }
    if (finished) core_->ExpectReader(this);
  }

  // The caller cancelled, its deadline passed, or the connection broke.
  void OnCancel() override {
    const bool late = context_->deadline() <= std::chrono::system_clock::now();
    Stop(late ? absl::DeadlineExceededError("the deadline passed")
              : absl::CancelledError("cancelled by the caller"));
  }

  void OnDone() override {
    core_->Close(this);
    std::shared_ptr<CompareCall> self;
    {
      MutexLock lock(&mutex_);
      self = std::move(self_);  // freed after the lock; the lane may hold another reference
    }
  }

  // --- A drain ---

  void Abort(const absl::Status& why) override { Stop(why); }

  void CutOff() override {
    Stop(absl::CancelledError("the answer was not read"));
    context_->TryCancel();  // ends the write in flight, and so the call
  }

 private:
  absl::Status Admit(const grpc::ByteBuffer& request) {
    ASSIGN_OR_RETURN(owner_, CallOwner(*context_, core_->authenticator()));
    if (!core_->limits().allow_compare) {
      return absl::UnimplementedError("Compare: not served here (--allow-compare)");
    }
    RETURN_IF_ERROR(core_->CheckAccepting());
    RETURN_IF_ERROR(core_->Open(this, owner_));
    deadline_ = core_->Deadline(context_->deadline());
    patience_ = std::chrono::duration_cast<Clock::duration>(
        std::chrono::duration<double>(core_->limits().unread_seconds));
    request_ = request;
    return core_->lanes().PostCompare(static_cast<int64_t>(request.Length()),
                                      [self = shared_from_this()] { self->Run(); });
  }

  // On the compare lane.
  void Run() {
    {
      MutexLock lock(&mutex_);
      if (!stop_.ok()) return;  // ended while it waited
      running_ = true;
    }
    absl::StatusOr<CompareResult> result = RunCompare();
    core_->ExpectReader(this);
    MutexLock lock(&mutex_);
    running_ = false;
    finished_ = true;
    if (result.ok()) {
      v1::CompareEvent event;
      CompareToProto(*result, event.mutable_summary());
      Push(std::move(event));
    } else {
      if (stop_.ok()) stop_ = result.status();
      if (unsent_bytes_ >= limit()) {
        // A reader that does not read cannot be told: the status would wait behind its unread
        // events for ever.
        context_->TryCancel();
      }
    }
    Pump();
  }

  absl::StatusOr<CompareResult> RunCompare() {
    v1::CompareRequest proto;
    const absl::Status parsed = ParseMessage(request_, "CompareRequest", &proto);
    request_.Clear();
    RETURN_IF_ERROR(parsed);
    ASSIGN_OR_RETURN(const ServedModel* model, core_->Model());
    ASSIGN_OR_RETURN(CompareRequest request, CompareFromProto(proto, *model));
    request.deadline = deadline_;
    return model->engine->Compare(std::move(request),
                                  [this](auto positions) { return Send(positions); });
  }

  // Waits for the reader, for unread_seconds in all: other comparisons wait for this one, and other
  // requests for its two caches. False: the call is over.
  bool Send(std::span<const ComparePosition> positions) {
    MutexLock lock(&mutex_);
    while (unsent_bytes_ >= limit() && stop_.ok()) {
      const Clock::time_point begin = Clock::now();
      const Clock::duration left = std::min(deadline_ - begin, patience_);
      if (left > left.zero()) {
        room_.WaitFor(&mutex_, left);
        patience_ -= Clock::now() - begin;
      } else {
        stop_ = patience_ > left
                    ? absl::DeadlineExceededError("the deadline passed; the answer was not read")
                    : absl::CancelledError("the answer was not read");
      }
    }
    if (!stop_.ok()) return false;
    if (positions.empty()) return true;
    v1::CompareEvent event;
    for (const ComparePosition& p : positions) ComparedToProto(p, event.add_positions());
    Push(std::move(event));
    Pump();
    return true;
  }

  size_t limit() const { return static_cast<size_t>(core_->limits().outbox_bytes); }

  void Push(v1::CompareEvent event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    grpc::ByteBuffer bytes = SerializeMessage(event);
    unsent_bytes_ += bytes.Length();
    outbox_.push_back(std::move(bytes));
  }

  // Writes the next event, or ends the call when there is nothing left to do.
  void Pump() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (write_in_flight_ || finish_called_) return;
    if (stop_.ok() && !outbox_.empty()) {
      writing_ = std::move(outbox_.front());
      outbox_.pop_front();
      unsent_bytes_ -= writing_.Length();
      room_.NotifyAll();
      write_in_flight_ = true;
      StartWrite(&writing_);
      return;
    }
    // Not before the engine has let go of it: a drain waits for the calls that are open.
    if (running_ || (stop_.ok() && !finished_)) return;
    finish_called_ = true;
    const std::string code = absl::StatusCodeToString(stop_.code());
    core_->metrics().CountRequest("Compare", code);
    core_->log().Info("request",
                      {{"method", "Compare"},
                       {"owner", owner_},
                       {"code", code},
                       {"error", std::string(stop_.message())},
                       {"seconds", std::chrono::duration<double>(Clock::now() - start_).count()}});
    Finish(ToGrpcStatus(stop_));
  }

  // Ends the call with `why`, unless it is ending already.
  void Stop(const absl::Status& why) {
    MutexLock lock(&mutex_);
    if (stop_.ok()) stop_ = why;
    outbox_.clear();
    unsent_bytes_ = 0;
    room_.NotifyAll();
    Pump();
  }

  ServiceCore* const core_;
  grpc::CallbackServerContext* const context_;
  const Clock::time_point start_ = Clock::now();

  // Set before the lane has it, constant afterwards.
  std::string owner_;
  Clock::time_point deadline_;
  grpc::ByteBuffer request_;  // then the lane's
  Clock::duration patience_;  // then the lane's: how much longer it waits for the reader

  Mutex mutex_;
  CondVar room_;  // unsent_bytes_ fell, or stop_ is set
  std::shared_ptr<CompareCall> self_ ABSL_GUARDED_BY(mutex_);  // gRPC's reference, until OnDone
  std::deque<grpc::ByteBuffer> outbox_ ABSL_GUARDED_BY(mutex_);
  size_t unsent_bytes_ ABSL_GUARDED_BY(mutex_) = 0;  // of outbox_
  grpc::ByteBuffer writing_;                         // gRPC's while write_in_flight_
  bool write_in_flight_ ABSL_GUARDED_BY(mutex_) = false;
  bool running_ ABSL_GUARDED_BY(mutex_) = false;   // the lane is inside RunCompare
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // it has been
  bool finish_called_ ABSL_GUARDED_BY(mutex_) = false;
  absl::Status stop_ ABSL_GUARDED_BY(mutex_);  // not OK: how the call ends
};

}  // namespace

grpc::ServerWriteReactor<grpc::ByteBuffer>* StartCompareCall(ServiceCore* core,
                                                             grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer& request) {
  auto call = std::make_shared<CompareCall>(core, context);
  call->Start(request);
  return call.get();  // keeps itself alive until OnDone
}

}  // namespace entropyserve
