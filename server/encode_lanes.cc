#include "server/encode_lanes.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_details.h"

namespace entropyserve {
namespace {

constexpr double kRetrySeconds = 1;  // tokenizing runs at megabytes a second
// A job costs this much beside its message, so that empty messages cannot fill the memory.
constexpr int64_t kJobBytes = 1024;

}  // namespace

EncodeLane::EncodeLane(int64_t max_bytes, int threads) : max_bytes_(max_bytes) {
  for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { Run(); });
}

EncodeLane::~EncodeLane() {
  {
    MutexLock lock(&mutex_);
    stopping_ = true;
  }
  wake_.NotifyAll();
  for (std::thread& thread : threads_) thread.join();
}

absl::Status EncodeLane::Post(int64_t bytes, std::function<void()> job) {
  bytes += kJobBytes;
  {
    MutexLock lock(&mutex_);
    // An empty lane takes any request: a limit below the largest message only orders them.
    if (bytes_ > 0 && bytes_ + bytes > max_bytes_) {
      return WithRetryAfter(
          absl::ResourceExhaustedError("too many prompts are waiting to be tokenized"),
          kRetrySeconds);
    }
    bytes_ += bytes;
    jobs_.push_back({bytes, std::move(job)});
  }
  wake_.NotifyOne();
  return absl::OkStatus();
}

int64_t EncodeLane::bytes() const {
  MutexLock lock(&mutex_);
  return bytes_;
}

void EncodeLane::Run() {
  while (true) {
    Job job;
    {
      MutexLock lock(&mutex_);
      while (jobs_.empty() && !stopping_) wake_.Wait(&mutex_);
      if (jobs_.empty()) return;
      job = std::move(jobs_.front());
      jobs_.pop_front();
    }
    job.run();
    job.run = nullptr;  // frees the message before its bytes are given back
    MutexLock lock(&mutex_);
    bytes_ -= job.bytes;
  }
}

}  // namespace entropyserve
