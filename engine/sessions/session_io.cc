#include "engine/sessions/session_io.h"

#include <utility>

namespace entropyserve {

SessionIo::SessionIo(bool at_once) : at_once_(at_once) {
  if (!at_once_) thread_ = std::thread([this] { Loop(); });
}

SessionIo::~SessionIo() {
  {
    MutexLock lock(&mutex_);
    stop_ = true;
    wake_.NotifyAll();
  }
  if (!at_once_) thread_.join();
}

void SessionIo::Run(std::function<void()> job) {
  if (at_once_) {
    job();
    return;
  }
  MutexLock lock(&mutex_);
  jobs_.push_back(std::move(job));
  wake_.NotifyOne();
}

void SessionIo::WaitIdle() {
  MutexLock lock(&mutex_);
  while (running_ || !jobs_.empty()) idle_.Wait(&mutex_);
}

void SessionIo::Loop() {
  for (;;) {
    std::function<void()> job;
    {
      MutexLock lock(&mutex_);
      running_ = false;
      if (jobs_.empty()) idle_.NotifyAll();
      while (jobs_.empty() && !stop_) wake_.Wait(&mutex_);
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
      running_ = true;
    }
    job();
  }
}

}  // namespace entropyserve
