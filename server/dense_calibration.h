// How long this machine takes to read a prompt with dense attention: measured once, before requests
// are taken, so that prefills can be compared with it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"

namespace entropyserve {

struct DensePrefill {
  int64_t tokens = 0;
  double seconds = 0;
};

// Constant after construction.
class DenseCalibration {
 public:
  static constexpr int64_t kFewestTokens =
      4096;  // under the default dense prefix nothing is sparse
  // No length is tried that may take the whole beyond this; `tokens` beyond are not judged then.
  static constexpr double kMostSeconds = 300;

  // `points`: by rising tokens.
  explicit DenseCalibration(std::vector<DensePrefill> points) : points_(std::move(points)) {}

  // Times 4096, 8192, ... and `most_tokens` tokens (at most `context`), the shortest once more
  // before them, so that no first use is timed. Lengths that the KV cache cannot hold are left out.
  // Errors are those of Engine::TimeDensePrefill but for this one.
  static absl::StatusOr<DenseCalibration> Measure(Engine* engine, int64_t most_tokens,
                                                  int64_t context);

  // Between two points seconds per token are a line: exact where the time is a*n + b*n^2. Nothing
  // for a length outside the points.
  std::optional<double> Seconds(int64_t tokens) const;

  const std::vector<DensePrefill>& points() const { return points_; }

 private:
  std::vector<DensePrefill> points_;
};

// "32k" for 32768 (k = 1024), the number itself where it is no multiple.
std::string LengthName(int64_t tokens);

}  // namespace entropyserve
