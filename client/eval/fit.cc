#include "client/eval/fit.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace entropyserve {

absl::StatusOr<Fit> FitUnits(int64_t target, int64_t least, int64_t guess,
                             const std::function<absl::StatusOr<int64_t>(int64_t)>& tokens) {
  const int64_t slack = target / 100;
  Fit low{least, 0};
  ASSIGN_OR_RETURN(low.tokens, tokens(least));
  if (low.tokens > target) {
    return absl::InvalidArgumentError(
        absl::StrCat("the shortest prompt takes ", low.tokens, " tokens of the ", target,
                     " that length and answer leave; ask for a longer --lengths"));
  }
  const Fit start = low;
  Fit high;  // too many; units 0: unknown
  int64_t next = guess > least ? guess : 2 * least + 8;
  for (int step = 0; target - low.tokens > slack && (high.units == 0 || high.units - low.units > 1);
       ++step) {
    ASSIGN_OR_RETURN(const int64_t count, tokens(next));
    const Fit seen{next, count};
    (count <= target ? low : high) = seen;
    // Along the line from the first to the newest point, inside what is known.
    const double rate = std::max(1e-3, static_cast<double>(seen.tokens - start.tokens) /
                                           static_cast<double>(seen.units - start.units));
    const double room = static_cast<double>(target - slack / 2 - start.tokens) / rate;
    next = start.units + static_cast<int64_t>(std::floor(std::min(room, 1e9)));
    if (high.units != 0) next = std::min(next, high.units - 1);
    if (high.units != 0 && step > 8) next = (low.units + high.units) / 2;  // it is no line
    // Without an upper bound a low rate must not jump to the end of the world.
    next = std::clamp(next, low.units + 1, std::max(low.units + 1, 16 * low.units));
  }
  return low;
}

}  // namespace entropyserve
