// Lengths and pauses as a flag states them.
#pragma once

#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/bench/random.h"

namespace entropyserve {

class Distribution {
 public:
  // Always `value`.
  explicit Distribution(double value = 0) : values_{value} {}

  // "512" or "fixed:512"; "uniform:a-b", both ends included for whole numbers;
  // "normal:mean,deviation"; "lognormal:median,sigma" (sigma of the logarithm); "list:a,b,c", one
  // of them at random. INVALID_ARGUMENT says what is expected; negative values are refused.
  static absl::StatusOr<Distribution> Parse(std::string_view text);

  // >= 0.
  double Sample(Random* random) const;
  // Rounded, >= `least`.
  int64_t SampleCount(Random* random, int64_t least) const;

 private:
  enum class Kind { kList, kUniform, kNormal, kLognormal };
  Kind kind_ = Kind::kList;
  std::vector<double> values_;  // what the kind's form names, in its order
};

}  // namespace entropyserve
