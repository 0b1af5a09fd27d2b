// One step of the engine: admission, the batch, what follows from it, and the end of requests.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "engine/engine_impl.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

// When memory may have been given back by a session's end.
constexpr double kRetrySeconds = 1.0;

}  // namespace

void EngineImpl::Step() {
  worked_ = false;
  tiers_.Advance(std::exchange(step_rows_, 0));
  ReleaseArrived();
  MakeRoomForWaiting();
  StepPlan plan = scheduler_.Next(pool_->available());
  for (uint64_t id : plan.admit) {
    Sequence* const s = sequences_.at(id).get();
    if (!Admit(s)) {
      scheduler_.Requeue(id);
    } else if (s->arriving) {
      scheduler_.Hold(id);
    } else {
      continue;
    }
    std::erase_if(plan.work, [id](const StepPlan::Work& work) { return work.id == id; });
  }
  if (scheduler_.running() == 0 && !compare_) RefuseWhatCannotStart(plan);
  if (plan.work.empty()) return;
  const TimePoint begin = clock_->Now();
  if (!BuildBatch(plan)) return;
  RunBatch(plan, begin);
  ++counts_.steps;
  step_rows_ = step_.batch().rows;
  // The rate that estimates are made of: of steps that mostly prefill.
  int64_t prefilled = 0, prefills = 0;
  for (const StepPlan::Work& work : plan.work) {
    prefilled += work.prefill ? work.tokens : 0;
    prefills += work.prefill;
  }
  const double seconds = Seconds(begin, clock_->Now());
  observer_->OnStep({.seconds = seconds,
                     .prefill_tokens = prefilled,
                     .decodes = int64_t(plan.work.size()) - prefills,
                     .prefills = prefills});
  if (2 * prefilled > step_.batch().rows && seconds > 0) {
    constexpr double kWeight = 0.2;
    const double rate = double(prefilled) / seconds;
    prefill_rate_ = prefill_rate_ == 0 ? rate : (1 - kWeight) * prefill_rate_ + kWeight * rate;
  }
}

// Nothing runs, and idle sessions have been moved out of the way where that could help: what holds
// the memory are sessions of requests that wait too. Refuse the first rather than block the queue;
// its own session can move then. What was admitted in `plan` is waiting again, for want of memory
// for its tables.
void EngineImpl::RefuseWhatCannotStart(const StepPlan& plan) {
  if (tiers_.moving()) return;
  std::vector<RequestId> stuck = plan.admit;
  if (stuck.empty()) {
    const SchedulerRequest* const next = scheduler_.NextToAdmit();
    if (next && next->pages > pool_->available()) stuck.push_back(next->id);
  }
  for (const RequestId id : stuck) {
    Finish(sequences_.at(id).get(), FinishReason::kError,
           WithRetryAfter(absl::ResourceExhaustedError(
                              "other sessions hold the memory that this request needs; "
                              "delete some, or try again"),
                          kRetrySeconds));
  }
  worked_ = worked_ || !stuck.empty();  // the next may fit now
}

bool EngineImpl::Admit(Sequence* s) {
  const SamplingParams& p = s->request.sampling;
  const bool penalties =
      p.repetition_penalty != 1.0f || p.presence_penalty != 0.0f || p.frequency_penalty != 0.0f;
  if (penalties && s->plan.max_new > 0) {
    const int64_t vocab = model_->config().vocab;
    s->history = DeviceArray<uint32_t>(backend_.get(), vocab);
    if (!s->history.ok()) return false;
    constexpr uint32_t kInSession = 1u << 31;
    s->host_history.assign(vocab, 0);
    for (int32_t id : s->input) s->host_history[id] = kInSession;
    for (int64_t id = 0; s->session && id < vocab; ++id) {
      if (s->session->seen[id]) s->host_history[id] = kInSession;
    }
    backend_->CopyIn(s->history.data(), s->host_history.data(), vocab * sizeof(uint32_t));
  }
  const bool away = s->session && !s->cache->resident();
  if (away && !s->cache->TakeBack().ok()) return false;
  if (!s->cache->BeginTurn(s->plan).ok()) {
    if (away) s->cache->PageOut();
    return false;
  }
  if (away) tiers_.Bring(s->session);
  s->arriving = away && tiers_.Arriving(s->session);
  s->admitted = true;
  Begin(s);
  const int64_t tokens = int64_t(s->request.prompt.size());
  MutexLock lock(&mutex_);
  --queued_requests_;
  queued_tokens_ -= tokens;
  quotas_.Admitted(s->request.owner, tokens);
  return true;
}

void EngineImpl::Begin(Sequence* s) {
  s->started = clock_->Now();
  s->receipt.queue_seconds = Seconds(s->submitted, s->started);
}

// Requests whose session has come into the pool whole begin.
void EngineImpl::ReleaseArrived() {
  for (auto& [id, s] : sequences_) {
    if (!s->arriving || tiers_.Arriving(s->session)) continue;
    s->arriving = false;
    scheduler_.Release(id);
    Begin(s.get());
  }
}

// False: the step cannot run, and the requests that are to blame have been ended.
bool EngineImpl::BuildBatch(const StepPlan& plan) {
  int64_t rows = 0;
  for (const StepPlan::Work& work : plan.work) rows += work.tokens;
  step_.Clear();
  for (const StepPlan::Work& work : plan.work) {
    Sequence* const s = sequences_.at(work.id).get();
    const bool last = work.prefill && s->prefilled + work.tokens == int64_t(s->input.size());
    const bool samples = s->plan.max_new > 0 && (last || !work.prefill);
    const bool bans_ends = samples && s->generated < s->request.sampling.min_new_tokens;
    std::vector<int32_t> banned;
    if (bans_ends) {
      banned = end_ids_;
      const std::vector<int32_t>& stops = s->request.sampling.stop_token_ids;
      banned.insert(banned.end(), stops.begin(), stops.end());
    }
    s->cache->Append(work.tokens);
    step_.Add(s, work.tokens, work.prefill, samples, banned);
  }
  absl::Status status = model_->EnsureRows(rows);
  if (status.ok() && !step_.Upload())
    status = absl::ResourceExhaustedError("no memory for a step's batch");
  if (status.ok()) return true;
  // Prefills make a step large. Where none runs the newest request ends: steps that get smaller
  // fit some time.
  std::vector<RequestId> to_end;
  RequestId newest = 0;
  for (const StepPlan::Work& work : plan.work) {
    if (work.prefill) to_end.push_back(work.id);
    newest = std::max(newest, work.id);
  }
  if (to_end.empty()) {
    to_end.push_back(newest);
    status = WithRetryAfter(status, kRetrySeconds);
  }
  for (const RequestId id : to_end) Finish(sequences_.at(id).get(), FinishReason::kError, status);
  worked_ = true;  // the others may run at once
  return false;
}

void EngineImpl::RunBatch(const StepPlan& plan, TimePoint begin) {
  const int64_t n = int64_t(step_.sample_rows().size());
  const float* logits = model_->Forward(step_.batch(), pool_->kv(), step_.logit_rows(), n);
  samples_.resize(n);
  if (n > 0) {
    backend_->Sample({.logits = logits,
                      .vocab = model_->config().vocab,
                      .rows = step_.sample_rows().data(),
                      .n = int32_t(n),
                      .results = samples_.data()});
  }
  backend_->Synchronize();
  const double seconds = Seconds(begin, clock_->Now());
  // Ends of sequences erase them: sequences that were sampled from are looked up by their ids.
  std::vector<RequestId> sampled;
  for (const Sequence* s : step_.sampled()) sampled.push_back(s->id);
  for (const StepPlan::Work& work : plan.work) {
    Sequence* const s = sequences_.at(work.id).get();
    if (work.prefill) s->prefill_step_seconds += seconds;
    s->shared |= plan.work.size() > 1;
    AfterWork(s, work);
  }
  for (int64_t i = 0; i < n; ++i) {
    if (auto it = sequences_.find(sampled[i]); it != sequences_.end()) {
      AfterSample(it->second.get(), samples_[i]);
    }
  }
  worked_ = true;
}

void EngineImpl::AfterWork(Sequence* s, const StepPlan::Work& work) {
  s->cache->Advance(work.tokens);
  if (!work.prefill) {
    ++s->decode_steps;
    s->last_token = -1;
    if (s->decode_steps == s->gap()) CompressIfWanted(s);
    return;
  }
  s->prefilled += work.tokens;
  counts_.prompt_tokens += work.tokens;
  if (s->request.progress) s->sink->OnProgress(s->prefilled, int64_t(s->input.size()));
  if (!s->prefilling()) AfterPrefill(s);
}

void EngineImpl::AfterPrefill(Sequence* s) {
  s->prefill_done = clock_->Now();
  if (s->session) {
    for (int32_t id : s->input) s->session->seen[id] = true;
  }
  const AttentionShape shape = model_->shape();
  s->receipt.attention_flops_executed = ExecutedAttentionFlops(shape, s->cache->ReadCounters());
  s->receipt.attention_flops_dense =
      DenseAttentionFlops(shape, s->receipt.cached_tokens, int64_t(s->input.size()));
  const PrefillParams& p = s->request.prefill.params;
  std::vector<float> entropy;
  if (!p.full && p.budget == BudgetRule::kEntropy) {
    int64_t rigid = 0;
    const std::vector<HeadState> states = s->cache->ReadStates();
    for (size_t i = size_t(p.first_sparse_layer) * shape.kv_heads; i < states.size(); ++i) {
      // The first entropy is that of the second segment: a shorter prompt judges nobody.
      constexpr int32_t kFewestSegments = 2;
      if (states[i].segments < kFewestSegments) continue;
      entropy.push_back(states[i].entropy);
      rigid += states[i].not_rigid == 0;
    }
    s->receipt.rigid_share = entropy.empty() ? 0 : double(rigid) / double(entropy.size());
  }
  observer_->OnPrefill({.receipt = &s->receipt,
                        .entropy = entropy,
                        .step_seconds = s->prefill_step_seconds,
                        .alone = !s->shared});
  if (s->request.trace) FillTrace(s);
  s->cache->EndPrefill();
  s->receipt.kv_bytes_before = s->receipt.kv_bytes_after = s->cache->kv_bytes();
  if (s->gap() == 0 && s->plan.max_new > 0) CompressIfWanted(s);
  if (s->plan.max_new == 0) Finish(s, FinishReason::kLength, absl::OkStatus());
}

void EngineImpl::CompressIfWanted(Sequence* s) {
  if (!s->cache->WantsCompression(s->request.kv.params)) return;
  const int64_t before = s->cache->kv_bytes();
  const TimePoint begin = clock_->Now();
  s->cache->Compress(s->request.kv.params);
  s->receipt.kv_bytes_after = s->cache->kv_bytes();
  observer_->OnCompress(Seconds(begin, clock_->Now()), before, s->receipt.kv_bytes_after);
  // A long answer is compressed again when its session is parked: the receipt spans both.
  if (!s->receipt.compressed) s->receipt.kv_bytes_before = before;
  s->receipt.compressed = true;
  if (!s->trace) return;
  s->trace->kept_positions.clear();
  for (int layer = 0; layer < s->trace->layers; ++layer) {
    for (int h = 0; h < s->trace->kv_heads; ++h) {
      s->trace->kept_positions.push_back(s->cache->ReadPositions(layer, h));
    }
  }
}

void EngineImpl::FillTrace(Sequence* s) {
  SequenceCache::TraceData data = s->cache->ReadTrace();
  s->trace = std::make_shared<Trace>();
  s->trace->layers = model_->config().layers;
  s->trace->kv_heads = model_->config().kv_heads;
  s->trace->segment = s->request.prefill.params.segment;
  s->trace->block = s->request.prefill.params.block;
  s->trace->segments = data.segments;
  s->trace->entropy = std::move(data.entropy);
  s->trace->budget = std::move(data.budget);
  s->trace->selected = std::move(data.selected);
}

void EngineImpl::AfterSample(Sequence* s, const SampleResult& sample) {
  if (!sample.finite) {
    Finish(s, FinishReason::kError,
           absl::InternalError("the model's logits are not finite; its weights may be damaged"));
    return;
  }
  if (s->generated == 0) {
    s->first_token = clock_->Now();
    s->receipt.ttft_seconds = Seconds(s->submitted, s->first_token);
  }
  ++counts_.generated_tokens;
  TokenOutcome outcome = AcceptToken(s, sample, end_ids_);
  if (s->history.ok()) {
    backend_->CopyIn(s->history.data() + sample.token, &s->host_history[sample.token],
                     sizeof(uint32_t));
  }
  s->sink->OnTokens(std::move(outcome.event));
  if (outcome.finished)
    Finish(s, *outcome.finished, absl::OkStatus(), std::move(outcome.stop_string));
}

void EngineImpl::FillReceipt(Sequence* s) {
  Receipt& r = s->receipt;
  const TimePoint now = clock_->Now();
  r.generated_tokens = s->generated;
  r.total_seconds = Seconds(s->submitted, now);
  if (!s->admitted) r.queue_seconds = r.total_seconds;
  if (s->admitted) {
    const bool prefilled = s->prefill_done != TimePoint{};
    r.prefill_seconds = Seconds(s->started, prefilled ? s->prefill_done : now);
    r.decode_seconds = prefilled ? Seconds(s->prefill_done, now) : 0;
  }
}

void EngineImpl::ReturnCache(Sequence* s, bool failed) {
  Session* const session = s->session;
  if (!session) return;
  s->session = nullptr;
  if (s->loading) return;  // settled when it has been read
  if (s->cache && s->cache->in_turn()) {
    const bool nothing_said = failed && s->generated == 0 && !s->receipt.compressed;
    if (s->prefilling() || nothing_said) {
      s->cache->RollBack();  // as if the turn had not been
    } else {
      if (!failed) CompressIfWanted(s);
      s->cache->EndTurn();
      // What no step has read yet comes first in the next turn.
      session->pending.clear();
      const std::vector<int32_t>& end = s->request.end_of_turn;
      if (s->last_token >= 0) session->pending.push_back(s->last_token);
      const bool said = !end.empty() && s->last_token == end.front();
      if (s->generated > 0)
        session->pending.insert(session->pending.end(), end.begin() + said, end.end());
      ++session->turns;
      session->kv_policy = s->request.kv.name;
      tiers_.Changed(session);
    }
  }
  tiers_.Settle(session);
}

void EngineImpl::Finish(Sequence* s, FinishReason reason, absl::Status status,
                        std::string stop_string) {
  const bool failed = reason == FinishReason::kError;
  scheduler_.Remove(s->id);
  ReturnCache(s, failed);
  s->owned.reset();
  FillReceipt(s);
  const auto node = sequences_.extract(s->id);  // alive until the end of this function
  if (failed) {
    ++counts_.failed;
  } else if (reason == FinishReason::kCancelled) {
    ++counts_.cancelled;
  } else {
    ++counts_.completed;
  }
  PublishStats();
  const int64_t tokens = int64_t(s->request.prompt.size());
  s->sink->OnFinished({.reason = reason,
                       .stop_string = std::move(stop_string),
                       .status = std::move(status),
                       .receipt = s->receipt,
                       .trace = s->trace});
  MutexLock lock(&mutex_);
  if (!s->admitted) {
    --queued_requests_;
    queued_tokens_ -= tokens;
    quotas_.Admitted(s->request.owner, tokens);
  }
  quotas_.Finished(s->request.owner);
  if (--open_requests_ == 0) idle_.NotifyAll();
}

}  // namespace entropyserve
