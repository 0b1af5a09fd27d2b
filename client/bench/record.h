// What one request of a run was like, built from the times at which things happened. No clock and
// no gRPC here: all times are seconds from the run's start.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

// How a request counts.
enum class Outcome {
  kCompleted,
  kFailed,      // `status` says why
  kCancelled,   // as planned (--cancel-share)
  kUnfinished,  // the run was ended while it was on its way
};

struct RequestRecord {
  // Planned.
  int64_t conversation = 0;
  int turn = 0;
  int copy = 0;  // which policy of an interleaved run
  int64_t input_tokens = 0;
  int64_t planned_output_tokens = 0;
  bool slow = false, cut = false;

  // Measured. The intended time is the schedule's; sent is when the call was started. Between them
  // lie the making of the session, if any, and how late the client was.
  double intended = 0, sent = 0, session_seconds = 0;
  double first_token = 0, last_token = 0, ended = 0;
  int64_t output_tokens = 0;
  std::vector<float> gaps = {};  // between consecutive token events, seconds
  Outcome outcome = Outcome::kUnfinished;
  absl::Status status = {};
  bool has_receipt = false;
  v1::Receipt receipt = {};

  // Latencies of its own making are no samples: a slow reader's are its pauses.
  bool IsSample() const { return outcome == Outcome::kCompleted && !slow; }
  double QueueSeconds() const { return sent - intended - session_seconds; }
  double Ttft() const { return first_token - sent; }
  double E2e() const { return ended - sent; }
  // Per token after the first, as vLLM counts it; of answers of two tokens and more.
  double Tpot() const {
    return (last_token - first_token) / static_cast<double>(output_tokens - 1);
  }
};

// Follows one request. Calls come in the order of the events.
class RequestRecorder {
 public:
  explicit RequestRecorder(RequestRecord planned) : record_(std::move(planned)) {}

  void OnSent(double now) { record_.sent = now; }
  void OnEvent(const v1::GenerateEvent& event, double now);
  // `cancelled`: we cancelled as planned. `stopped`: the run is being ended.
  void OnEnd(const absl::Status& status, bool cancelled, bool stopped, double now);

  const RequestRecord& record() const { return record_; }
  RequestRecord Take() { return std::move(record_); }

 private:
  RequestRecord record_;
};

}  // namespace entropyserve
