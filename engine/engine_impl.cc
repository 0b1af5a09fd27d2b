#include "engine/engine_impl.h"

#include <algorithm>
#include <future>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

SchedulerOptions SchedulerOptionsOf(const EngineOptions& options) {
  return {.step_tokens = options.step_tokens,
          .lone_chunk_tokens = options.lone_chunk_tokens,
          .max_sequences = options.max_sequences};
}

std::vector<int32_t> EndIds(const ModelConfig& config, const Tokenizer& tokenizer) {
  std::vector<int32_t> ids = config.eos_ids;
  ids.insert(ids.end(), tokenizer.eos_ids().begin(), tokenizer.eos_ids().end());
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

uint64_t RandomSeed() {
  std::random_device random;
  return (uint64_t{random()} << 32) | random();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(EngineParts parts) {
  ASSIGN_OR_RETURN(std::unique_ptr<PagePool> pool,
                   PagePool::Create(parts.backend.get(), parts.model->dtype(),
                                    parts.model->config().head_dim, parts.pages));
  std::unique_ptr<SessionDir> dir;
  if (!parts.options.session_dir.empty()) {
    ASSIGN_OR_RETURN(dir, SessionDir::Open(parts.options.session_dir));
  }
  return std::make_unique<EngineImpl>(std::move(parts), std::move(pool), std::move(dir));
}

EngineImpl::EngineImpl(EngineParts parts, std::unique_ptr<PagePool> pool,
                       std::unique_ptr<SessionDir> dir)
    : options_(parts.options),
      clock_(std::move(parts.clock)),
      tokenizer_(std::move(parts.tokenizer)),
      backend_(std::move(parts.backend)),
      model_(std::move(parts.model)),
      pool_(std::move(pool)),
      observer_(parts.observer ? std::move(parts.observer) : std::make_shared<EngineObserver>()),
      context_(options_.max_context > 0 ? options_.max_context : model_->config().context),
      end_ids_(EndIds(model_->config(), *tokenizer_)),
      manual_(parts.manual),
      scheduler_(SchedulerOptionsOf(options_)),
      sessions_(clock_.get(), options_.max_sessions),
      tiers_({.options = &options_,
              .clock = clock_.get(),
              .backend = backend_.get(),
              .pool = pool_.get(),
              .model = model_.get(),
              .model_identity = std::move(parts.model_identity),
              .observer = observer_.get(),
              .store = &sessions_,
              .dir = std::move(dir),
              .post = [this](Task task) { Post(std::move(task)); },
              .inline_io = parts.manual}),
      step_(backend_.get()),
      seed_state_(RandomSeed()),
      quotas_(options_) {
  PublishStats();
  if (!manual_) thread_ = std::thread([this] { Run(); });
}

EngineImpl::~EngineImpl() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    wake_.NotifyAll();
  }
  if (manual_) {
    RunInbox();
    CancelAll();
    WriteSessions();
  } else {
    thread_.join();
  }
  sessions_.Clear();
}

// ---- Any thread
// ----------------------------------------------------------------------------------

absl::Status EngineImpl::ValidateRequest(const EngineRequest& r) const {
  const int vocab = model_->config().vocab;
  RETURN_IF_ERROR(Validate(r.sampling, vocab));
  RETURN_IF_ERROR(Validate(r.prefill, "policy.prefill"));
  RETURN_IF_ERROR(Validate(r.kv, "policy.kv"));
  if (r.prompt.empty()) return absl::InvalidArgumentError("prompt: it has no tokens");
  for (int32_t id : r.prompt) {
    if (id < 0 || id >= vocab) {
      return absl::InvalidArgumentError(
          absl::StrCat("token_ids: ", id, " is not in [0, ", vocab, ")"));
    }
  }
  const int64_t tokens = int64_t(r.prompt.size());
  if (tokens + (r.sampling.max_new_tokens > 0) > context_) {
    return absl::InvalidArgumentError(absl::StrCat("prompt: ", tokens,
                                                   " tokens do not fit the context of ", context_,
                                                   " with room for an answer"));
  }
  if (r.prefill.params.whole_prompt && !r.prefill.params.full) {
    if (tokens > options_.max_whole_prompt_tokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          "policy.prefill: ", r.prefill.name, " reads a prompt in one piece and takes at most ",
          options_.max_whole_prompt_tokens, " tokens (--max-whole-prompt-tokens), this one has ",
          tokens));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RequestId> EngineImpl::Submit(EngineRequest request,
                                             std::shared_ptr<EventSink> sink) {
  RETURN_IF_ERROR(ValidateRequest(request));
  TextStream::Options text_options{.stops = request.sampling.stop,
                                   .strip_leading_space = request.strip_leading_space};
  ASSIGN_OR_RETURN(TextStream text, TextStream::Create(*tokenizer_, std::move(text_options)));
  auto sequence = std::make_unique<Sequence>();
  sequence->text.emplace(std::move(text));
  sequence->submitted = clock_->Now();
  sequence->sink = std::move(sink);
  const int64_t tokens = int64_t(request.prompt.size());
  sequence->request = std::move(request);

  MutexLock lock(&mutex_);
  if (stop_ || draining_)
    return absl::UnavailableError("the server is shutting down; use another one");
  RETURN_IF_ERROR(quotas_.Check(sequence->request.owner, tokens, retry_after_));
  if (queued_requests_ >= options_.max_queue_requests) {
    return WithRetryAfter(absl::ResourceExhaustedError(absl::StrCat(
                              "the queue holds ", queued_requests_, " requests, its limit")),
                          retry_after_);
  }
  if (queued_requests_ > 0 && queued_tokens_ + tokens > options_.max_queue_tokens) {
    return WithRetryAfter(absl::ResourceExhaustedError(absl::StrCat(
                              "the queue holds ", queued_tokens_, " prompt tokens of at most ",
                              options_.max_queue_tokens, "; ", tokens, " more do not fit")),
                          retry_after_);
  }
  const RequestId id = next_id_++;
  sequence->id = id;
  ++queued_requests_;
  ++open_requests_;
  queued_tokens_ += tokens;
  quotas_.Queued(sequence->request.owner, tokens);
  // std::function needs something it can copy.
  auto shared = std::make_shared<std::unique_ptr<Sequence>>(std::move(sequence));
  inbox_.push_back([this, shared] { Enqueue(std::move(*shared)); });
  wake_.NotifyOne();
  return id;
}

void EngineImpl::Post(Task task) {
  MutexLock lock(&mutex_);
  inbox_.push_back(std::move(task));
  wake_.NotifyOne();
}

void EngineImpl::Cancel(RequestId id, absl::Status why) {
  Post([this, id, why = std::move(why)] {
    const auto it = sequences_.find(id);
    if (it != sequences_.end()) Finish(it->second.get(), FinishReason::kCancelled, why);
  });
}

void EngineImpl::SetPaused(RequestId id, bool paused) {
  Post([this, id, paused] { scheduler_.SetPaused(id, paused); });
}

EngineStats EngineImpl::Stats() const {
  MutexLock lock(&mutex_);
  EngineStats stats = stats_;
  stats.queued_tokens = queued_tokens_;
  return stats;
}

void EngineImpl::Drain(TimePoint deadline) {
  {
    MutexLock lock(&mutex_);
    draining_ = true;
    while (open_requests_ > 0) {
      const auto left = deadline - std::chrono::steady_clock::now();
      if (left <= left.zero() || !idle_.WaitFor(&mutex_, left)) break;
    }
  }
  Post([this] { CancelAll(); });
  if (manual_) RunInbox();
  {
    MutexLock lock(&mutex_);
    while (open_requests_ > 0) idle_.Wait(&mutex_);
  }
  FlushSessions();
}

// ---- The engine thread
// ---------------------------------------------------------------------------

void EngineImpl::Run() {
  while (RunInbox()) {
    ExpireDeadlines();
    Step();
    StepCompare();
    PublishStats();
  }
  CancelAll();
  WriteSessions();
}

void EngineImpl::RunOnce() {
  Check(manual_, "the engine has a thread");
  RunInbox();
  ExpireDeadlines();
  Step();
  StepCompare();
  PublishStats();
}

void EngineImpl::CancelAll() {
  while (!sequences_.empty()) {
    Finish(sequences_.begin()->second.get(), FinishReason::kCancelled,
           absl::UnavailableError("the server is shutting down"));
  }
  if (compare_) {
    EndCompare(compare_->channel(), absl::UnavailableError("the server is shutting down"));
  }
}

bool EngineImpl::RunInbox() {
  const double expiry = tiers_.SecondsToExpiry();
  bool stop;
  {
    MutexLock lock(&mutex_);
    // Nothing to run: sleep until somebody posts, but look at deadlines now and then.
    constexpr auto kIdlePoll = std::chrono::milliseconds(50);
    if (inbox_.empty() && !stop_ && !worked_ && !tiers_.copying() && !manual_) {
      if (!sequences_.empty() || compare_) {
        wake_.WaitFor(&mutex_, kIdlePoll);
      } else if (expiry >= 0) {
        // The engine's clock need not be this wait's: look once a second.
        wake_.WaitFor(&mutex_, std::chrono::milliseconds(int64_t(1e3 * std::min(expiry, 1.0)) + 1));
      } else {
        while (inbox_.empty() && !stop_) wake_.Wait(&mutex_);
      }
    }
    stop = stop_;
  }
  RunTasks();
  return !stop;
}

void EngineImpl::RunTasks() {
  tiers_.Expire();
  std::deque<Task> tasks;
  {
    MutexLock lock(&mutex_);
    tasks.swap(inbox_);
  }
  for (Task& task : tasks) task();
}

void EngineImpl::Enqueue(std::unique_ptr<Sequence> sequence) {
  Sequence* const s = sequence.get();
  sequences_[s->id] = std::move(sequence);
  ++counts_.admitted;
  if (!s->request.session_id.empty()) {
    if (absl::Status status = UseSession(s); !status.ok()) {
      Finish(s, FinishReason::kError, status);
      return;
    }
  }
  if (!s->loading) Start(s);
}

// Its session's tokens, if it has one, are in memory: it may wait for pages now.
void EngineImpl::Start(Sequence* s) {
  if (absl::Status status = Prepare(s); !status.ok()) {
    Finish(s, FinishReason::kError, status);
    return;
  }
  const PrefillParams& p = s->request.prefill.params;
  const int64_t ahead = scheduler_.waiting();
  const int64_t backlog = scheduler_.waiting_tokens() + scheduler_.prefill_backlog();
  if (absl::Status status = RefuseLate(*s, EstimateSeconds(backlog)); !status.ok()) {
    Finish(s, FinishReason::kError, status);
    return;
  }
  scheduler_.Enqueue({.id = s->id,
                      .prompt = int64_t(s->input.size()),
                      .pages = PagesToStart(*s),
                      .segment = p.segment,
                      .exclusive = p.whole_prompt && !p.full});
  s->sink->OnAccepted(
      {.prompt_tokens = s->receipt.prompt_tokens,
       .session_tokens = s->receipt.cached_tokens,
       .queue_position = ahead,
       .estimated_ttft_seconds = EstimateSeconds(backlog + int64_t(s->input.size()))});
}

// Lays out the turn, and refuses what can never run.
absl::Status EngineImpl::Prepare(Sequence* s) {
  EngineRequest& r = s->request;
  if (s->session) {
    s->cache = s->session->cache.get();
    s->input = s->session->pending;
  } else {
    s->owned = std::make_unique<SequenceCache>(backend_.get(), pool_.get(), model_->shape());
    s->cache = s->owned.get();
  }
  s->input.insert(s->input.end(), r.prompt.begin(), r.prompt.end());
  const int64_t before = s->cache->position(), tokens = int64_t(s->input.size());
  const bool answers = r.sampling.max_new_tokens > 0;
  if (before + tokens + answers > context_) {
    return absl::InvalidArgumentError(
        absl::StrCat("prompt: ", tokens, " tokens after the session's ", before,
                     " do not fit the context of ", context_, " with room for an answer"));
  }
  s->seed = r.sampling.seed.has_value() ? *r.sampling.seed : seed_state_++;
  s->plan = {.prompt = tokens,
             .max_new = std::min(r.sampling.max_new_tokens, context_ - before - tokens),
             .prefill = r.prefill.params,
             .kv = r.kv.params,
             .keep = s->session != nullptr,
             .trace = r.trace};
  s->receipt.prompt_tokens = tokens;
  s->receipt.cached_tokens = before;
  s->receipt.seed = s->seed;
  s->receipt.prefill_policy = r.prefill.name;
  s->receipt.kv_policy = r.kv.name;
  const int64_t most = pool_->total() - s->cache->pages_held();  // a session's own pages stay
  if (const int64_t need = PagesToStart(*s); need > most) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the request can never fit: it needs up to ", need * pool_->page_bytes(),
                     " bytes of KV cache, the server has ", most * pool_->page_bytes(),
                     " for it; shorten the prompt or max_new_tokens, or raise --kv-bytes"));
  }
  return absl::OkStatus();
}

// A request that will not see its first token in time is told so at once, and costs nobody
// anything. An idle engine refuses nobody: only by trying does it learn how fast it is.
absl::Status EngineImpl::RefuseLate(const Sequence& s, double backlog_seconds) const {
  if (!options_.refuse_late || scheduler_.waiting() + scheduler_.running() == 0)
    return absl::OkStatus();
  const double left = Seconds(clock_->Now(), s.request.deadline);
  const double alone = EstimateSeconds(int64_t(s.input.size()));
  if (alone > left) {
    return absl::DeadlineExceededError(
        absl::StrCat("the deadline is in ", left, " seconds, and reading the prompt takes about ",
                     alone, "; give it more time or shorten the prompt"));
  }
  if (backlog_seconds + alone <= left) return absl::OkStatus();
  return WithRetryAfter(
      absl::ResourceExhaustedError(
          absl::StrCat("the queue is too long for the deadline: the first token is expected in ",
                       backlog_seconds + alone, " seconds, the deadline is in ", left)),
      backlog_seconds + alone - left);
}

void EngineImpl::ExpireDeadlines() {
  const TimePoint now = clock_->Now();
  std::vector<Sequence*> expired;
  for (auto& [id, sequence] : sequences_) {
    if (sequence->request.deadline <= now) expired.push_back(sequence.get());
  }
  for (Sequence* s : expired) {
    Finish(s, FinishReason::kCancelled,
           absl::DeadlineExceededError("the request's deadline has passed"));
  }
}

double EngineImpl::EstimateSeconds(int64_t tokens) const {
  return prefill_rate_ > 0 ? double(tokens) / prefill_rate_ : 0;
}

int64_t EngineImpl::LogicalKvBytes() {
  int64_t positions = tiers_.idle_positions();
  for (const auto& [id, sequence] : sequences_) {
    if (sequence->cache && sequence->cache->resident()) positions += sequence->cache->position();
  }
  const AttentionShape shape = model_->shape();
  return positions * shape.layers * shape.kv_heads * pool_->page_bytes() / kPageTokens;
}

void EngineImpl::PublishStats() {
  counts_.running = scheduler_.running() + (compare_ ? 1 : 0);
  // For their session's file, too.
  counts_.waiting = int64_t(sequences_.size()) - scheduler_.running();
  counts_.pages_total = pool_->total();
  counts_.pages_used = pool_->used();
  counts_.page_bytes = pool_->page_bytes();
  counts_.weight_bytes = model_->weight_bytes();
  counts_.activation_bytes = model_->activation_bytes();
  counts_.kv_logical_bytes = LogicalKvBytes();
  counts_.memory = {{"weights", counts_.weight_bytes},
                    {"kv_pages", counts_.pages_total * counts_.page_bytes},
                    {"activations", counts_.activation_bytes}};
  if (compare_) counts_.memory.push_back({"compare", compare_->buffer_bytes()});
  tiers_.FillStats(&counts_);
  constexpr double kShortestRetry = 0.5;  // seconds
  const double backlog =
      EstimateSeconds(scheduler_.waiting_tokens() + scheduler_.prefill_backlog());
  MutexLock lock(&mutex_);
  stats_ = counts_;
  retry_after_ = std::max(kShortestRetry, backlog / 2);
}

}  // namespace entropyserve
