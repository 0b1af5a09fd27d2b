// What the drills share: their options, their verdict and their table of measured values.
#pragma once

#include <cstdio>
#include <string>

#include "tests/drills/server_process.h"

namespace entropyserve {

struct DrillOptions {
  std::string server;  // the program
  std::string folder;  // for logs and the like; this drill's own
  double seconds = 6;
  int times = 3;
};

class Drill {
 public:
  explicit Drill(const std::string& name) : name_(name) {}

  // A promise. The first ones that are broken are printed.
  void Expect(bool holds, const std::string& what) {
    if (holds) return;
    constexpr int kPrinted = 10;
    if (++broken_ <= kPrinted) std::printf("%s: BROKEN: %s\n", name_.c_str(), what.c_str());
  }
  // A row of the table.
  void Report(const std::string& what, double value, const char* unit) {
    std::printf("%-10s  %-45s  %10.4g %s\n", name_.c_str(), what.c_str(), value, unit);
    std::fflush(stdout);
  }
  bool failed() const { return broken_ > 0; }

 private:
  const std::string name_;
  int broken_ = 0;
};

void Overload(const DrillOptions& options, Drill* drill);  // overload_drill.cc
void Kill(const DrillOptions& options, Drill* drill);      // kill_drill.cc

}  // namespace entropyserve
