// One thread for reading and writing session files, so that steps do not wait for a disk.
#pragma once

#include <deque>
#include <functional>
#include <thread>

#include "engine/base/mutex.h"

namespace entropyserve {

class SessionIo {
 public:
  // `at_once`: no thread; Run runs the job.
  explicit SessionIo(bool at_once);
  ~SessionIo();  // runs what is queued first

  // Jobs run one after the other. Their number is bounded by who queues them (SessionTiers).
  void Run(std::function<void()> job);
  // Returns once every job has run.
  void WaitIdle();

 private:
  void Loop();

  const bool at_once_;
  Mutex mutex_;
  CondVar wake_, idle_;
  std::deque<std::function<void()>> jobs_ ABSL_GUARDED_BY(mutex_);
  bool running_ ABSL_GUARDED_BY(mutex_) = false;
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;  // last: it uses everything above
};

}  // namespace entropyserve
