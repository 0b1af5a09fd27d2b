// The CPU sampler: every filter by hand-worked cases, the draw by its distribution (fixed seeds, so
// the statistics are the same in every run).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "kernels/backend.h"
#include "kernels/noise.h"

namespace entropyserve {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr uint32_t kInSession = 1u << 31;

class Sampling : public testing::Test {
 protected:
  SampleResult Run(const std::vector<float>& logits, const SampleRow& row) {
    SampleResult result;
    SampleParams p;
    p.logits = logits.data(), p.vocab = int64_t(logits.size()), p.rows = &row, p.n = 1;
    p.results = &result;
    backend_->Sample(p);
    return result;
  }
  // How often each id comes over n positions.
  std::vector<int> Histogram(const std::vector<float>& logits, SampleRow row, int n) {
    std::vector<int> counts(logits.size(), 0);
    for (int i = 0; i < n; ++i) {
      row.position = i;
      ++counts[size_t(Run(logits, row).token)];
    }
    return counts;
  }
  std::set<int> Reached(const std::vector<float>& logits, const SampleRow& row) {
    std::set<int> ids;
    const std::vector<int> counts = Histogram(logits, row, 400);
    for (size_t i = 0; i < counts.size(); ++i) {
      if (counts[i] > 0) ids.insert(int(i));
    }
    return ids;
  }
  std::unique_ptr<Backend> backend_ = MakeCpuBackend(2);
};

// Logits whose softmax is exactly these shares.
std::vector<float> Logs(const std::vector<double>& shares) {
  std::vector<float> logits;
  for (double share : shares) logits.push_back(float(std::log(share)));
  return logits;
}

TEST_F(Sampling, GreedyTakesTheLargestAndTheLowestIdOfEqualOnes) {
  EXPECT_EQ(Run({1, 3, 2}, {.temperature = 0}).token, 1);
  EXPECT_EQ(Run({-5, -1, -1, -1}, {.temperature = 0}).token, 1);
  std::vector<float> many(1000, 0.5f);
  many[17] = many[18] = many[999] = 0.75f;  // in vector lanes and in the tail
  EXPECT_EQ(Run(many, {.temperature = 0}).token, 17);
  many[999] = 0.8f;
  EXPECT_EQ(Run(many, {.temperature = 0}).token, 999);
}

TEST_F(Sampling, LogprobsAreOfTheRawModel) {
  const std::vector<float> logits = Logs({0.1, 0.4, 0.2, 0.25, 0.05});
  // Penalties, temperature and bans change the choice, not the logprobs.
  const int32_t banned[] = {1};
  const SampleRow row{.temperature = 0, .logprobs = 3, .banned = banned, .num_banned = 1};
  const SampleResult result = Run(logits, row);
  EXPECT_EQ(result.token, 3);
  EXPECT_NEAR(result.logprob, std::log(0.25), 1e-6);
  ASSERT_EQ(result.num_top, 3);
  EXPECT_EQ(result.top_ids[0], 1);
  EXPECT_EQ(result.top_ids[1], 3);
  EXPECT_EQ(result.top_ids[2], 2);
  EXPECT_NEAR(result.top_logprobs[0], std::log(0.4), 1e-6);
  EXPECT_NEAR(result.top_logprobs[2], std::log(0.2), 1e-6);
  EXPECT_EQ(Run(logits, {.logprobs = 0}).num_top, 0);
  EXPECT_EQ(Run(logits, {.logprobs = 20}).num_top, 5);  // no more than there are tokens
}

TEST_F(Sampling, LogprobsOfALargeVocabulary) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, 4);
  std::vector<float> logits(151937);
  for (float& x : logits) x = normal(rng);
  double sum = 0;
  for (float x : logits) sum += std::exp(double(x));
  const SampleResult result = Run(logits, {.temperature = 0, .logprobs = 20});
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  ASSERT_EQ(result.num_top, 20);
  EXPECT_EQ(result.token, order[0]);
  for (int i = 0; i < 20; ++i) {
    EXPECT_EQ(result.top_ids[i], order[size_t(i)]);
    EXPECT_NEAR(result.top_logprobs[i], double(logits[size_t(order[size_t(i)])]) - std::log(sum),
                1e-5);
  }
}

TEST_F(Sampling, ForcedTokenIsTakenWhateverElseIsAsked) {
  const int32_t banned[] = {2};
  const SampleResult result = Run(
      Logs({0.5, 0.25, 0.25}), {.temperature = 0, .forced = 2, .banned = banned, .num_banned = 1});
  EXPECT_EQ(result.token, 2);
  EXPECT_NEAR(result.logprob, std::log(0.25), 1e-6);
  EXPECT_EQ(result.finite, 1);
}

TEST_F(Sampling, NotFiniteIsReported) {
  for (float bad : {kInf, std::numeric_limits<float>::quiet_NaN()}) {
    for (size_t at : {size_t{0}, size_t{15}, size_t{16}, size_t{39}}) {
      std::vector<float> logits(40, 1.0f);
      logits[at] = bad;
      EXPECT_EQ(Run(logits, {}).finite, 0) << bad << " at " << at;
    }
  }
  std::vector<float> logits(40, -kInf);
  EXPECT_EQ(Run(logits, {}).finite, 0);  // nothing can be chosen
  logits[7] = -3;
  const SampleResult result = Run(logits, {});  // -inf alone is a zero probability
  EXPECT_EQ(result.finite, 1);
  EXPECT_EQ(result.token, 7);
  EXPECT_NEAR(result.logprob, 0, 1e-6);
}

TEST_F(Sampling, Penalties) {
  // Token 0: in the session only; 1: twice in the answer, and so in the session; 2: neither.
  const uint32_t history[] = {kInSession, kInSession | 2u, 0};
  const auto choice = [&](std::vector<float> logits, SampleRow row) {
    row.temperature = 0, row.history = history;
    return Run(logits, row).token;
  };
  EXPECT_EQ(choice({3, 0, 1.4f}, {.repetition = 2}), 0);  // 3 / 2 = 1.5
  EXPECT_EQ(choice({3, 0, 1.6f}, {.repetition = 2}), 2);
  EXPECT_EQ(choice({-1, -9, -1.9f}, {.repetition = 2}), 2);  // negative: -1 * 2 = -2
  EXPECT_EQ(choice({-1, -9, -2.1f}, {.repetition = 2}), 0);
  EXPECT_EQ(choice({3, 3.5f, 0}, {.presence = 1}), 0);  // 3.5 - 1; token 0 is not of this answer
  EXPECT_EQ(choice({3, 3.5f, 0}, {.presence = 0.25f}), 1);
  EXPECT_EQ(choice({3, 4, 0}, {.frequency = 0.6f}), 0);  // 4 - 2 * 0.6
  EXPECT_EQ(choice({3, 4, 0}, {.frequency = 0.4f}), 1);
  EXPECT_EQ(choice({3, 4, 0}, {.presence = -2, .frequency = 1.4f}), 1);  // 4 + 2 - 2.8
  // Only in this answer, without the session's mark: the repetition penalty sees it, too.
  const uint32_t answer_only[] = {1u, 0, 0};
  SampleRow row{.temperature = 0, .repetition = 2};
  row.history = answer_only;
  EXPECT_EQ(Run({3, 1.6f, 0}, row).token, 1);
}

TEST_F(Sampling, BannedIdsAreNeverTaken) {
  const int32_t banned[] = {1, 3};
  const SampleRow row{.seed = 5, .banned = banned, .num_banned = 2};
  EXPECT_EQ(Reached({1, 9, 1, 9, 1}, row), (std::set<int>{0, 2, 4}));
}

TEST_F(Sampling, TopK) {
  const std::vector<float> logits = Logs({0.1, 0.3, 0.2, 0.3, 0.1});
  EXPECT_EQ(Reached(logits, {.top_k = 1}), (std::set<int>{1}));  // equal ones: the lower id
  EXPECT_EQ(Reached(logits, {.top_k = 3}), (std::set<int>{1, 2, 3}));
  EXPECT_EQ(Reached(logits, {.top_k = 4}), (std::set<int>{0, 1, 2, 3}));
  EXPECT_EQ(Reached(logits, {.top_k = 0}).size(), 5u);
  EXPECT_EQ(Reached(logits, {.top_k = 1000}).size(), 5u);
}

TEST_F(Sampling, MinP) {
  const std::vector<float> logits = Logs({0.5, 0.26, 0.14, 0.1});
  EXPECT_EQ(Reached(logits, {.min_p = 0.5f}), (std::set<int>{0, 1}));  // at least 0.25
  EXPECT_EQ(Reached(logits, {.min_p = 0.55f}), (std::set<int>{0}));
  EXPECT_EQ(Reached(logits, {.min_p = 0.25f}), (std::set<int>{0, 1, 2}));
  EXPECT_EQ(Reached(logits, {.min_p = 1.0f}), (std::set<int>{0}));
}

TEST_F(Sampling, TopP) {
  const std::vector<float> logits = Logs({0.1, 0.5, 0.25, 0.15});
  EXPECT_EQ(Reached(logits, {.top_p = 0.45f}), (std::set<int>{1}));
  EXPECT_EQ(Reached(logits, {.top_p = 0.55f}), (std::set<int>{1, 2}));
  EXPECT_EQ(Reached(logits, {.top_p = 0.8f}), (std::set<int>{1, 2, 3}));
  EXPECT_EQ(Reached(logits, {.top_p = 0.0f}), (std::set<int>{1}));  // at least one
  EXPECT_EQ(Reached(logits, {.top_p = 1.0f}).size(), 4u);
}

TEST_F(Sampling, FiltersSeeWhatTheOneBeforeLeft) {
  // top_k 2 leaves 0.5 and 0.3; of their 0.8, top_p 0.6 is reached by the first (0.625).
  EXPECT_EQ(Reached(Logs({0.5, 0.3, 0.2}), {.top_p = 0.6f, .top_k = 2}), (std::set<int>{0}));
  EXPECT_EQ(Reached(Logs({0.5, 0.3, 0.2}), {.top_p = 0.6f}), (std::set<int>{0, 1}));
  // The temperature comes first: squared shares 0.25 and 0.09, so 0.735 for the first.
  EXPECT_EQ(Reached(Logs({0.5, 0.3, 0.2}), {.temperature = 0.5f, .top_p = 0.65f}),
            (std::set<int>{0}));
}

// Pearson's statistic against the expected shares.
double ChiSquare(const std::vector<int>& counts, const std::vector<double>& shares) {
  const double n = std::accumulate(counts.begin(), counts.end(), 0.0);
  double sum = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    const double expected = n * shares[i];
    sum += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  return sum;
}

TEST_F(Sampling, DrawsFollowTheDistribution) {
  // 99.99 % of all fair samplers stay below 27.9 (7 degrees of freedom) and 23.5 (5).
  const std::vector<double> shares = {0.3, 0.05, 0.2, 0.05, 0.1, 0.15, 0.1, 0.05};
  for (uint64_t seed : {0ull, 1ull, 0xffffffffffffffffull}) {
    EXPECT_LT(ChiSquare(Histogram(Logs(shares), {.seed = seed}, 20000), shares), 27.9) << seed;
  }
  // temperature 2: square roots, normalised.
  std::vector<double> roots;
  for (double share : shares) roots.push_back(std::sqrt(share));
  const double total = std::accumulate(roots.begin(), roots.end(), 0.0);
  for (double& root : roots) root /= total;
  EXPECT_LT(ChiSquare(Histogram(Logs(shares), {.temperature = 2, .seed = 3}, 20000), roots), 27.9);
  // min_p leaves what has at least a third of 0.3, in proportion.
  const std::vector<int> counts = Histogram(Logs(shares), {.min_p = 0.33f, .seed = 4}, 20000);
  std::vector<int> kept;
  std::vector<double> kept_shares;
  for (size_t i : {0, 2, 4, 5, 6}) {
    kept.push_back(counts[i]);
    kept_shares.push_back(shares[i] / 0.85);
  }
  EXPECT_EQ(std::accumulate(kept.begin(), kept.end(), 0), 20000);
  EXPECT_LT(ChiSquare(kept, kept_shares), 23.5);
}

TEST_F(Sampling, TopPOverALargeVocabularyEqualsSorting) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0, 2);
  std::vector<float> logits(5000);
  for (float& x : logits) x = normal(rng);
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  double total = 0, mass = 0;
  for (float x : logits) total += std::exp(double(x));
  std::vector<bool> allowed(logits.size(), false);
  size_t kept = 0;
  while (mass < 0.7 * total)
    mass += std::exp(double(logits[order[kept]])), allowed[order[kept++]] = true;
  ASSERT_GT(kept, 64u);  // more than the first sorted part
  std::set<int> seen;
  SampleRow row{.top_p = 0.7f, .seed = seed};
  for (int i = 0; i < 4000; ++i) {
    row.position = i;
    const int token = Run(logits, row).token;
    // The boundary token may fall either way by rounding.
    ASSERT_TRUE(allowed[size_t(token)] || size_t(token) == order[kept]) << token;
    seen.insert(token);
  }
  EXPECT_GT(seen.size(), kept / 4);
}

TEST_F(Sampling, NoiseDependsOnSeedAndPositionOnly) {
  std::vector<float> logits(3 * 50);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = float((i * 7) % 50) * 0.1f;
  std::vector<SampleRow> rows(3);
  for (int i = 0; i < 3; ++i) {
    rows[size_t(i)] = {.logits_row = 2 - i, .seed = uint64_t(i / 2), .position = 10 + i};
  }
  std::vector<SampleResult> together(3);
  SampleParams p;
  p.logits = logits.data(), p.vocab = 50, p.rows = rows.data(), p.n = 3,
  p.results = together.data();
  backend_->Sample(p);
  for (int i = 0; i < 3; ++i) {
    SampleResult alone;
    p.rows = &rows[size_t(i)], p.n = 1, p.results = &alone;
    backend_->Sample(p);
    EXPECT_EQ(alone.token, together[size_t(i)].token);
  }
  // Neither argument is ignored, and their neighbours are unrelated.
  std::set<float> values;
  for (uint64_t seed = 0; seed < 30; ++seed) {
    for (int64_t position = 0; position < 30; ++position)
      values.insert(SampleNoise(seed, position));
  }
  EXPECT_EQ(values.size(), 900u);
  EXPECT_GE(*values.begin(), 0.0f);
  EXPECT_LT(*values.rbegin(), 1.0f);
}

}  // namespace
}  // namespace entropyserve
