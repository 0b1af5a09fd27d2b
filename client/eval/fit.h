// How many sentences, words or pairs a prompt of a given number of tokens has.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/status/statusor.h"

namespace entropyserve {

struct Fit {
  int64_t units = 0, tokens = 0;
};

// A number of units of at most `target` tokens: either one more would be too many, or what is left
// is within a hundredth of the target. `tokens` counts, about in proportion to the units, and is
// asked a few times; the result depends on `guess` (0: none) and its answers only.
// INVALID_ARGUMENT: `least` units are too many already.
absl::StatusOr<Fit> FitUnits(int64_t target, int64_t least, int64_t guess,
                             const std::function<absl::StatusOr<int64_t>(int64_t)>& tokens);

}  // namespace entropyserve
