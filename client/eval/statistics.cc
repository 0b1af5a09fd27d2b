#include "client/eval/statistics.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "client/eval/random.h"

namespace entropyserve {
namespace {

constexpr double kZ = 1.959963984540054;  // 97.5 % of the normal distribution

double Correlation(std::span<const double> a, std::span<const double> b) {
  const double mean_a = Mean(a), mean_b = Mean(b);
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    ab += (a[i] - mean_a) * (b[i] - mean_b);
    aa += (a[i] - mean_a) * (a[i] - mean_a);
    bb += (b[i] - mean_b) * (b[i] - mean_b);
  }
  return aa > 0 && bb > 0 ? ab / std::sqrt(aa * bb) : 0;
}

}  // namespace

double Mean(std::span<const double> values) {
  if (values.empty()) return 0;
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

Interval Wilson(double mean, int n) {
  if (n < 1) return {0, 1};
  const double z2 = kZ * kZ / n;
  const double middle = (mean + z2 / 2) / (1 + z2);
  const double half = kZ / (1 + z2) * std::sqrt((mean * (1 - mean) + z2 / 4) / n);
  return {std::max(0.0, middle - half), std::min(1.0, middle + half)};
}

Interval PairedDifference(std::span<const double> a, std::span<const double> b) {
  const int n = static_cast<int>(a.size());
  if (n < 1) return {-1, 1};
  std::vector<double> differences(a.size());
  std::transform(a.begin(), a.end(), b.begin(), differences.begin(), std::minus<>());
  const auto is_share = [](double value) { return value > 0 && value < 1; };
  if ((std::any_of(a.begin(), a.end(), is_share) || std::any_of(b.begin(), b.end(), is_share)) &&
      std::adjacent_find(differences.begin(), differences.end(), std::not_equal_to<>()) !=
          differences.end()) {
    return Bootstrap(differences);
  }
  const double mean_a = Mean(a), mean_b = Mean(b), difference = mean_a - mean_b;
  const double phi = Correlation(a, b);
  const Interval of_a = Wilson(mean_a, n), of_b = Wilson(mean_b, n);
  const auto side = [phi](double x, double y) {
    return std::sqrt(std::max(0.0, x * x - 2 * phi * x * y + y * y));
  };
  return {std::max(-1.0, difference - side(mean_a - of_a.low, of_b.high - mean_b)),
          std::min(1.0, difference + side(of_a.high - mean_a, mean_b - of_b.low))};
}

Interval Bootstrap(std::span<const double> values) {
  if (values.empty()) return {};
  constexpr int kResamples = 2000;
  SplitMix64 random(1);
  std::vector<double> means(kResamples);
  for (double& mean : means) {
    double sum = 0;
    for (size_t i = 0; i < values.size(); ++i) sum += values[random.Below(values.size())];
    mean = sum / static_cast<double>(values.size());
  }
  std::sort(means.begin(), means.end());
  const auto at = [&means](double share) {
    return means[static_cast<size_t>(share * (kResamples - 1) + 0.5)];
  };
  return {at(0.025), at(0.975)};
}

std::vector<bool> ParetoFront(std::span<const Point> points) {
  std::vector<bool> front;
  for (const Point& p : points) {
    front.push_back(std::none_of(points.begin(), points.end(), [&p](const Point& q) {
      return q.x <= p.x && q.y <= p.y && (q.x < p.x || q.y < p.y);
    }));
  }
  return front;
}

}  // namespace entropyserve
