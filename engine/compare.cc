#include "engine/compare.h"

#include <algorithm>
#include <numeric>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

constexpr size_t kMaxPending = 4096;   // positions that wait for the caller
constexpr int64_t kDecodedPiece = 32;  // tokens that are decoded before their rows are scored
constexpr double kRetrySeconds = 1.0;  // until another request may have given its pages back
constexpr int64_t kRows = Model::kMaxLogitsRows;

bool WholePrompt(const PrefillParams& p) { return p.whole_prompt && !p.full; }

}  // namespace

// ---- CompareChannel

void CompareChannel::Push(std::vector<ComparePosition> positions) {
  MutexLock lock(&mutex_);
  if (positions.empty() && !batches_.empty()) return;
  pending_ += positions.size();
  batches_.push_back(std::move(positions));
  ready_.NotifyAll();
}

void CompareChannel::Finish(absl::StatusOr<CompareResult> result) {
  MutexLock lock(&mutex_);
  result_.emplace(std::move(result));
  ready_.NotifyAll();
}

bool CompareChannel::full() const {
  MutexLock lock(&mutex_);
  return pending_ >= kMaxPending;
}

bool CompareChannel::cancelled() const {
  MutexLock lock(&mutex_);
  return cancelled_;
}

absl::StatusOr<CompareResult> CompareChannel::Wait(const CompareSink& sink) {
  bool cancelled = false;
  while (true) {
    std::vector<ComparePosition> positions;
    {
      MutexLock lock(&mutex_);
      while (batches_.empty() && !result_.has_value()) ready_.Wait(&mutex_);
      if (batches_.empty()) {
        if (cancelled) return absl::CancelledError("cancelled by the caller");
        return *result_;
      }
      positions = std::move(batches_.front());
      batches_.pop_front();
      pending_ -= positions.size();
    }
    if (cancelled || sink(positions)) continue;
    cancelled = true;
    MutexLock lock(&mutex_);
    cancelled_ = true;
  }
}

// ---- CompareJob

CompareJob::CompareJob(CompareRequest request, std::shared_ptr<CompareChannel> channel,
                       Backend* backend, Model* model, PagePool* pool, const Clock* clock)
    : request_(std::move(request)),
      channel_(std::move(channel)),
      backend_(backend),
      model_(model),
      pool_(pool),
      clock_(clock),
      prompt_(request_.decode_from > 0 ? request_.decode_from : size()),
      to_feed_(request_.decode_from > 0 ? size() - 1 : size()),
      scored_(request_.score_from) {
  SetUp(&a_, request_.prefill_a, request_.kv_a);
  SetUp(&b_, request_.prefill_b, request_.kv_b);
}

void CompareJob::SetUp(Side* side, PrefillPolicy prefill, KvPolicy kv) {
  Sequence& s = side->sequence;
  s.owned = std::make_unique<SequenceCache>(backend_, pool_, model_->shape());
  s.cache = s.owned.get();
  s.input.assign(request_.tokens.begin(), request_.tokens.begin() + prompt_);
  s.plan = {.prompt = prompt_,
            .max_new = size() - prompt_,  // the last of them is never fed, as in Generate
            .prefill = prefill.params,
            .kv = kv.params};
  s.request.prefill = std::move(prefill);
  s.request.kv = std::move(kv);
}

int64_t CompareJob::WorstCasePages() const {
  int64_t pages = 0;
  for (const Side* side : {&a_, &b_}) {
    pages += side->sequence.cache->WorstCasePages(side->sequence.plan);
  }
  return pages;
}

absl::Status CompareJob::Begin() {
  begun_ = true;
  const int64_t need = WorstCasePages();
  if (need > pool_->total()) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "the comparison can never fit: its two caches need up to ", need * pool_->page_bytes(),
        " bytes, the server has ", pool_->total() * pool_->page_bytes(),
        " for them; shorten token_ids, or raise --kv-bytes"));
  }
  absl::Status status = model_->EnsureRows(kRows);
  for (Side* side : {&a_, &b_}) {
    if (status.ok()) status = side->sequence.cache->BeginTurn(side->sequence.plan);
  }
  const int64_t vocab = model_->config().vocab;
  hidden_ = DeviceArray<float>(backend_, kRows * model_->config().hidden);
  logits_a_ = DeviceArray<float>(backend_, kRows * vocab);
  logits_b_ = DeviceArray<float>(backend_, kRows * vocab);
  targets_ = DeviceArray<int32_t>(backend_, kRows);
  results_ = DeviceArray<LogitsComparison>(backend_, kRows);
  if (status.ok() &&
      !(hidden_.ok() && logits_a_.ok() && logits_b_.ok() && targets_.ok() && results_.ok())) {
    status = absl::ResourceExhaustedError("no memory for the logits of a comparison");
  }
  return status.ok() ? status : WithRetryAfter(status, kRetrySeconds);
}

int64_t CompareJob::buffer_bytes() const {
  return (hidden_.size() + logits_a_.size() + logits_b_.size()) * int64_t{sizeof(float)} +
         targets_.size() * int64_t{sizeof(int32_t)} +
         results_.size() * int64_t{sizeof(LogitsComparison)};
}

absl::Status CompareJob::Step(int64_t chunk, StepBatch* batch, std::vector<ComparePosition>* out) {
  const bool read = a_.fed == piece_.end && b_.fed == piece_.end;
  if (read && scored_ < scored_end()) return Score(out);
  if (read) NextPiece(chunk);
  return Feed(a_.fed < piece_.end ? &a_ : &b_, batch);
}

void CompareJob::NextPiece(int64_t chunk) {
  piece_.begin = piece_.end;
  if (piece_.begin < prompt_) {
    const PrefillParams &a = request_.prefill_a.params, &b = request_.prefill_b.params;
    const int64_t segment = std::lcm(int64_t{a.segment}, int64_t{b.segment});
    const int64_t tokens = std::max(segment, chunk / segment * segment);
    const bool whole = WholePrompt(a) || WholePrompt(b);
    piece_.end = whole ? prompt_ : std::min(prompt_, piece_.begin + tokens);
  } else {
    piece_.end = std::min(to_feed_, piece_.begin + kDecodedPiece);
  }
  a_.rows.clear();
  b_.rows.clear();
  scored_ = scored_begin();
}

absl::Status CompareJob::Feed(Side* side, StepBatch* batch) {
  Sequence& s = side->sequence;
  const bool prefill = s.prefilling();
  const int64_t tokens = prefill ? piece_.end - side->fed : 1;
  if (!prefill) s.last_token = request_.tokens[size_t(side->fed)];
  RETURN_IF_ERROR(model_->EnsureRows(tokens));
  s.cache->Append(tokens);
  batch->Clear();
  batch->Add(&s, tokens, prefill, /*wants_logits=*/false, {});
  if (!batch->Upload()) return absl::ResourceExhaustedError("no memory for a step's batch");
  const TimePoint begin = clock_->Now();
  const float* const residual = model_->ForwardResidual(batch->batch(), pool_->kv());
  backend_->Synchronize();
  if (prefill) side->prefill_seconds += Seconds(begin, clock_->Now());
  s.cache->Advance(tokens);

  const int64_t first = std::max(side->fed, scored_begin());
  const int64_t rows = std::min(side->fed + tokens, scored_end()) - first;
  if (rows > 0) {
    const int64_t hidden = model_->config().hidden;
    const size_t kept = side->rows.size();
    side->rows.resize(kept + size_t(rows * hidden));
    backend_->CopyOut(side->rows.data() + kept, residual + (first - side->fed) * hidden,
                      size_t(rows * hidden) * sizeof(float));
  }
  side->fed += tokens;
  if (prefill) {
    s.prefilled += tokens;
    if (!s.prefilling()) AfterPrefill(side);
  } else if (++s.decode_steps == s.gap()) {
    Compress(side);
  }
  return absl::OkStatus();
}

// The moments of compression are those of a request (EngineImpl::AfterPrefill, AfterWork).
void CompareJob::AfterPrefill(Side* side) {
  Sequence& s = side->sequence;
  side->attention_flops = ExecutedAttentionFlops(model_->shape(), s.cache->ReadCounters());
  s.cache->EndPrefill();
  if (s.gap() == 0 && s.plan.max_new > 0) Compress(side);
}

void CompareJob::Compress(Side* side) {
  SequenceCache& cache = *side->sequence.cache;
  const KvParams& kv = side->sequence.request.kv.params;
  if (cache.WantsCompression(kv)) cache.Compress(kv);
}

absl::Status CompareJob::Score(std::vector<ComparePosition>* out) {
  const int64_t hidden = model_->config().hidden;
  const int64_t n = std::min(kRows, scored_end() - scored_), at = scored_ - scored_begin();
  for (const auto& [side, logits] : {std::pair{&a_, &logits_a_}, std::pair{&b_, &logits_b_}}) {
    backend_->CopyIn(hidden_.data(), side->rows.data() + at * hidden,
                     size_t(n * hidden) * sizeof(float));
    model_->Logits(hidden_.data(), n, logits->data());
  }
  backend_->CopyIn(targets_.data(), request_.tokens.data() + scored_ + 1,
                   size_t(n) * sizeof(int32_t));
  backend_->CompareLogits({.a = logits_a_.data(),
                           .b = logits_b_.data(),
                           .vocab = model_->config().vocab,
                           .targets = targets_.data(),
                           .n = int32_t(n),
                           .results = results_.data()});
  std::vector<LogitsComparison> found(static_cast<size_t>(n));
  backend_->CopyOut(found.data(), results_.data(), size_t(n) * sizeof(LogitsComparison));
  for (const LogitsComparison& c : found) {
    if (!c.finite) {
      return absl::InternalError("the model's logits are not finite; its weights may be damaged");
    }
    out->push_back({.position = scored_++,
                    .kl = c.kl,
                    .top1_equal = c.top1_equal != 0,
                    .logprob_a = c.logprob_a,
                    .logprob_b = c.logprob_b});
  }
  return absl::OkStatus();
}

CompareResult CompareJob::Result() const {
  CompareResult r;
  r.attention_flops_a = a_.attention_flops;
  r.attention_flops_b = b_.attention_flops;
  r.attention_flops_dense = DenseAttentionFlops(model_->shape(), 0, prompt_);
  r.prefill_seconds_a = a_.prefill_seconds;
  r.prefill_seconds_b = b_.prefill_seconds;
  r.kv_bytes_a = a_.sequence.cache->kv_bytes();
  r.kv_bytes_b = b_.sequence.cache->kv_bytes();
  return r;
}

}  // namespace entropyserve
