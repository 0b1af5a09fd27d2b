// What waits to be written to one stream. Token events that wait are joined into one, progress
// events replaced by the latest, so a slow reader costs little; above a limit the sequence is to be
// paused.
#pragma once

#include <cstddef>
#include <deque>

#include "entropyserve/v1/entropyserve.pb.h"

namespace entropyserve {

// Not thread-safe: its owner locks.
class Outbox {
 public:
  // Pause at `high_bytes` or more, resume at half of it.
  explicit Outbox(size_t high_bytes) : high_bytes_(high_bytes) {}

  void Push(v1::GenerateEvent event);
  bool empty() const { return events_.empty(); }
  v1::GenerateEvent Pop();  // not when empty
  void Clear();

  size_t bytes() const { return bytes_; }
  bool wants_pause() const { return wants_pause_; }

 private:
  struct Entry {
    v1::GenerateEvent event;
    size_t bytes = 0;
  };
  void UpdatePause();

  const size_t high_bytes_;
  std::deque<Entry> events_;
  size_t bytes_ = 0;
  bool wants_pause_ = false;
};

}  // namespace entropyserve
