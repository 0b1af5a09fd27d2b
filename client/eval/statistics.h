// Means with intervals, all at 95 %.
#pragma once

#include <span>
#include <vector>

namespace entropyserve {

struct Interval {
  double low = 0, high = 0;
};

double Mean(std::span<const double> values);  // 0 for none

// Wilson's score interval for a mean of `n` values in [0, 1]. Exact in its usual sense for values
// of 0 and 1; wider than needed for others, whose variance is at most mean (1 - mean).
Interval Wilson(double mean, int n);

// For mean(a) - mean(b) of the same prompts, values in [0, 1]. Shares: Bootstrap of the
// differences, because Newcombe's interval takes them to vary as much as zeros and ones do. Zeros
// and ones, or pairs that all agree (where a bootstrap's interval is empty): Newcombe's
// square-and-add interval for paired proportions (Statistics in Medicine 17, 1998, method 8), with
// the values' correlation in place of phi.
Interval PairedDifference(std::span<const double> a, std::span<const double> b);

// Percentile bootstrap of the mean, 2000 resamples with a fixed seed; for unbounded values.
Interval Bootstrap(std::span<const double> values);

struct Point {
  double x = 0, y = 0;
};
// Which points no other one beats: none has x and y at most as large and one of them smaller.
std::vector<bool> ParetoFront(std::span<const Point> points);

}  // namespace entropyserve
