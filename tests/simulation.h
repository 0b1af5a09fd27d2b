// A life of the engine drawn from one number: arrivals, sessions, forks, deletes, moves of
// idle sessions to host memory and files, restarts, cancels in every state, readers that stop
// reading, deadlines, jumps of the clock, allocations that fail, small pools and small quotas.
// Everything the engine answers is checked against a model of it that knows only what was asked.
// The same seed gives the same life.
#pragma once

#include <cstdint>
#include <string>

namespace entropyserve {

// How often something happened, over all runs: a simulation in which nothing happens proves
// nothing.
struct SimulationCounts {
  int64_t requests = 0, completed = 0, refused = 0, failed_allocations = 0;
  // Cancels, by where the request was.
  int64_t cancelled_unseen = 0, cancelled_waiting = 0, cancelled_prefilling = 0,
          cancelled_decoding = 0, cancelled_paused = 0;
  int64_t expired = 0, deleted_while_busy = 0, drained = 0;
  int64_t lost = 0, host_sessions = 0, disk_sessions = 0, restarts = 0;
  int64_t checked_tokens = 0, compressions = 0, later_turns = 0, forks = 0;

  int64_t cancels() const {
    return cancelled_unseen + cancelled_waiting + cancelled_prefilling + cancelled_decoding;
  }
};

struct SimulationOptions {
  uint64_t seed = 0;
  // For session files, if this life has any; is there and empty.
  std::string folder;
  // Plants an error: one step reads two sequences with a page of each swapped.
  bool swap_pages = false;
};

// Empty, or the first thing that was wrong. `planted`: whether the error found its place.
std::string Simulate(const SimulationOptions& options, SimulationCounts* counts,
                     bool* planted = nullptr);

}  // namespace entropyserve
