#include "client/bench/drive.h"

#include <algorithm>
#include <map>
#include <queue>
#include <set>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/bench/call.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// How late a cancel may be noticed, and how often progress is told.
constexpr double kTickSeconds = 0.1;
constexpr double kUnaryDeadlineSeconds = 30, kProbeDeadlineSeconds = 5;

// A unary call and what it needs while it lives.
template <typename Request, typename Response>
struct Unary {
  grpc::ClientContext context;
  Request request;
  Response response;
  absl::Status status;
};

// One conversation: at most one of its requests is on its way or waits for its time.
struct Talk {
  Conversation plan;
  std::string session_id;
  size_t turn = 0;
  double intended = 0, session_seconds = 0;
  v1::GenerateRequest request;  // the next, ready
};

// One run. Everything is done on the schedule's thread; gRPC's threads post into the inbox.
class Run {
 public:
  Run(const DriveOptions& options, Connections* connections, const Plan& plan,
      const PromptSource& prompts)
      : options_(options), connections_(*connections), plan_(plan), prompts_(prompts) {}

  DriveResult Go();

 private:
  using TalkPtr = std::shared_ptr<Talk>;
  struct Timer {
    double at;
    int64_t order;
    Inbox::Work work;
    bool operator<(const Timer& other) const {
      return std::pair(at, order) > std::pair(other.at, other.order);
    }
  };

  // The schedule.
  void PrepareNext();
  bool MayStartNext(double now) const;
  bool StartsAreOver(double now) const;
  void StartDue();
  void RunTimers();
  double SecondsToWait() const;
  void At(double at, Inbox::Work work) { timers_.push({at, timer_order_++, std::move(work)}); }
  void Stop(absl::Status why);
  void Tick();

  // A conversation's steps, in order.
  void StartTalk(TalkPtr talk);
  void MakeRequest(Talk* talk);
  void SendTurn(const TalkPtr& talk);
  void OnTurnDone(const TalkPtr& talk, Call* call);
  void EndTalk(const TalkPtr& talk);
  void FailSession(const TalkPtr& talk, const absl::Status& status);
  RequestRecord PlannedRecord(const Talk& talk) const;

  template <typename Request, typename Response>
  using AsyncMethod = void (v1::EntropyServe::Stub::async::*)(grpc::ClientContext*, const Request*,
                                                              Response*,
                                                              std::function<void(grpc::Status)>);
  template <typename Request, typename Response>
  void CallUnary(AsyncMethod<Request, Response> method, Request request, double deadline_seconds,
                 std::function<void(const absl::Status&, const Response&)> done);
  void OnFailure(const absl::Status& status);

  const DriveOptions& options_;
  Connections& connections_;
  const Plan& plan_;
  const PromptSource& prompts_;
  const std::shared_ptr<Inbox> inbox_ = std::make_shared<Inbox>();
  RunClock clock_;
  std::atomic<int64_t> output_tokens_ = 0;

  std::priority_queue<Timer> timers_;
  int64_t timer_order_ = 0;
  int64_t next_ = 0;     // of the plan, not prepared yet
  TalkPtr prepared_;     // the next to start
  int64_t talking_ = 0;  // conversations under way
  int64_t open_unary_ = 0;
  std::set<Call*> calls_;
  bool stopping_ = false, probing_ = false;
  int64_t started_ = 0, completed_ = 0, failed_ = 0;
  double last_tick_ = 0;
  DriveResult result_;
};

DriveResult Run::Go() {
  result_.turns_not_sent.resize(options_.requests.size());
  PrepareNext();
  clock_ = RunClock();  // the first prompt's making is nobody's waiting
  while (true) {
    for (const Inbox::Work& work : inbox_->Take(std::chrono::nanoseconds(0))) work();
    RunTimers();
    StartDue();
    Tick();
    const bool over = stopping_ || StartsAreOver(clock_.Now());
    if (over && talking_ == 0 && open_unary_ == 0) break;
    for (const Inbox::Work& work :
         inbox_->Take(std::chrono::nanoseconds(static_cast<int64_t>(SecondsToWait() * 1e9)))) {
      work();
    }
  }
  for (const RequestRecord& record : result_.records) {
    result_.seconds = std::max(result_.seconds, record.ended);
  }
  return std::move(result_);
}

void Run::PrepareNext() {
  prepared_ = nullptr;
  if (next_ >= plan_.size()) return;
  prepared_ = std::make_shared<Talk>();
  prepared_->plan = plan_.Get(next_++);
  MakeRequest(prepared_.get());
}

bool Run::StartsAreOver(double now) const {
  if (prepared_ == nullptr) return true;
  return plan_.spec().mode == LoadMode::kClosed && now >= plan_.spec().duration_seconds;
}

bool Run::MayStartNext(double now) const {
  if (stopping_ || StartsAreOver(now)) return false;
  if (plan_.spec().mode == LoadMode::kClosed) {
    return talking_ < static_cast<int64_t>(plan_.spec().level);
  }
  if (options_.max_concurrency > 0 && talking_ >= options_.max_concurrency) return false;
  return now >= prepared_->plan.start_seconds;
}

void Run::StartDue() {
  for (double now = clock_.Now(); MayStartNext(now); now = clock_.Now()) {
    const TalkPtr talk = prepared_;
    // A closed loop intends to start when it has room.
    talk->intended = plan_.spec().mode == LoadMode::kClosed ? now : talk->plan.start_seconds;
    ++talking_;
    StartTalk(talk);
    PrepareNext();
  }
}

void Run::RunTimers() {
  // At the end nobody waits any more.
  while (!timers_.empty() && (stopping_ || timers_.top().at <= clock_.Now())) {
    const Inbox::Work work = timers_.top().work;
    timers_.pop();
    work();
  }
}

double Run::SecondsToWait() const {
  const double now = clock_.Now();
  double until = now + kTickSeconds;
  if (!timers_.empty()) until = std::min(until, timers_.top().at);
  // What waits for room is woken by an end.
  const bool by_time = prepared_ != nullptr && !stopping_ && plan_.spec().mode != LoadMode::kClosed;
  if (by_time && prepared_->plan.start_seconds > now) {
    until = std::min(until, prepared_->plan.start_seconds);
  }
  return std::max(0.0, until - now);
}

void Run::Stop(absl::Status why) {
  if (stopping_) return;
  stopping_ = true;
  result_.ended = std::move(why);
  for (Call* call : calls_) call->Cancel();
}

void Run::Tick() {
  const double now = clock_.Now();
  if (now - last_tick_ < kTickSeconds) return;
  last_tick_ = now;
  if (options_.cancel != nullptr && options_.cancel->cancelled()) {
    Stop(absl::CancelledError("the run was interrupted"));
  }
  if (!options_.on_progress) return;
  options_.on_progress({now, plan_.size(), started_, static_cast<int64_t>(calls_.size()),
                        completed_, failed_, output_tokens_.load(std::memory_order_relaxed)});
}

void Run::StartTalk(TalkPtr talk) {
  if (!talk->plan.session) return SendTurn(talk);
  const double asked = clock_.Now();
  CallUnary<v1::CreateSessionRequest, v1::Session>(
      &v1::EntropyServe::Stub::async::CreateSession, {}, kUnaryDeadlineSeconds,
      [this, talk, asked](const absl::Status& status, const v1::Session& session) {
        talk->session_seconds = clock_.Now() - asked;
        if (!status.ok()) return FailSession(talk, status);
        talk->session_id = session.id();
        talk->request.set_session_id(session.id());
        SendTurn(talk);
      });
}

void Run::MakeRequest(Talk* talk) {
  const PlannedTurn& turn = talk->plan.turns[talk->turn];
  talk->request = options_.requests[static_cast<size_t>(talk->plan.copy)];
  const std::vector<int32_t> ids = prompts_.Make(turn.seed, turn.input_tokens);
  talk->request.mutable_token_ids()->mutable_ids()->Add(ids.begin(), ids.end());
  talk->request.mutable_sampling()->set_max_new_tokens(turn.output_tokens);
  talk->request.mutable_sampling()->set_seed(turn.seed);
  talk->request.set_session_id(talk->session_id);
}

RequestRecord Run::PlannedRecord(const Talk& talk) const {
  const PlannedTurn& turn = talk.plan.turns[talk.turn];
  RequestRecord record;
  record.conversation = talk.plan.index;
  record.turn = static_cast<int>(talk.turn);
  record.copy = talk.plan.copy;
  record.input_tokens = turn.input_tokens;
  record.planned_output_tokens = turn.output_tokens;
  record.slow = turn.slow;
  record.cut = turn.cut;
  record.intended = talk.intended;
  record.session_seconds = talk.turn == 0 ? talk.session_seconds : 0;
  return record;
}

void Run::SendTurn(const TalkPtr& talk) {
  if (stopping_) return EndTalk(talk);
  const PlannedTurn& turn = talk->plan.turns[talk->turn];
  auto* call = new Call({inbox_, &clock_, &output_tokens_}, PlannedRecord(*talk),
                        {turn.cancel_after_tokens, turn.slow, options_.deadline_seconds},
                        std::move(talk->request));
  calls_.insert(call);
  ++started_;
  call->Start(
      connections_.Pick(), options_.client,
      [this, call] { At(clock_.Now() + options_.slow_pause_seconds, [call] { call->Resume(); }); },
      [this, talk, call] { OnTurnDone(talk, call); });
}

void Run::OnTurnDone(const TalkPtr& talk, Call* call) {
  calls_.erase(call);
  --call->connection()->calls;
  const absl::Status status = call->status();
  call->recorder().OnEnd(status, call->cancelled_as_planned(), stopping_, call->ended());
  result_.records.push_back(call->recorder().Take());
  delete call;
  const RequestRecord& record = result_.records.back();
  completed_ += record.outcome == Outcome::kCompleted;
  failed_ += record.outcome == Outcome::kFailed;
  if (record.outcome == Outcome::kFailed) OnFailure(status);
  ++talk->turn;
  const bool goes_on = record.outcome == Outcome::kCompleted && !stopping_;
  if (!goes_on || talk->turn == talk->plan.turns.size()) return EndTalk(talk);
  // A follow-up is intended once its answer has been read and thought about, and not before its
  // time.
  const PlannedTurn& next = talk->plan.turns[talk->turn];
  talk->intended = std::max(record.ended + next.think_seconds, next.not_before_seconds);
  MakeRequest(talk.get());
  At(talk->intended, [this, talk] { SendTurn(talk); });
}

void Run::FailSession(const TalkPtr& talk, const absl::Status& status) {
  RequestRecorder recorder(PlannedRecord(*talk));
  recorder.OnSent(clock_.Now());
  recorder.OnEnd(status, false, stopping_, clock_.Now());
  result_.records.push_back(recorder.Take());
  ++started_;
  ++failed_;
  ++talk->turn;
  OnFailure(status);
  EndTalk(talk);
}

void Run::EndTalk(const TalkPtr& talk) {
  result_.turns_not_sent[static_cast<size_t>(talk->plan.copy)] +=
      static_cast<int64_t>(talk->plan.turns.size() - talk->turn);
  --talking_;
  if (talk->session_id.empty()) return;
  v1::DeleteSessionRequest request;
  request.set_session_id(talk->session_id);
  CallUnary<v1::DeleteSessionRequest, v1::DeleteSessionResponse>(
      &v1::EntropyServe::Stub::async::DeleteSession, request, kUnaryDeadlineSeconds,
      [](const absl::Status&, const v1::DeleteSessionResponse&) {});
}

void Run::OnFailure(const absl::Status& status) {
  if (status.code() != absl::StatusCode::kUnavailable || stopping_ || probing_) return;
  probing_ = true;
  CallUnary<v1::GetServerRequest, v1::GetServerResponse>(
      &v1::EntropyServe::Stub::async::GetServer, {}, kProbeDeadlineSeconds,
      [this](const absl::Status& probe, const v1::GetServerResponse& server) {
        probing_ = false;
        if (probe.code() == absl::StatusCode::kUnavailable ||
            probe.code() == absl::StatusCode::kDeadlineExceeded) {
          Stop(absl::UnavailableError(absl::StrCat("the server is gone: ", probe.message())));
        } else if (probe.ok() && server.state() == v1::GetServerResponse::STATE_DRAINING) {
          Stop(absl::UnavailableError("the server is draining"));
        }
      });
}

template <typename Request, typename Response>
void Run::CallUnary(AsyncMethod<Request, Response> method, Request request, double deadline_seconds,
                    std::function<void(const absl::Status&, const Response&)> done) {
  auto unary = std::make_shared<Unary<Request, Response>>();
  unary->request = std::move(request);
  AddHeaders(options_.client, &unary->context);
  unary->context.set_deadline(
      std::chrono::system_clock::now() +
      std::chrono::milliseconds(static_cast<int64_t>(deadline_seconds * 1e3)));
  ++open_unary_;
  (connections_.first()->stub->async()->*method)(
      &unary->context, &unary->request, &unary->response,
      // The call's context holds its channel, and whoever drops the last of those joins gRPC's
      // threads: it must not be one of them. So nothing of the call stays behind here.
      [this, inbox = inbox_, unary, done = std::move(done)](const grpc::Status& status) mutable {
        unary->status = ToAbsl(status);
        inbox->Post([this, unary = std::move(unary), done = std::move(done)] {
          --open_unary_;
          done(unary->status, unary->response);
        });
      });
}

class GrpcLoadDriver final : public LoadDriver {
 public:
  GrpcLoadDriver(DriveOptions options, std::unique_ptr<Connections> connections)
      : options_(std::move(options)), connections_(std::move(connections)) {}

  DriveResult Run(const Plan& plan, const PromptSource& prompts) override {
    return entropyserve::Run(options_, connections_.get(), plan, prompts).Go();
  }

 private:
  const DriveOptions options_;
  const std::unique_ptr<Connections> connections_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<LoadDriver>> LoadDriver::Create(DriveOptions options,
                                                               int connections) {
  auto opened = std::make_unique<Connections>(options.client, options.streams_per_connection);
  const auto deadline = std::chrono::system_clock::now() +
                        std::chrono::duration_cast<std::chrono::system_clock::duration>(
                            std::chrono::duration<double>(options.connect_seconds));
  for (int i = 0; i < std::max(1, connections); ++i) {
    RETURN_IF_ERROR(opened->Open());
  }
  if (!opened->WaitUntilUp(deadline)) {
    return absl::UnavailableError(absl::StrCat("no connection to ", options.client.server,
                                               " within ", options.connect_seconds, " s"));
  }
  return std::make_unique<GrpcLoadDriver>(std::move(options), std::move(opened));
}

}  // namespace entropyserve
