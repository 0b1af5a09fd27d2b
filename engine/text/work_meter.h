// Lets long work end early: who works counts what it has done, and now and then somebody is asked
// whether to go on.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>

#include "absl/status/status.h"

namespace entropyserve {

// An error ends the work with it. Empty: nothing does.
using KeepGoing = std::function<absl::Status()>;

class WorkMeter {
 public:
  explicit WorkMeter(KeepGoing keep_going) : keep_going_(std::move(keep_going)) {}

  // Counts `work`: bytes looked at, or merges tried.
  absl::Status Add(size_t work = 1) {
    done_ += work;
    if (done_ < kInterval) return absl::OkStatus();
    done_ = 0;
    return keep_going_ ? keep_going_() : absl::OkStatus();
  }

 private:
  static constexpr size_t kInterval = 1 << 16;  // about 10 ms

  const KeepGoing keep_going_;
  size_t done_ = 0;
};

}  // namespace entropyserve
