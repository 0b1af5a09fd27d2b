// Any backend, with each call timed: what a step spends where.
#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "kernels/backend.h"

namespace entropyserve::bench {

struct OperatorTime {
  int64_t calls = 0;
  double seconds = 0;
  double flops = 0, bytes = 0;  // of linears: their work, and the weights that it reads
};

enum class Phase { kPrefill, kDecode, kCompress };  // a step with a prefill is a prefill

// Shared by the engine thread, which times, and the bench, which asks while no request runs.
class OperatorTimes {
 public:
  using ByName = std::map<std::string, OperatorTime>;

  // While off (at first), calls pass through untouched: recorded graphs included.
  void TurnOn(bool on) {
    std::lock_guard lock(mutex_);
    on_ = on;
    times_.clear();
  }
  bool on() const {
    std::lock_guard lock(mutex_);
    return on_;
  }
  void Add(Phase phase, const std::string& name, const OperatorTime& time) {
    std::lock_guard lock(mutex_);
    OperatorTime& sum = times_[phase][name];
    sum.calls += time.calls;
    sum.seconds += time.seconds;
    sum.flops += time.flops;
    sum.bytes += time.bytes;
  }
  ByName Get(Phase phase) const {
    std::lock_guard lock(mutex_);
    const auto it = times_.find(phase);
    return it == times_.end() ? ByName() : it->second;
  }

 private:
  mutable std::mutex mutex_;
  bool on_ = false;
  std::map<Phase, ByName> times_;
};

// Names of linears: "linear OUTPUTSxINPUTS". Waits for the device before and after every call, so a
// step takes longer than without; recorded graphs are not used while it times.
std::unique_ptr<Backend> MakeTimedBackend(std::unique_ptr<Backend> backend,
                                          std::shared_ptr<OperatorTimes> times);

}  // namespace entropyserve::bench
