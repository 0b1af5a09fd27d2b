// An Engine for tests of the server: scripted, deterministic, with a thread of its own. Answers are
// a function of the prompt's length alone; nothing happens while it is held.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "engine/engine.h"

namespace entropyserve {

struct FakeScript {
  int prefill_steps = 2;
  int tokens = 4;         // of each answer; fewer when max_new_tokens says so
  size_t text_bytes = 0;  // of each token's text; 0: "t0 ", "t1 ", ...
  // Of a comparison, beside those that the request's length gives.
  int64_t compare_batch = 64;  // positions handed over at a time
  // Not OK: the request ends with kError, then or before it is accepted.
  absl::Status fail_after_prefill = absl::OkStatus(), refuse = absl::OkStatus();
  int trace_layers = 0;
  int trace_kept = 2;  // positions of each head: the head's number and those after it
};

class FakeEngine final : public Engine {
 public:
  FakeEngine();
  ~FakeEngine() override;

  // For requests that are submitted from now on.
  void SetScript(FakeScript script);
  // Submit answers this instead, when not OK.
  void SetSubmitStatus(absl::Status status);
  void SetSessionsImplemented(bool implemented);
  // A held engine takes requests and cancels, and makes no step.
  void Hold(bool held);

  // While held, calls about sessions wait, as they do for the end of a step.
  void HoldSessions(bool held);
  int WaitingForSessions();

  // What the server asked for, in order of submission.
  std::vector<EngineRequest> Requests();
  std::map<RequestId, absl::Status> Cancels();
  int Submits();  // refused ones too
  bool IsPaused(RequestId id);
  int64_t TokensSent(RequestId id);
  std::vector<CompareRequest> Compares();
  int64_t Compared();  // positions handed over, of all comparisons
  // Returns when `condition` holds. Fails the test after a minute.
  static void WaitFor(const std::function<bool()>& condition);

  // What TimeDensePrefill answers.
  std::function<absl::StatusOr<double>(int64_t)> time_dense_prefill;

  // Engine.
  absl::StatusOr<RequestId> Submit(EngineRequest request, std::shared_ptr<EventSink> sink) override;
  void Cancel(RequestId id, absl::Status why) override;
  void SetPaused(RequestId id, bool paused) override;
  EngineStats Stats() const override;
  absl::Status WarmUp() override { return absl::OkStatus(); }
  absl::StatusOr<double> TimeDensePrefill(int64_t tokens) override {
    return time_dense_prefill(tokens);
  }
  void Drain(std::chrono::steady_clock::time_point deadline) override;
  // Position p of text t: kl p, logprob_a -t[p + 1], logprob_b -p, top1_equal for even p. While the
  // engine is held only empty spans are handed over.
  absl::StatusOr<CompareResult> Compare(CompareRequest request, CompareSink sink) override;
  absl::StatusOr<SessionInfo> CreateSession(const std::string& owner) override;
  absl::StatusOr<SessionInfo> GetSession(const std::string& owner, const std::string& id) override;
  std::vector<SessionInfo> ListSessions(const std::string& owner) override;
  absl::StatusOr<SessionInfo> ForkSession(const std::string& owner, const std::string& id) override;
  absl::Status DeleteSession(const std::string& owner, const std::string& id) override;

 private:
  struct Running {
    EngineRequest request;
    std::shared_ptr<EventSink> sink;
    FakeScript script;
    int step = -1;  // -1: not accepted yet
    bool paused = false;
    absl::Status cancel;
    int64_t sent = 0;
  };
  void WaitForSessions(std::unique_lock<std::mutex>& lock);
  void Run();
  // One event of one request; false when it has finished.
  bool Step(RequestId id, Running* running);
  void Finish(Running* running, FinishReason reason, absl::Status status);

  mutable std::mutex mutex_;
  std::condition_variable wake_;
  FakeScript script_;
  absl::Status submit_status_;
  bool sessions_implemented_ = true;
  bool held_ = false, stopping_ = false;
  bool sessions_held_ = false;
  int waiting_for_sessions_ = 0;
  RequestId next_id_ = 1;
  int submits_ = 0;
  std::map<RequestId, std::unique_ptr<Running>> running_;
  std::vector<EngineRequest> requests_;
  std::vector<CompareRequest> compares_;
  int64_t compared_ = 0;
  std::map<RequestId, absl::Status> cancels_;
  std::map<RequestId, bool> paused_;
  std::map<RequestId, int64_t> sent_;
  std::map<std::string, std::map<std::string, SessionInfo>> sessions_;  // by owner, id
  int64_t completed_ = 0, cancelled_ = 0, failed_ = 0;
  std::thread thread_;
};

}  // namespace entropyserve
