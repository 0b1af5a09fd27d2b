// Time as the engine sees it. Tests move it by hand.
#pragma once

#include <chrono>

namespace entropyserve {

using TimePoint = std::chrono::steady_clock::time_point;

class Clock {
 public:
  virtual ~Clock() = default;
  virtual TimePoint Now() const { return std::chrono::steady_clock::now(); }
};

inline double Seconds(TimePoint begin, TimePoint end) {
  return std::chrono::duration<double>(end - begin).count();
}

}  // namespace entropyserve
