#include "server/dense_calibration.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace entropyserve {

absl::StatusOr<DenseCalibration> DenseCalibration::Measure(Engine* engine, int64_t most_tokens,
                                                           int64_t context) {
  most_tokens = std::min(most_tokens, context);
  std::vector<DensePrefill> points;
  // Twice the tokens take at most four times as long.
  constexpr double kGrowth = 4;
  double spent = 0, next = 0;  // seconds; next: of the coming length, at most
  int64_t tokens = kFewestTokens;
  bool first_use = true;
  while (tokens <= most_tokens && spent + next <= kMostSeconds) {
    const absl::StatusOr<double> seconds = engine->TimeDensePrefill(tokens);
    if (absl::IsResourceExhausted(seconds.status())) break;
    RETURN_IF_ERROR(seconds.status());
    spent += *seconds;
    next = first_use ? *seconds : kGrowth * *seconds;
    if (!first_use) {
      points.push_back({tokens, *seconds});
      if (tokens == most_tokens) break;
      tokens = std::min(2 * tokens, most_tokens);
    }
    first_use = false;
  }
  return DenseCalibration(std::move(points));
}

std::optional<double> DenseCalibration::Seconds(int64_t tokens) const {
  const auto above = std::lower_bound(
      points_.begin(), points_.end(), tokens,
      [](const DensePrefill& point, int64_t wanted) { return point.tokens < wanted; });
  if (above == points_.end()) return std::nullopt;
  if (above->tokens == tokens) return above->seconds;
  if (above == points_.begin()) return std::nullopt;
  const DensePrefill& below = above[-1];
  const double low = below.seconds / double(below.tokens);
  const double high = above->seconds / double(above->tokens);
  const double share = double(tokens - below.tokens) / double(above->tokens - below.tokens);
  return double(tokens) * (low + share * (high - low));
}

std::string LengthName(int64_t tokens) {
  constexpr int64_t kThousand = 1024;
  return tokens % kThousand == 0 ? absl::StrCat(tokens / kThousand, "k") : absl::StrCat(tokens);
}

}  // namespace entropyserve
