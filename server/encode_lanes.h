// Where requests are parsed, rendered and tokenized: two threads, so that a megabyte of text never
// delays a short question, each with a queue that is bounded in bytes.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <thread>

#include "absl/status/status.h"
#include "engine/base/mutex.h"

namespace entropyserve {

// One thread and its queue. Thread-safe.
class EncodeLane {
 public:
  explicit EncodeLane(int64_t max_bytes);
  // Runs what is queued, then joins.
  ~EncodeLane();
  EncodeLane(const EncodeLane&) = delete;
  EncodeLane& operator=(const EncodeLane&) = delete;

  // Runs `job` on the lane's thread, in order. `bytes` count until the job has run.
  // RESOURCE_EXHAUSTED with retry advice: the queue is full.
  absl::Status Post(int64_t bytes, std::function<void()> job);

  int64_t bytes() const;

 private:
  struct Job {
    int64_t bytes = 0;
    std::function<void()> run;
  };
  void Run();

  const int64_t max_bytes_;
  mutable Mutex mutex_;
  CondVar wake_;
  std::deque<Job> jobs_ ABSL_GUARDED_BY(mutex_);
  int64_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses the rest
};

class EncodeLanes {
 public:
  // Requests up to `short_prompt_bytes` use the short lane.
  EncodeLanes(int64_t short_prompt_bytes, int64_t short_lane_bytes, int64_t long_lane_bytes)
      : short_prompt_bytes_(short_prompt_bytes), short_(short_lane_bytes), long_(long_lane_bytes) {}

  absl::Status Post(int64_t bytes, std::function<void()> job) {
    return (bytes <= short_prompt_bytes_ ? short_ : long_).Post(bytes, std::move(job));
  }
  int64_t short_bytes() const { return short_.bytes(); }
  int64_t long_bytes() const { return long_.bytes(); }

 private:
  const int64_t short_prompt_bytes_;
  EncodeLane short_, long_;
};

}  // namespace entropyserve
