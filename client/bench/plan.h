// Who asks what and when: a pure function of the settings and the seed. Nothing here knows a server
// or a clock.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/bench/distribution.h"

namespace entropyserve {

// One line of a replayed trace.
struct TraceLine {
  double at_seconds = 0;  // from the trace's start
  int64_t input_tokens = 0, output_tokens = 0;
  std::string session = {};  // lines of one session follow each other; empty: alone
};

// JSON lines with "timestamp" (ms), "input_length", "output_length" and, optionally, "session", as
// in the published Mooncake traces. Sorted by time, the first one at 0. INVALID_ARGUMENT names the
// line.
absl::StatusOr<std::vector<TraceLine>> ParseTrace(std::string_view text);

enum class LoadMode { kOpen, kClosed, kTrace };

// What a run is asked for; a sweep differs in `level` only.
struct WorkloadSpec {
  LoadMode mode = LoadMode::kOpen;
  // kOpen: conversations per second, infinity for all at once. kClosed: conversations at a time.
  // kTrace: the speed of the replay.
  double level = 1;
  double ramp_from =
      -1;               // kOpen: the rate at the start, which grows linearly to `level`; < 0: none
  bool poisson = true;  // kOpen: else evenly spaced
  int64_t conversations = 100;  // at most; one request each unless `turns` says more
  int copies = 1;  // of each conversation, one after another: one for each policy under comparison
  double duration_seconds = std::numeric_limits<double>::infinity();  // nothing starts later
  uint64_t seed = 0;
  Distribution input_tokens{512}, output_tokens{128};
  Distribution turns{1}, think_seconds{0};
  double cancel_share = 0, slow_share = 0;                       // of the requests
  int64_t context_tokens = std::numeric_limits<int64_t>::max();  // longer conversations are cut
  std::vector<TraceLine> trace = {};
};

struct PlannedTurn {
  int64_t input_tokens = 0, output_tokens = 0;
  double think_seconds = 0;          // after the answer before it; 0 for the first
  double not_before_seconds = 0;     // from the run's start: a trace's time
  int64_t cancel_after_tokens = -1;  // cancelled once this many have arrived; -1: never
  bool slow = false;                 // reads with pauses
  bool cut = false;                  // shorter than drawn: the context has no more room
  uint64_t seed = 0;                 // of its prompt and its sampling
};

struct Conversation {
  int64_t index = 0;         // in the plan
  double start_seconds = 0;  // from the run's start; 0 in a closed loop, which starts when it can
  bool session = false;      // several turns
  int copy = 0;              // 0 .. copies - 1; the copies share lengths, prompts and seeds
  std::vector<PlannedTurn> turns;
};

class Plan {
 public:
  explicit Plan(WorkloadSpec spec);

  // Copies included. Of an open loop: how many there are. Of a closed one: at most this many.
  int64_t size() const { return size_; }
  // The same for the same spec whatever was asked before; index < size().
  Conversation Get(int64_t index) const;
  const WorkloadSpec& spec() const { return spec_; }

 private:
  void PlanArrivals();
  void PlanTrace();
  PlannedTurn MakeTurn(int64_t index, int turn) const;

  WorkloadSpec spec_;
  int64_t size_ = 0;
  std::vector<double> starts_;                    // open loop
  std::vector<std::vector<size_t>> trace_lines_;  // of each conversation, into spec_.trace
};

}  // namespace entropyserve
