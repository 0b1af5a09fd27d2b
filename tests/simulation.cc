#include "tests/simulation.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <random>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "tests/manual_engine.h"
#include "tests/simulation_model.h"

namespace entropyserve {
namespace {

constexpr int32_t kSegment = 128;  // tokens
const char* const kOwners[] = {"ann", "bob"};

class Simulation {
 public:
  Simulation(const SimulationOptions& options, SimulationCounts* counts)
      : plant_swap_(options.swap_pages),
        counts_(*counts),
        random_(options.seed * 0x9e3779b97f4a7c15u + 1),
        engine_options_(DrawOptions(options.folder)),
        pages_(Between(60, 400)) {
    step_seconds_ = 0.001 * double(Between(1, 50));
    max_rows_ = Chance(30) ? Between(kSegment, 400) : int64_t{1} << 20;
    StartEngine();
    if (Chance(30)) failure_percent_ = Between(1, 10);
  }

  std::string Run() {
    for (int64_t i = Between(0, 3); i > 0; --i) CreateSession();
    const int64_t actions = Between(20, 60);
    for (int64_t i = 0; i < actions && wrong_.empty(); ++i) {
      Act();
      if (Chance(75)) RunOnce();
    }
    if (wrong_.empty()) RunToTheEnd();
    if (wrong_.empty() && !engine_options_.session_dir.empty()) Restart();
    if (wrong_.empty()) ReturnEverything();
    CheckCorruptions();
    return wrong_;
  }

  bool planted() const { return planted_; }

 private:
  int64_t Between(int64_t least, int64_t most) {
    return least + int64_t(random_() % uint64_t(most - least + 1));
  }
  bool Chance(int64_t percent) { return Between(1, 100) <= percent; }
  template <typename T>
  T* Pick(std::vector<T>* items) {
    return items->empty() ? nullptr : &(*items)[size_t(Between(0, int64_t(items->size()) - 1))];
  }
  void Wrong(const std::string& what) {
    if (wrong_.empty()) wrong_ = what;
  }
  EngineImpl& engine() { return *world_->engine; }

  void StartEngine() {
    world_.emplace(engine_options_, pages_);
    world_->model->before_step = [this] { world_->clock->Advance(step_seconds_); };
    world_->model->max_rows = max_rows_;
    world_->backend->fails = [this] {
      const bool fails = failure_percent_ > 0 && Chance(failure_percent_);
      counts_.failed_allocations += fails;
      return fails;
    };
    if (plant_swap_) world_->model->tamper = [this](const Batch& batch) { SwapPages(batch); };
  }

  EngineOptions DrawOptions(const std::string& folder) {
    EngineOptions o;
    o.max_sequences = int(Between(1, 6));
    o.step_tokens = kSegment * Between(1, 3);
    o.lone_chunk_tokens = kSegment * Between(1, 4);
    o.max_queue_requests = int(Between(3, 30));
    o.max_queue_tokens = Between(300, 5000);
    o.max_sessions = Between(3, 12);
    if (Chance(20)) o.max_owner_requests = Between(1, 8);
    if (Chance(20)) o.max_owner_queue_tokens = Between(100, 1000);
    if (Chance(20)) o.max_owner_sessions = Between(1, 6);
    if (Chance(20)) o.max_owner_session_bytes = Between(1, 400) << 10;
    o.refuse_late = Chance(30);
    if (Chance(70)) o.session_host_bytes = Between(10, 2000) << 10;
    if (Chance(50)) o.session_device_bytes = Between(1, 300) << 10;
    if (Chance(50)) o.session_step_bytes = Between(1, 100) << 10;
    if (Chance(10)) o.session_ttl_seconds = double(Between(1, 5));
    // Files wait for the disk: in some lives only.
    if (Chance(1)) o.session_dir = folder;
    if (Chance(30)) o.session_dir_bytes = Between(100, 2000) << 10;
    return o;
  }

  void Act() {
    const int64_t dice = Between(1, 100);
    if (dice <= 45) return Submit();
    if (dice <= 58) return Cancel();
    if (dice <= 68) return TogglePause();
    if (dice <= 78) return CreateSession();
    if (dice <= 85) return Fork();
    if (dice <= 90) return Delete();
    if (dice <= 94) return world_->clock->Advance(double(Between(0, 5)));
    if (dice <= 98) {
      if (auto* session = Pick(&sessions_)) CheckSession(session->get());
      return Collect();
    }
    RunOnce();
  }

  // ---- What callers do

  std::vector<int32_t> DrawPrompt() {
    const int64_t n = Chance(70) ? Between(1, 120) : Between(200, 900);
    std::vector<int32_t> prompt(static_cast<size_t>(n));
    for (int32_t& token : prompt) token = int32_t(Between(2, FakeConfig().vocab - 1));
    return prompt;
  }

  void DrawPolicy(EngineRequest* r) {
    r->prefill = *PrefillPreset(Chance(90) ? "entropy" : "entropy_paper", "simulation");
    r->prefill.params.segment = kSegment;
    static const char* const kPresets[] = {"full", "full", "latent", "snapkv", "adakv"};
    r->kv = *KvPreset(kPresets[Between(0, 4)], "simulation");
    if (r->kv.params.rule == KvRule::kFull) return;
    r->kv.params.window = int32_t(Between(4, 16));
    if (r->kv.params.rule != KvRule::kSnapKv) r->kv.params.gap = int32_t(Between(0, 8));
    r->kv.params.budget = int32_t(Between(48, 120));
    r->trace = true;  // says which tokens were kept
  }

  void Submit() {
    auto request = std::make_shared<SimulatedRequest>();
    EngineRequest& r = request->request;
    r.prompt = DrawPrompt();
    r.owner = kOwners[Between(0, 1)];
    r.sampling.temperature = 0;
    // At most half a budget after the gap: a turn is compressed once (see CheckAnswer).
    r.sampling.max_new_tokens = Between(0, 20);
    if (Chance(20)) r.sampling.repetition_penalty = 1.25f;
    if (Chance(10)) r.sampling.forced_token_ids = {5, 6};
    r.sampling.max_new_tokens =
        std::max<int64_t>(r.sampling.max_new_tokens, int64_t(r.sampling.forced_token_ids.size()));
    DrawPolicy(&r);
    r.progress = Chance(70);
    if (Chance(50)) r.end_of_turn = {7, 8};
    if (Chance(25)) r.deadline = world_->clock->Now() + std::chrono::milliseconds(Between(0, 3000));
    if (auto* session = Pick(&sessions_); session && Chance(60)) {
      request->session = *session;
      r.session_id = (*session)->id;
      r.owner = (*session)->owner;
    } else if (Chance(20) && r.sampling.max_new_tokens > 0 && r.kv.params.rule == KvRule::kFull) {
      r.sampling.stop_token_ids = {NextFakeToken(r.prompt)};
    }
    const auto id = engine().Submit(r, request);
    ++counts_.requests;
    if (!id.ok()) {
      ++counts_.refused;
      if (!IsRetryable(id.status())) Wrong("refused: " + id.status().ToString());
      return;
    }
    request->id = *id;
    ++submitted_;
    open_.push_back(std::move(request));
  }

  void Cancel() {
    auto* picked = Pick(&open_);
    if (!picked) return;
    SimulatedRequest& r = **picked;
    if (!r.cancel_asked) {
      ++(!r.accepted       ? counts_.cancelled_unseen
         : !r.ids.empty()  ? counts_.cancelled_decoding
         : r.prefilled > 0 ? counts_.cancelled_prefilling
                           : counts_.cancelled_waiting);
      counts_.cancelled_paused += r.paused;
    }
    r.cancel_asked = r.expects_cancel = true;
    engine().Cancel(r.id, absl::CancelledError("simulation"));
  }

  void TogglePause() {
    if (auto* picked = Pick(&open_)) {
      (*picked)->paused = !(*picked)->paused;
      engine().SetPaused((*picked)->id, (*picked)->paused);
    }
  }

  void AddSession(const absl::StatusOr<SessionInfo>& info, const std::string& owner,
                  const SimulatedSession* parent) {
    if (!info.ok()) {
      const bool known = absl::IsResourceExhausted(info.status()) ||
                         (parent && (Reason(info.status()) == kSessionBusy ||
                                     Reason(info.status()) == kSessionLost));
      if (!known) Wrong("a session: " + info.status().ToString());
      return;
    }
    auto session = std::make_shared<SimulatedSession>();
    if (parent) *session = *parent;
    session->id = info->id;
    session->owner = owner;
    sessions_.push_back(session);
    CheckSession(session.get());
  }

  void CreateSession() {
    const std::string owner = kOwners[Between(0, 1)];
    AddSession(engine().CreateSession(owner), owner, nullptr);
  }

  void Fork() {
    auto* picked = Pick(&sessions_);
    if (!picked) return;
    const std::shared_ptr<SimulatedSession> parent = *picked;
    const auto info = engine().ForkSession(parent->owner, parent->id);
    Collect();  // the call ran what had been posted before it
    counts_.forks += info.ok();
    forked_ = forked_ || info.ok();
    AddSession(info, parent->owner, parent.get());
  }

  void Delete() {
    auto* picked = Pick(&sessions_);
    if (!picked) return;
    const std::shared_ptr<SimulatedSession> session = *picked;
    std::erase(sessions_, session);
    session->deleted = true;
    for (const auto& r : open_) {
      if (r->session != session) continue;
      r->expects_cancel = true;
      ++counts_.deleted_while_busy;
    }
    const absl::Status status = engine().DeleteSession(session->owner, session->id);
    if (!status.ok() && !NoteLost(session.get(), status)) Wrong("delete: " + status.ToString());
    Collect();
  }

  // ---- What must hold

  void RunOnce() {
    engine().RunOnce();
    if (engine().Stats().pages_used != world_->pool->used()) Wrong("pages are miscounted");
    Collect();
    CheckStats();
  }

  // Takes the requests that have ended. Looking at a session runs what has been posted, which may
  // end more.
  void Collect() {
    while (true) {
      std::vector<std::shared_ptr<SimulatedRequest>> ended;
      for (const auto& r : open_) {
        if (r->finished) ended.push_back(r);
      }
      if (ended.empty()) break;
      std::erase_if(open_, [](const auto& r) { return r->finished.has_value(); });
      for (const auto& r : ended) Count(r.get());
      for (const auto& r : ended) {
        if (r->session && !r->session->deleted) CheckSession(r->session.get());
      }
    }
    std::erase_if(sessions_, [](const auto& s) { return s->lost; });
  }

  void Count(SimulatedRequest* r) {
    ++ended_;
    const FinishedEvent& end = *r->finished;
    counts_.completed += end.status.ok();
    counts_.expired += absl::IsDeadlineExceeded(end.status);
    counts_.compressions += end.receipt.compressed;
    counts_.later_turns += end.status.ok() && end.receipt.cached_tokens > 0;
    r->CheckAnswer(&counts_.checked_tokens);
    if (!r->error.empty()) Wrong(r->error);
  }

  // Only what no tier could take, or nobody used for long, may be lost, and it is said to be so.
  bool NoteLost(SimulatedSession* s, const absl::Status& status) {
    // A server does not know what the one before it lost.
    const bool forgotten = restarted_ && absl::IsNotFound(status);
    if (Reason(status) != kSessionLost && !forgotten) return false;
    const EngineOptions& o = engine_options_;
    const bool files_hold_all = !o.session_dir.empty() && o.session_dir_bytes == 0;
    if (files_hold_all && o.session_ttl_seconds == 0)
      Wrong("a session is lost although there are files: " + status.ToString());
    counts_.lost += !s->lost;
    s->lost = true;
    return true;
  }

  void CheckSession(SimulatedSession* s) {
    const auto info = engine().GetSession(s->owner, s->id);
    if (!info.ok()) {
      if (!NoteLost(s, info.status())) Wrong("a session is gone: " + info.status().ToString());
      return;
    }
    counts_.host_sessions += info->tier == SessionTier::kHost;
    counts_.disk_sessions += info->tier == SessionTier::kDisk;
    for (const auto& r : open_) {
      if (r->session.get() == s) return;  // its turn may be under way
    }
    if (info->positions != s->conversation.positions || info->turns != s->turns) {
      Wrong(absl::StrCat("a session has ", info->positions, " positions after ", info->turns,
                         " turns, not ", s->conversation.positions, " after ", s->turns));
    }
  }

  void CheckStats() {
    const EngineStats s = engine().Stats();
    if (s.admitted != s.completed + s.cancelled + s.failed + s.running + s.waiting)
      Wrong("the counts do not add up");
    if (s.admitted != submitted_ || s.completed + s.cancelled + s.failed != ended_)
      Wrong("a request was not counted, or twice");
  }

  void CheckCorruptions() {
    const int64_t rows = world_->model->corruptions();
    if (rows > 0) Wrong(absl::StrCat(rows, " rows of another sequence were read"));
  }

  // Everybody reads, nothing fails any more: whoever is open ends within a bound, which is what
  // each would take alone.
  void RunToTheEnd() {
    failure_percent_ = 0;
    for (const auto& r : open_) engine().SetPaused(r->id, false);
    if (Chance(10)) {
      for (const auto& r : open_) r->expects_cancel = true;
      counts_.drained += !open_.empty();
      engine().Drain(std::chrono::steady_clock::now());
      return Collect();
    }
    constexpr int64_t kSlack = 100;  // steps; SchedulerOptions::patience_steps and some more
    int64_t bound = kSlack;
    for (const auto& r : open_) {
      bound +=
          int64_t(r->request.prompt.size()) / kSegment + r->request.sampling.max_new_tokens + 3;
    }
    while (!open_.empty() && wrong_.empty()) {
      if (bound-- == 0) return Wrong(absl::StrCat("request ", open_[0]->id, " is starved"));
      RunOnce();
    }
  }

  // Nothing runs: the pool holds the sessions' pages and nothing else, and then nothing.
  void ReturnEverything() {
    int64_t bytes = 0;
    for (const auto& session : sessions_) {
      CheckSession(session.get());
      const auto info = engine().GetSession(session->owner, session->id);
      if (info.ok() && info->tier == SessionTier::kDevice) bytes += info->kv_bytes;
    }
    const int64_t used = world_->pool->used() * world_->pool->page_bytes();
    // Forks share pages, and each is charged for all of its own.
    if (used > bytes || (!forked_ && used != bytes))
      Wrong(absl::StrCat("the pool holds ", used, " bytes, the sessions ", bytes));
    while (!sessions_.empty() && wrong_.empty()) Delete();
    RunOnce();  // some expired while others were deleted: counts are a step's
    if (world_->pool->available() != world_->pool->total())
      Wrong(
          absl::StrCat(world_->pool->total() - world_->pool->available(), " pages did not return"));
    if (engine().Stats().sessions != 0) Wrong("a deleted session stays");
  }

  // A server ends and another begins on the same files: conversations go on.
  void Restart() {
    CheckCorruptions();
    world_.reset();
    restarted_ = true;
    StartEngine();
    submitted_ = ended_ = 0;
    ++counts_.restarts;
    for (const auto& session : sessions_) CheckSession(session.get());
    std::erase_if(sessions_, [](const auto& s) { return s->lost; });
    for (int i = 0; i < 10 && wrong_.empty(); ++i) Submit();
    if (wrong_.empty()) RunToTheEnd();
  }

  void SwapPages(const Batch& batch) {
    if (planted_) return;
    std::vector<const BatchSeq*> filled;
    for (int i = 0; i < batch.num_seqs; ++i) {
      if (batch.seqs[i].position > 0) filled.push_back(&batch.seqs[i]);
    }
    if (filled.size() < 2) return;
    auto* const a = const_cast<int32_t*>(filled[0]->pages);
    auto* const b = const_cast<int32_t*>(filled[1]->pages);
    if (a[0] == b[0]) return;  // two forks
    std::swap(a[0], b[0]);
    planted_ = true;
  }

  const bool plant_swap_;
  SimulationCounts& counts_;
  std::mt19937_64 random_;
  int64_t failure_percent_ = 0;
  const EngineOptions engine_options_;
  const int64_t pages_;  // of the pool
  int64_t max_rows_ = 0;
  std::optional<ManualEngine> world_;
  double step_seconds_ = 0;
  std::vector<std::shared_ptr<SimulatedRequest>> open_;
  std::vector<std::shared_ptr<SimulatedSession>> sessions_;
  int64_t submitted_ = 0, ended_ = 0;
  bool forked_ = false, planted_ = false, restarted_ = false;
  std::string wrong_;
};

}  // namespace

std::string Simulate(const SimulationOptions& options, SimulationCounts* counts, bool* planted) {
  Simulation simulation(options, counts);
  std::string wrong = simulation.Run();
  if (planted) *planted = simulation.planted();
  return wrong;
}

}  // namespace entropyserve
