// Sends a plan's requests and follows their answers: one thread for the schedule, gRPC's own for
// the streams, none per stream.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/bench/plan.h"
#include "client/bench/prompts.h"
#include "client/bench/record.h"
#include "client/client.h"

namespace entropyserve {

struct DriveProgress {
  double seconds = 0;
  int64_t planned = 0;  // conversations; of a closed loop at most
  int64_t started = 0, in_flight = 0, completed = 0, failed = 0;  // requests
  int64_t output_tokens = 0;
};

struct DriveOptions {
  ClientOptions client;
  double deadline_seconds = 0;  // of each request, from when it is sent; 0: none
  int64_t max_concurrency =
      0;  // open loop: conversations at once; later ones wait here. 0: no limit
  double slow_pause_seconds = 0.1;  // of a slow reader, after each event
  double connect_seconds = 10;      // before a run
  // Below the server's --max-streams-per-connection; above it calls would wait in the client's
  // library, unseen.
  int streams_per_connection = 200;
  // What each copy of a conversation asks with: policy and sampling. Prompt, length, session and
  // seed are filled in.
  std::vector<v1::GenerateRequest> requests;
  // On the caller's thread, several times a second. May be empty.
  std::function<void(const DriveProgress&)> on_progress;
  const CancelToken* cancel = nullptr;  // ends the run; may be null
};

struct DriveResult {
  std::vector<RequestRecord> records;  // in the order in which they ended
  double seconds = 0;                  // from the first intended start to the last end
  // Of conversations that were cancelled, failed or cut off by the end; per copy.
  std::vector<int64_t> turns_not_sent;
  // OK: the plan was carried out, whatever the answers were. CANCELLED: `cancel`. UNAVAILABLE: the
  // server is gone or draining.
  absl::Status ended;
};

class LoadDriver {
 public:
  // Opens `connections` and waits until they are up. UNAVAILABLE: they were not within
  // connect_seconds; and what OpenChannel says.
  static absl::StatusOr<std::unique_ptr<LoadDriver>> Create(DriveOptions options, int connections);
  virtual ~LoadDriver() = default;

  // Returns when everything that was sent has ended, also after a cancel.
  virtual DriveResult Run(const Plan& plan, const PromptSource& prompts) = 0;
};

}  // namespace entropyserve
