// The engine thread and what it owns.
#pragma once

#include <atomic>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "engine/base/mutex.h"
#include "engine/cache/page_pool.h"
#include "engine/compare.h"
#include "engine/engine.h"
#include "engine/engine_factory.h"
#include "engine/owner_quotas.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/sessions/session_store.h"
#include "engine/sessions/session_tiers.h"
#include "engine/step_batch.h"

namespace entropyserve {

class EngineImpl final : public Engine {
 public:
  // `dir`: of session files; null: none.
  EngineImpl(EngineParts parts, std::unique_ptr<PagePool> pool,
             std::unique_ptr<SessionDir> dir = nullptr);
  ~EngineImpl() override;  // cancels what is left, and writes sessions where there is a folder

  absl::StatusOr<RequestId> Submit(EngineRequest request, std::shared_ptr<EventSink> sink) override;
  void Cancel(RequestId id, absl::Status why) override;
  void SetPaused(RequestId id, bool paused) override;
  EngineStats Stats() const override;
  absl::Status WarmUp() override;
  absl::StatusOr<double> TimeDensePrefill(int64_t tokens) override;
  void Drain(TimePoint deadline) override;
  absl::StatusOr<CompareResult> Compare(CompareRequest request, CompareSink sink) override;
  absl::StatusOr<SessionInfo> CreateSession(const std::string& owner) override;
  absl::StatusOr<SessionInfo> GetSession(const std::string& owner, const std::string& id) override;
  std::vector<SessionInfo> ListSessions(const std::string& owner) override;
  absl::StatusOr<SessionInfo> ForkSession(const std::string& owner, const std::string& id) override;
  absl::Status DeleteSession(const std::string& owner, const std::string& id) override;

  // Of an engine without a thread (EngineParts::manual): does what has been posted, then one step.
  void RunOnce();

 private:
  using Task = std::function<void()>;
  struct NewSession {
    SessionInfo info;
    std::optional<SessionMarker> marker;
  };

  // Any thread.
  absl::Status ValidateRequest(const EngineRequest& request) const;
  absl::Status ValidateCompare(const CompareRequest& request) const;
  void Post(Task task);
  void FlushSessions();  // into files, where there is a folder
  absl::StatusOr<SessionInfo> Marked(absl::StatusOr<NewSession> made);  // writes its marker
  // Runs `task` on the engine thread and waits for its result.
  template <typename T>
  T Call(std::function<T()> task);
  // The same for a task that has its result later: it calls what it is given, once.
  template <typename T>
  T CallLater(std::function<void(std::function<void(T)>)> task);

  // Engine thread: requests (engine_impl.cc).
  void Run();
  bool RunInbox();  // waits for tasks while there is nothing else to do; false: stop
  void RunTasks();
  void CancelAll();
  void Enqueue(std::unique_ptr<Sequence> sequence);
  void Start(Sequence* sequence);
  absl::Status Prepare(Sequence* sequence);
  absl::Status RefuseLate(const Sequence& sequence, double backlog_seconds) const;
  void ExpireDeadlines();
  int64_t LogicalKvBytes();
  void PublishStats();

  // Engine thread: sessions (engine_sessions.cc).
  SessionLoad LoadOf(const std::string& owner);
  absl::StatusOr<Session*> FindIdle(const std::string& owner, const std::string& id);
  absl::Status UseSession(Sequence* sequence);
  void AfterLoad(RequestId id, Session* session, const absl::Status& loaded);
  absl::StatusOr<NewSession> ForkIdle(const std::string& owner, Session* session);
  int64_t PagesToStart(const Sequence& sequence) const;
  void MakeRoomForWaiting();
  void WriteSessions();

  // Engine thread: steps (engine_step.cc).
  void Step();
  void RefuseWhatCannotStart(const StepPlan& plan);
  bool Admit(Sequence* sequence);
  void Begin(Sequence* sequence);
  void ReleaseArrived();
  bool BuildBatch(const StepPlan& plan);
  void RunBatch(const StepPlan& plan, TimePoint begin);
  void AfterWork(Sequence* sequence, const StepPlan::Work& work);
  void AfterPrefill(Sequence* sequence);
  void AfterSample(Sequence* sequence, const SampleResult& sample);
  void CompressIfWanted(Sequence* sequence);
  void FillReceipt(Sequence* sequence);
  void FillTrace(Sequence* sequence);
  // Ends the request: parks or drops its cache and makes the last call to its sink.
  void Finish(Sequence* sequence, FinishReason reason, absl::Status status,
              std::string stop_string = {});
  void ReturnCache(Sequence* sequence, bool failed);
  double EstimateSeconds(int64_t tokens) const;

  // Engine thread: what is nobody's request (engine_alone.cc).
  absl::Status StepAlone(Sequence* sequence, int64_t tokens);

  // Engine thread: comparisons (engine_compare.cc).
  void BeginCompare(CompareRequest request, std::shared_ptr<CompareChannel> channel);
  bool MakeRoomForCompare();
  void StepCompare();
  void EndCompare(std::shared_ptr<CompareChannel> channel, absl::StatusOr<CompareResult> result);

  // Constant after construction. The order is the order of destruction, reversed: caches before the
  // pool, the pool before the backend.
  const EngineOptions options_;
  const std::shared_ptr<Clock> clock_;
  const std::shared_ptr<Tokenizer> tokenizer_;
  const std::unique_ptr<Backend> backend_;
  const std::unique_ptr<Model> model_;
  const std::unique_ptr<PagePool> pool_;
  const std::shared_ptr<EngineObserver> observer_;  // never null
  const int64_t context_;
  const std::vector<int32_t> end_ids_;
  const bool manual_;  // no thread: RunOnce and the calls themselves do its work

  // Engine thread only.
  Scheduler scheduler_;
  SessionStore sessions_;
  SessionTiers tiers_;
  std::map<RequestId, std::unique_ptr<Sequence>> sequences_;  // waiting and running
  StepBatch step_;
  int64_t step_rows_ = 0;                // of the last step of requests; 0: it ran nothing
  std::unique_ptr<CompareJob> compare_;  // null: none is running
  std::vector<SampleResult> samples_;
  bool worked_ = false;  // the last step ran something, so the next one may too
  EngineStats counts_;
  double prefill_rate_ = 0;  // tokens per second, moving average
  uint64_t seed_state_;

  // Shared.
  mutable Mutex mutex_;
  CondVar wake_, idle_;
  std::deque<Task> inbox_ ABSL_GUARDED_BY(mutex_);
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  RequestId next_id_ ABSL_GUARDED_BY(mutex_) = 1;
  int64_t queued_requests_ ABSL_GUARDED_BY(mutex_) = 0;  // submitted and not yet admitted
  int64_t queued_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t open_requests_ ABSL_GUARDED_BY(mutex_) = 0;  // submitted and not yet finished
  double retry_after_ ABSL_GUARDED_BY(mutex_) = 1.0;   // seconds
  OwnerQuotas quotas_ ABSL_GUARDED_BY(mutex_);
  EngineStats stats_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_;  // last: it uses everything above
};

template <typename T>
T EngineImpl::CallLater(std::function<void(std::function<void(T)>)> task) {
  // Shared: the engine thread may still be inside set_value when the caller goes on.
  auto promise = std::make_shared<std::promise<T>>();
  std::future<T> result = promise->get_future();
  Post([task = std::move(task), promise] {
    task([promise](T value) { promise->set_value(std::move(value)); });
  });
  if (manual_) RunInbox();
  while (manual_ && result.wait_for(std::chrono::seconds(0)) != std::future_status::ready) {
    RunOnce();
  }
  return result.get();
}

template <typename T>
T EngineImpl::Call(std::function<T()> task) {
  return CallLater<T>([task = std::move(task)](std::function<void(T)> done) { done(task()); });
}

}  // namespace entropyserve
