#include "client/bench/record.h"

namespace entropyserve {

void RequestRecorder::OnEvent(const v1::GenerateEvent& event, double now) {
  if (event.has_finished()) {
    record_.has_receipt = event.finished().has_receipt();
    record_.receipt = event.finished().receipt();
    return;
  }
  // An event without ids only completes text: no token came with it.
  if (!event.has_tokens() || event.tokens().ids().empty()) return;
  if (record_.output_tokens == 0) {
    record_.first_token = now;
  } else {
    record_.gaps.push_back(static_cast<float>(now - record_.last_token));
  }
  record_.last_token = now;
  record_.output_tokens += event.tokens().ids_size();
}

void RequestRecorder::OnEnd(const absl::Status& status, bool cancelled, bool stopped, double now) {
  record_.ended = now;
  record_.status = status;
  if (status.ok()) {
    record_.outcome = cancelled ? Outcome::kCancelled : Outcome::kCompleted;
  } else if (cancelled && status.code() == absl::StatusCode::kCancelled) {
    record_.outcome = Outcome::kCancelled;
  } else if (stopped && status.code() == absl::StatusCode::kCancelled) {
    record_.outcome = Outcome::kUnfinished;
  } else {
    record_.outcome = Outcome::kFailed;
  }
}

}  // namespace entropyserve
