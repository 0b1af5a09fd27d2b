// Comparisons in the engine's loop: one at a time, a step of it after every ordinary step.
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"
#include "engine/base/status_macros.h"
#include "engine/engine_impl.h"

namespace entropyserve {
namespace {

constexpr double kRetrySeconds = 5.0;  // a comparison takes seconds to minutes

absl::Status OutOfRange(const char* field, int64_t value, int64_t least, int64_t end) {
  return absl::InvalidArgumentError(
      absl::StrCat(field, ": ", value, " is not in [", least, ", ", end, ")"));
}

}  // namespace

absl::Status EngineImpl::ValidateCompare(const CompareRequest& r) const {
  const int64_t n = int64_t(r.tokens.size());
  const int vocab = model_->config().vocab;
  if (n < 2) return absl::InvalidArgumentError("token_ids: expected at least two");
  for (int32_t id : r.tokens) {
    if (id < 0 || id >= vocab) return OutOfRange("token_ids", id, 0, vocab);
  }
  if (n > context_) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_ids: ", n, " do not fit the context of ", context_));
  }
  if (r.score_from < 0 || r.score_from >= n - 1)
    return OutOfRange("score_from", r.score_from, 0, n - 1);
  if (r.decode_from < 0 || r.decode_from >= n)
    return OutOfRange("decode_from", r.decode_from, 0, n);
  RETURN_IF_ERROR(Validate(r.kv_a, "policy_a.kv"));
  RETURN_IF_ERROR(Validate(r.kv_b, "policy_b.kv"));
  const int64_t prompt = r.decode_from > 0 ? r.decode_from : n;
  for (const auto& [policy, field] :
       {std::pair{&r.prefill_a, "policy_a.prefill"}, {&r.prefill_b, "policy_b.prefill"}}) {
    RETURN_IF_ERROR(Validate(*policy, field));
    if (policy->params.whole_prompt && !policy->params.full &&
        prompt > options_.max_whole_prompt_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, ": ", policy->name, " reads a prompt in one piece and takes at most ",
                       options_.max_whole_prompt_tokens,
                       " tokens (--max-whole-prompt-tokens), this one has ", prompt));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<CompareResult> EngineImpl::Compare(CompareRequest request, CompareSink sink) {
  RETURN_IF_ERROR(ValidateCompare(request));
  auto channel = std::make_shared<CompareChannel>();
  {
    MutexLock lock(&mutex_);
    if (stop_ || draining_)
      return absl::UnavailableError("the server is shutting down; use another one");
    ++open_requests_;
    inbox_.push_back([this, request = std::move(request), channel]() mutable {
      BeginCompare(std::move(request), channel);
    });
    wake_.NotifyOne();
  }
  return channel->Wait(sink);  // `this` may be gone at its end
}

void EngineImpl::BeginCompare(CompareRequest request, std::shared_ptr<CompareChannel> channel) {
  if (compare_) {
    EndCompare(channel,
               WithRetryAfter(absl::ResourceExhaustedError("another comparison is running"),
                              kRetrySeconds));
    return;
  }
  ++counts_.admitted;
  compare_ = std::make_unique<CompareJob>(std::move(request), channel, backend_.get(), model_.get(),
                                          pool_.get(), clock_.get());
}

// Idle sessions move out of its way, and are dropped for it only where no request is there: one
// that runs will give its memory back. True: it need not wait for what is moving.
bool EngineImpl::MakeRoomForCompare() {
  const int64_t pages = compare_->WorstCasePages();
  tiers_.MakeRoom(pages, /*may_drop=*/sequences_.empty());
  return !tiers_.moving() || pages <= pool_->available() || pages > pool_->total();
}

void EngineImpl::StepCompare() {
  if (!compare_) return;
  const std::shared_ptr<CompareChannel> channel = compare_->channel();
  if (channel->cancelled()) return EndCompare(channel, absl::CancelledError("cancelled"));
  if (compare_->deadline() <= clock_->Now()) {
    return EndCompare(channel, absl::DeadlineExceededError("the request's deadline has passed"));
  }
  if (channel->full()) return;  // the caller does not take what there is
  if (!compare_->begun()) {
    if (!MakeRoomForCompare()) return;
    if (absl::Status status = compare_->Begin(); !status.ok()) return EndCompare(channel, status);
  }
  const bool alone = sequences_.empty();
  std::vector<ComparePosition> found;
  const absl::Status status =
      compare_->Step(alone ? options_.lone_chunk_tokens : options_.step_tokens, &step_, &found);
  channel->Push(std::move(found));
  ++counts_.steps;
  worked_ = true;
  if (!status.ok()) return EndCompare(channel, status);
  if (compare_->done()) EndCompare(channel, compare_->Result());
}

// `channel`: the running comparison's, or that of one which cannot run. By value: the job, which
// ends here, has one too.
void EngineImpl::EndCompare(std::shared_ptr<CompareChannel> channel,
                            absl::StatusOr<CompareResult> result) {
  if (compare_ && compare_->channel() == channel) {
    const std::unique_ptr<CompareJob> ended = std::move(compare_);  // gives its pages back
    const absl::Status& status = result.status();
    const bool cancelled = absl::IsCancelled(status) || absl::IsDeadlineExceeded(status) ||
                           absl::IsUnavailable(status);
    ++(status.ok() ? counts_.completed : cancelled ? counts_.cancelled : counts_.failed);
  }
  PublishStats();
  channel->Finish(std::move(result));
  MutexLock lock(&mutex_);
  if (--open_requests_ == 0) idle_.NotifyAll();
}

}  // namespace entropyserve
