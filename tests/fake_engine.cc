#include "tests/fake_engine.h"

#include <gtest/gtest.h>
#include <numeric>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"

namespace entropyserve {

using std::chrono::steady_clock;

FakeEngine::FakeEngine() : thread_([this] { Run(); }) {}

FakeEngine::~FakeEngine() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void FakeEngine::SetScript(FakeScript script) {
  std::lock_guard lock(mutex_);
  script_ = std::move(script);
}
void FakeEngine::SetSubmitStatus(absl::Status status) {
  std::lock_guard lock(mutex_);
  submit_status_ = std::move(status);
}
void FakeEngine::SetSessionsImplemented(bool implemented) {
  std::lock_guard lock(mutex_);
  sessions_implemented_ = implemented;
}
void FakeEngine::Hold(bool held) {
  {
    std::lock_guard lock(mutex_);
    held_ = held;
  }
  wake_.notify_all();
}

void FakeEngine::HoldSessions(bool held) {
  {
    std::lock_guard lock(mutex_);
    sessions_held_ = held;
  }
  wake_.notify_all();
}
int FakeEngine::WaitingForSessions() {
  std::lock_guard lock(mutex_);
  return waiting_for_sessions_;
}
void FakeEngine::WaitForSessions(std::unique_lock<std::mutex>& lock) {
  ++waiting_for_sessions_;
  wake_.wait(lock, [this] { return !sessions_held_; });
  --waiting_for_sessions_;
}

std::vector<EngineRequest> FakeEngine::Requests() {
  std::lock_guard lock(mutex_);
  return requests_;
}
std::map<RequestId, absl::Status> FakeEngine::Cancels() {
  std::lock_guard lock(mutex_);
  return cancels_;
}
std::vector<CompareRequest> FakeEngine::Compares() {
  std::lock_guard lock(mutex_);
  return compares_;
}
int64_t FakeEngine::Compared() {
  std::lock_guard lock(mutex_);
  return compared_;
}
int FakeEngine::Submits() {
  std::lock_guard lock(mutex_);
  return submits_;
}
bool FakeEngine::IsPaused(RequestId id) {
  std::lock_guard lock(mutex_);
  return paused_[id];
}
int64_t FakeEngine::TokensSent(RequestId id) {
  std::lock_guard lock(mutex_);
  return sent_[id];
}

void FakeEngine::WaitFor(const std::function<bool()>& condition) {
  const auto deadline = steady_clock::now() + std::chrono::minutes(1);
  while (!condition()) {
    ASSERT_LT(steady_clock::now(), deadline) << "the condition never held";
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
}

absl::StatusOr<RequestId> FakeEngine::Submit(EngineRequest request,
                                             std::shared_ptr<EventSink> sink) {
  RequestId id = 0;
  {
    std::lock_guard lock(mutex_);
    ++submits_;
    if (!submit_status_.ok()) return submit_status_;
    id = next_id_++;
    requests_.push_back(request);
    auto running = std::make_unique<Running>();
    running->request = std::move(request);
    running->sink = std::move(sink);
    running->script = script_;
    running_[id] = std::move(running);
  }
  wake_.notify_all();
  return id;
}

void FakeEngine::Cancel(RequestId id, absl::Status why) {
  {
    std::lock_guard lock(mutex_);
    cancels_[id] = why;
    if (const auto found = running_.find(id); found != running_.end()) found->second->cancel = why;
  }
  wake_.notify_all();
}

void FakeEngine::SetPaused(RequestId id, bool paused) {
  {
    std::lock_guard lock(mutex_);
    paused_[id] = paused;
    if (const auto found = running_.find(id); found != running_.end()) {
      found->second->paused = paused;
    }
  }
  wake_.notify_all();
}

EngineStats FakeEngine::Stats() const {
  std::lock_guard lock(mutex_);
  EngineStats stats;
  for (const auto& [id, running] : running_) {
    ++(running->step < 0 ? stats.waiting : stats.running);
    if (running->step < 0)
      stats.queued_tokens += static_cast<int64_t>(running->request.prompt.size());
  }
  stats.completed = completed_;
  stats.cancelled = cancelled_;
  stats.failed = failed_;
  stats.admitted = completed_ + cancelled_ + failed_ + stats.waiting + stats.running;
  stats.pages_total = 1000;
  stats.pages_used = stats.running;
  stats.page_bytes = 4096;
  stats.weight_bytes = 12345;
  return stats;
}

void FakeEngine::Drain(steady_clock::time_point deadline) {
  while (steady_clock::now() < deadline) {
    const EngineStats stats = Stats();
    if (stats.running + stats.waiting == 0) return;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  std::lock_guard lock(mutex_);
  for (auto& [id, running] : running_) running->cancel = absl::UnavailableError("drained");
}

absl::StatusOr<CompareResult> FakeEngine::Compare(CompareRequest request, CompareSink sink) {
  std::unique_lock lock(mutex_);
  if (!submit_status_.ok()) return submit_status_;
  compares_.push_back(request);
  const int64_t end = static_cast<int64_t>(request.tokens.size()) - 1,
                batch = script_.compare_batch;
  for (int64_t begin = request.score_from; begin < end;) {
    std::vector<ComparePosition> positions;
    if (held_) {
      wake_.wait_for(lock, std::chrono::milliseconds(1));
    } else {
      for (int64_t p = begin; p < std::min(end, begin + batch); ++p) {
        positions.push_back({.position = p,
                             .kl = static_cast<double>(p),
                             .top1_equal = p % 2 == 0,
                             .logprob_a = -static_cast<double>(request.tokens[p + 1]),
                             .logprob_b = -static_cast<double>(p)});
      }
    }
    lock.unlock();
    const bool go_on = sink(positions);
    lock.lock();
    if (request.deadline <= steady_clock::now()) return absl::DeadlineExceededError("late");
    if (!go_on) return absl::CancelledError("cancelled");
    begin += static_cast<int64_t>(positions.size());
    compared_ += static_cast<int64_t>(positions.size());
  }
  if (!script_.fail_after_prefill.ok()) return script_.fail_after_prefill;
  return CompareResult{.attention_flops_a = 1,
                       .attention_flops_b = 2,
                       .attention_flops_dense = 3,
                       .prefill_seconds_a = 4,
                       .prefill_seconds_b = 5,
                       .kv_bytes_a = 6,
                       .kv_bytes_b = 7};
}

absl::StatusOr<SessionInfo> FakeEngine::CreateSession(const std::string& owner) {
  std::unique_lock lock(mutex_);
  WaitForSessions(lock);
  if (!sessions_implemented_) return absl::UnimplementedError("sessions: not served here");
  SessionInfo info;
  info.id = absl::StrCat("session", sessions_[owner].size());
  sessions_[owner][info.id] = info;
  return info;
}
absl::StatusOr<SessionInfo> FakeEngine::GetSession(const std::string& owner,
                                                   const std::string& id) {
  std::unique_lock lock(mutex_);
  WaitForSessions(lock);
  const auto& own = sessions_[owner];
  const auto found = own.find(id);
  if (found == own.end()) return absl::NotFoundError("session_id: no such session");
  return found->second;
}
std::vector<SessionInfo> FakeEngine::ListSessions(const std::string& owner) {
  std::lock_guard lock(mutex_);
  std::vector<SessionInfo> list;
  for (const auto& [id, info] : sessions_[owner]) list.push_back(info);
  return list;
}
absl::StatusOr<SessionInfo> FakeEngine::ForkSession(const std::string& owner,
                                                    const std::string& id) {
  absl::StatusOr<SessionInfo> info = GetSession(owner, id);
  if (!info.ok()) return info;
  std::lock_guard lock(mutex_);
  info->id = absl::StrCat("session", sessions_[owner].size());
  sessions_[owner][info->id] = *info;
  return info;
}
absl::Status FakeEngine::DeleteSession(const std::string& owner, const std::string& id) {
  std::lock_guard lock(mutex_);
  if (sessions_[owner].erase(id) == 1) return absl::OkStatus();
  return absl::NotFoundError("session_id: no such session");
}

void FakeEngine::Run() {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    bool any = false;
    std::vector<RequestId> ids;
    for (const auto& [id, running] : running_) ids.push_back(id);
    for (const RequestId id : ids) {
      Running* running = running_[id].get();
      const bool late = steady_clock::now() >= running->request.deadline;
      if (late && running->cancel.ok()) running->cancel = absl::DeadlineExceededError("deadline");
      if (running->cancel.ok() && (held_ || running->paused)) continue;
      any = true;
      lock.unlock();  // events are sent without the lock: the sink may call Cancel and SetPaused
      const bool more = Step(id, running);
      lock.lock();
      if (!more) running_.erase(id);
    }
    // Deadlines come without a wake-up.
    if (!any) wake_.wait_for(lock, std::chrono::milliseconds(2));
  }
}

bool FakeEngine::Step(RequestId id, Running* running) {
  absl::Status cancel;
  {
    std::lock_guard lock(mutex_);
    cancel = running->cancel;
  }
  if (!cancel.ok()) {
    Finish(running, FinishReason::kCancelled, cancel);
    return false;
  }
  const EngineRequest& request = running->request;
  const FakeScript& script = running->script;
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int step = running->step;
  {
    std::lock_guard lock(mutex_);
    ++running->step;
  }
  if (step < 0) {
    if (!script.refuse.ok()) {
      Finish(running, FinishReason::kError, script.refuse);
      return false;
    }
    running->sink->OnAccepted({.prompt_tokens = prompt});
    return true;
  }
  if (step < script.prefill_steps) {
    if (request.progress) {
      running->sink->OnProgress(prompt * (step + 1) / script.prefill_steps, prompt);
    }
    return true;
  }
  if (!script.fail_after_prefill.ok()) {
    Finish(running, FinishReason::kError, script.fail_after_prefill);
    return false;
  }
  const int token = step - script.prefill_steps;
  const bool limited = token >= request.sampling.max_new_tokens;
  if (token >= script.tokens || limited) {
    Finish(running, limited ? FinishReason::kLength : FinishReason::kStop, absl::OkStatus());
    return false;
  }
  TokensEvent event;
  event.ids = {static_cast<int32_t>((prompt + token) % 256)};
  event.text =
      script.text_bytes == 0 ? absl::StrCat("t", token, " ") : std::string(script.text_bytes, 'x');
  if (request.sampling.logprobs >= 0) {
    TokenLogprobs logprobs;
    logprobs.logprob = -1.5f;
    for (int i = 0; i < request.sampling.logprobs; ++i) logprobs.top.emplace_back(i, -0.5f * i);
    event.logprobs.push_back(std::move(logprobs));
  }
  {
    std::lock_guard lock(mutex_);
    sent_[id] = ++running->sent;
  }
  running->sink->OnTokens(std::move(event));
  return true;
}

void FakeEngine::Finish(Running* running, FinishReason reason, absl::Status status) {
  FinishedEvent event;
  event.reason = reason;
  event.status = std::move(status);
  event.receipt.prompt_tokens = static_cast<int64_t>(running->request.prompt.size());
  event.receipt.generated_tokens = running->sent;
  event.receipt.seed = running->request.sampling.seed.value_or(42);
  event.receipt.attention_flops_executed = 30;
  event.receipt.attention_flops_dense = 120;
  event.receipt.kv_bytes_before = 1000;
  event.receipt.kv_bytes_after = 250;
  event.receipt.compressed = true;
  if (running->request.trace && running->script.trace_layers > 0) {
    auto trace = std::make_shared<Trace>();
    trace->layers = running->script.trace_layers;
    trace->kv_heads = 2;
    trace->segments = 3;
    trace->segment = 512;
    trace->block = 8;
    const size_t count = static_cast<size_t>(trace->layers) * 2 * 3;
    for (size_t i = 0; i < count; ++i) {
      trace->entropy.push_back(static_cast<float>(i));
      trace->budget.push_back(static_cast<float>(100 + i));
      trace->selected.push_back(static_cast<int32_t>(i));
    }
    for (int i = 0; i < trace->layers * 2; ++i) {
      trace->kept_positions.emplace_back(running->script.trace_kept);
      std::iota(trace->kept_positions.back().begin(), trace->kept_positions.back().end(), i);
    }
    event.trace = std::move(trace);
  }
  {
    std::lock_guard lock(mutex_);
    const EngineRequest& request = running->request;
    auto& own = sessions_[request.owner];
    if (const auto session = own.find(request.session_id); session != own.end()) {
      session->second.positions += event.receipt.prompt_tokens + running->sent;
    }
    ++(reason == FinishReason::kCancelled ? cancelled_
       : reason == FinishReason::kError   ? failed_
                                          : completed_);
  }
  running->sink->OnFinished(std::move(event));
}

}  // namespace entropyserve
