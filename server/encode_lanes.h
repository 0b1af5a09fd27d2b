// Where requests are parsed, rendered and tokenized: two lanes, so that a megabyte of text never
// delays a short question. A third one is for what waits for the engine thread, which answers
// questions about sessions between two steps: up to a second later, for which neither a lane nor
// gRPC may stand still. A fourth one is for comparisons, which run one at a time.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "engine/base/mutex.h"

namespace entropyserve {

// A queue that is bounded in bytes, and its threads. Thread-safe.
class EncodeLane {
 public:
  explicit EncodeLane(int64_t max_bytes, int threads = 1);
  // Runs what is queued, then joins.
  ~EncodeLane();
  EncodeLane(const EncodeLane&) = delete;
  EncodeLane& operator=(const EncodeLane&) = delete;

  // Runs `job` on one of the lane's threads; they start in order. `bytes` count until the job has
  // run. RESOURCE_EXHAUSTED with retry advice: the queue is full.
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
  std::vector<std::thread> threads_;  // last: they use the rest
};

class EncodeLanes {
 public:
  // Requests up to `short_prompt_bytes` use the short lane.
  EncodeLanes(int64_t short_prompt_bytes, int64_t short_lane_bytes, int64_t long_lane_bytes)
      : short_prompt_bytes_(short_prompt_bytes),
        compare_(long_lane_bytes),
        session_(long_lane_bytes, kSessionThreads),
        short_(short_lane_bytes),
        long_(long_lane_bytes) {}

  absl::Status Post(int64_t bytes, std::function<void()> job) {
    return (bytes <= short_prompt_bytes_ ? short_ : long_).Post(bytes, std::move(job));
  }
  // For jobs that ask the engine about a session.
  absl::Status PostSession(int64_t bytes, std::function<void()> job) {
    return session_.Post(bytes, std::move(job));
  }
  absl::Status PostCompare(int64_t bytes, std::function<void()> job) {
    return compare_.Post(bytes, std::move(job));
  }
  int64_t short_bytes() const { return short_.bytes(); }
  int64_t long_bytes() const { return long_.bytes(); }
  int64_t session_bytes() const { return session_.bytes(); }

 private:
  // They sleep nearly always; as many questions are answered between two steps of the engine.
  static constexpr int kSessionThreads = 16;

  const int64_t short_prompt_bytes_;
  EncodeLane compare_;
  EncodeLane session_;  // before the others: their jobs post to it
  EncodeLane short_, long_;
};

}  // namespace entropyserve
