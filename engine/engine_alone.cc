// What the engine runs for itself before it takes requests: the first forward pass, and dense
// prefills that are timed. No request, no event, no count.
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/engine_impl.h"

namespace entropyserve {
namespace {

// A sequence that reads `tokens` tokens densely and keeps them all.
void SetUp(Sequence* s, std::unique_ptr<SequenceCache> cache, int64_t tokens, int64_t max_new) {
  s->owned = std::move(cache);
  s->cache = s->owned.get();
  s->input.resize(size_t(tokens));
  s->request.prefill.params.full = true;
  s->request.sampling.temperature = 0;
  s->plan = {.prompt = tokens,
             .max_new = max_new,
             .prefill = s->request.prefill.params,
             .kv = {.rule = KvRule::kFull}};
}

}  // namespace

absl::Status EngineImpl::StepAlone(Sequence* s, int64_t tokens) {
  const bool prefill = s->prefilling();
  const bool samples = !prefill || s->prefilled + tokens == int64_t(s->input.size());
  s->cache->Append(tokens);
  step_.Clear();
  step_.Add(s, tokens, prefill, samples, {});
  RETURN_IF_ERROR(model_->EnsureRows(tokens));
  if (!step_.Upload()) return absl::ResourceExhaustedError("no memory for a step's batch");
  const float* logits = model_->Forward(step_.batch(), pool_->kv(), step_.logit_rows(), samples);
  SampleResult sample;
  if (samples) {
    backend_->Sample({logits, model_->config().vocab, step_.sample_rows().data(), 1, &sample});
  }
  backend_->Synchronize();
  s->cache->Advance(tokens);
  if (prefill) s->prefilled += tokens;
  if (!samples) return absl::OkStatus();
  if (!sample.finite)
    return absl::InternalError("the model's logits are not finite; its weights may be damaged");
  s->last_token = sample.token;
  return absl::OkStatus();
}

absl::Status EngineImpl::WarmUp() {
  return Call<absl::Status>([this]() -> absl::Status {
    Sequence s;
    SetUp(&s, std::make_unique<SequenceCache>(backend_.get(), pool_.get(), model_->shape()), 3, 2);
    RETURN_IF_ERROR(s.cache->BeginTurn(s.plan));
    RETURN_IF_ERROR(StepAlone(&s, s.plan.prompt));
    return StepAlone(&s, 1);
  });
}

absl::StatusOr<double> EngineImpl::TimeDensePrefill(int64_t tokens) {
  if (tokens < 1 || tokens > context_) {
    return absl::InvalidArgumentError(
        absl::StrCat("tokens: ", tokens, " is not in [1, ", context_, "]"));
  }
  return Call<absl::StatusOr<double>>([this, tokens]() -> absl::StatusOr<double> {
    Sequence s;
    SetUp(&s, std::make_unique<SequenceCache>(backend_.get(), pool_.get(), model_->shape()), tokens,
          0);
    uint64_t random = 1;  // Knuth's; any ids do, so long as they are not all the same row
    for (int32_t& id : s.input) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      id = int32_t((random >> 33) % uint64_t(model_->config().vocab));
    }
    RETURN_IF_ERROR(s.cache->BeginTurn(s.plan));
    // In the chunks that a prompt gets which runs alone.
    Scheduler alone(scheduler_.options());
    alone.Enqueue({.id = 1, .prompt = tokens, .segment = s.plan.prefill.segment});
    double seconds = 0;
    while (s.prefilling()) {
      const int64_t chunk = alone.Next(0).work.front().tokens;
      const TimePoint begin = clock_->Now();
      RETURN_IF_ERROR(StepAlone(&s, chunk));
      seconds += Seconds(begin, clock_->Now());
    }
    return seconds;
  });
}

}  // namespace entropyserve
