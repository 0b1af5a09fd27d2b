// SelectTokens and Compact against twins in double precision that work on plain arrays.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "kernels/cpu/select.h"
#include "kernels/cpu/workers.h"
#include "tests/select_testing.h"

namespace entropyserve {
namespace {

constexpr double kRounding = 1e-6;  // of scores, which are at most 1

int Pick(std::mt19937& rng, int low, int high) {
  return std::uniform_int_distribution(low, high)(rng);
}

// Pooled scores of one head's earlier tokens.
std::vector<double> NaiveScores(const LayerInputs& in, const KvParams& kv_params, int32_t kv,
                                int32_t queries) {
  const int32_t length = in.past[kv] + in.turn, d = in.shape.head_dim, group = in.shape.group();
  const int32_t earlier = std::max(0, length - kv_params.window);
  std::vector<double> mean(earlier, 0), pooled(earlier, 0);
  for (int32_t i = 0; i < queries; ++i) {
    const int32_t token = in.turn - queries + i, limit = in.past[kv] + token + 1;
    for (int32_t h = kv * group; h < (kv + 1) * group; ++h) {
      std::vector<double> w(limit);
      double highest = -1e30, sum = 0;
      for (int32_t t = 0; t < limit; ++t) {
        for (int32_t c = 0; c < d; ++c) w[t] += double(in.Query(token, h)[c]) * in.Key(kv, t)[c];
        w[t] /= std::sqrt(double(d));
        highest = std::max(highest, w[t]);
      }
      for (double& x : w) sum += x = std::exp(x - highest);
      for (int32_t t = 0; t < earlier; ++t) mean[t] += w[t] / sum / (queries * group);
    }
  }
  for (int32_t t = 0; t < earlier; ++t) {
    double sum = 0, highest = 0;
    for (int32_t i = std::max(0, t - kv_params.pool_after);
         i <= std::min(earlier - 1, t + kv_params.pool_before); ++i) {
      sum += mean[i];
      highest = std::max(highest, mean[i]);
    }
    pooled[t] = kv_params.pooling == Pooling::kAverage
                    ? sum / (kv_params.pool_before + 1 + kv_params.pool_after)
                    : highest;
  }
  return pooled;
}

// What every head keeps in any case.
int32_t Sinks(const KvParams& kv, int32_t earlier) {
  return kv.keep_sinks ? std::min(4, earlier) : 0;
}

struct Case {
  LayerInputs in;
  KvParams kv;
  int32_t budget = 0;
  int32_t queries = 0;  // in the ring
};

Case RandomCase(std::mt19937& rng, KvRule rule) {
  Case c;
  AttentionShape shape{
      .layers = 2, .heads = 0, .kv_heads = Pick(rng, 1, 4), .head_dim = Pick(rng, 1, 3) * 16};
  shape.heads = shape.kv_heads * Pick(rng, 1, 8);
  c.kv.rule = rule;
  c.kv.window = Pick(rng, 1, 40);
  c.kv.pooling = Pick(rng, 0, 1) ? Pooling::kAverage : Pooling::kMax;
  c.kv.pool_before = Pick(rng, 0, 40);
  c.kv.pool_after = Pick(rng, 0, 40);
  c.kv.keep_sinks = Pick(rng, 0, 1);
  c.kv.adakv_floor = 0.25f * float(Pick(rng, 0, 4));
  c.budget = c.kv.window + 4 + Pick(rng, 0, 200);
  std::vector<int32_t> past(shape.kv_heads, 0);
  if (Pick(rng, 0, 1)) {
    for (int32_t& n : past) n = Pick(rng, 0, 300);
  }
  const int32_t turn = Pick(rng, 0, 3) ? Pick(rng, 40, 500) : Pick(rng, 1, 40);
  c.in = RandomInputs(rng, shape, Pick(rng, 0, 1) ? DType::kF32 : DType::kBF16, turn, past);
  c.queries = std::min(c.kv.window, turn);
  return c;
}

struct Kept {
  std::vector<std::vector<int32_t>> tokens;  // [kv_heads]
};

// Room for the longest list that a rule may make.
int32_t Capacity(const Case& c) {
  int32_t longest = 1;
  for (int32_t past : c.in.past) longest = std::max(longest, past + c.in.turn);
  return longest;
}

Kept Select(cpu::Workers& workers, PagedLayer& paged, const Case& c) {
  paged.Cache(c.in.turn);
  const BatchSeq seq = paged.AfterPrefill();
  const int32_t capacity = Capacity(c), kv_heads = c.in.shape.kv_heads;
  std::vector<int32_t> indices(int64_t{kv_heads} * capacity, -1), counts(kv_heads, -1);
  cpu::SelectTokens(workers, {.seq = &seq,
                              .pool = paged.pool(),
                              .shape = c.in.shape,
                              .layer = c.in.layer,
                              .kv = c.kv,
                              .budget = c.budget,
                              .window_queries = c.queries,
                              .indices = indices.data(),
                              .counts = counts.data(),
                              .capacity = capacity});
  Kept kept;
  for (int32_t kv = 0; kv < kv_heads; ++kv) {
    const int32_t* list = indices.data() + int64_t{kv} * capacity;
    kept.tokens.emplace_back(list, list + counts[kv]);
  }
  return kept;
}

class SelectTokensTest : public testing::Test {
 protected:
  SelectTokensTest()
      : seed_(std::random_device{}()),
        rng_(seed_),
        trace_(__FILE__, __LINE__, "seed " + std::to_string(seed_)) {}

  // Ascending, window and sinks kept, the rest no worse than what was dropped.
  void ExpectBest(const Case& c, int32_t kv, const std::vector<int32_t>& list,
                  const std::vector<double>& score) {
    const int32_t length = c.in.past[kv] + c.in.turn, earlier = int32_t(score.size());
    EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
    const std::set<int32_t> kept(list.begin(), list.end());
    ASSERT_EQ(kept.size(), list.size());
    for (int32_t t = earlier; t < length; ++t) EXPECT_TRUE(kept.count(t)) << "window token " << t;
    double worst_in = 1e30, best_out = -1e30;
    for (int32_t t = 0; t < earlier; ++t) {
      if (t < Sinks(c.kv, earlier)) {
        EXPECT_TRUE(kept.count(t)) << "sink " << t;
      } else if (kept.count(t)) {
        worst_in = std::min(worst_in, score[t]);
      } else {
        best_out = std::max(best_out, score[t]);
      }
    }
    EXPECT_GE(worst_in, best_out - kRounding);
  }

  const uint32_t seed_;
  std::mt19937 rng_;
  testing::ScopedTrace trace_;
  cpu::Workers workers_{2};
};

TEST_F(SelectTokensTest, EveryHeadKeepsItsOwnBest) {
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Case c = RandomCase(rng_, round % 2 ? KvRule::kLatent : KvRule::kSnapKv);
    PagedLayer paged(c.in, {}, c.kv.window, rng_());
    const Kept kept = Select(workers_, paged, c);
    for (int32_t kv = 0; kv < c.in.shape.kv_heads; ++kv) {
      const int32_t length = c.in.past[kv] + c.in.turn;
      EXPECT_EQ(int32_t(kept.tokens[kv].size()), std::min(length, c.budget));
      ExpectBest(c, kv, kept.tokens[kv], NaiveScores(c.in, c.kv, kv, c.queries));
    }
  }
}

TEST_F(SelectTokensTest, AdaKvSharesTheLayersBudget) {
  int uneven = 0;
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Case c = RandomCase(rng_, KvRule::kAdaKv);
    PagedLayer paged(c.in, {}, c.kv.window, rng_());
    const Kept kept = Select(workers_, paged, c);
    const int32_t kv_heads = c.in.shape.kv_heads;
    int64_t total = 0, held = 0;
    double worst_free = 1e30, best_out = -1e30;  // over all heads
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      const auto score = NaiveScores(c.in, c.kv, kv, c.queries);
      const std::vector<int32_t>& list = kept.tokens[kv];
      ExpectBest(c, kv, list, score);
      const int32_t length = c.in.past[kv] + c.in.turn, earlier = int32_t(score.size());
      total += int64_t(list.size());
      held += length;
      const int32_t floor = std::min(length, std::max(int32_t(c.kv.adakv_floor * c.budget),
                                                      length - earlier + Sinks(c.kv, earlier)));
      EXPECT_GE(int32_t(list.size()), floor) << "kv head " << kv;
      uneven += int32_t(list.size()) != std::min(length, c.budget);
      // Above its floor a head's worst token beats what any head dropped.
      double worst = 1e30;
      std::set<int32_t> in(list.begin(), list.end());
      for (int32_t t = Sinks(c.kv, earlier); t < earlier; ++t) {
        if (in.count(t)) worst = std::min(worst, score[t]);
        if (!in.count(t)) best_out = std::max(best_out, score[t]);
      }
      if (int32_t(list.size()) > floor) worst_free = std::min(worst_free, worst);
    }
    EXPECT_EQ(total, std::min<int64_t>(held, int64_t{kv_heads} * c.budget));
    EXPECT_GE(worst_free, best_out - kRounding);
  }
  EXPECT_GT(uneven, 0) << "heads that never differ in length do not share";
}

TEST_F(SelectTokensTest, ABudgetOfTheLengthKeepsAllInOrder) {
  for (KvRule rule : {KvRule::kLatent, KvRule::kSnapKv, KvRule::kAdaKv, KvRule::kFull}) {
    Case c = RandomCase(rng_, rule);
    if (rule != KvRule::kFull) c.budget = Capacity(c);
    PagedLayer paged(c.in, {}, c.kv.window, rng_());
    const Kept kept = Select(workers_, paged, c);
    for (int32_t kv = 0; kv < c.in.shape.kv_heads; ++kv) {
      std::vector<int32_t> all(c.in.past[kv] + c.in.turn);
      std::iota(all.begin(), all.end(), 0);
      EXPECT_EQ(kept.tokens[kv], all);
    }
  }
}

TEST_F(SelectTokensTest, TiesGoToTheEarlierToken) {
  for (KvRule rule : {KvRule::kLatent, KvRule::kAdaKv}) {
    Case c;
    c.in = RandomInputs(rng_, {.layers = 1, .heads = 4, .kv_heads = 2, .head_dim = 16}, DType::kF32,
                        300);
    for (auto& k : c.in.k) {
      for (int32_t t = 1; t < 300; ++t) std::copy_n(k.data(), 16, k.data() + t * 16);
    }
    c.kv = {.rule = rule, .window = 8, .pool_before = 0, .pool_after = 0, .keep_sinks = false};
    c.budget = 50;
    c.queries = 8;
    PagedLayer paged(c.in, {}, 8, rng_());
    const Kept kept = Select(workers_, paged, c);
    std::vector<int32_t> expected(50);
    std::iota(expected.begin(), expected.begin() + 42, 0);
    std::iota(expected.begin() + 42, expected.end(), 292);
    EXPECT_EQ(kept.tokens[0], expected);
    EXPECT_EQ(kept.tokens[1], expected);
  }
}

TEST_F(SelectTokensTest, KeepsWhatFollowsATokenThatWasLookedAt) {
  for (const Pooling pooling : {Pooling::kAverage, Pooling::kMax}) {
    Case c;
    c.in = RandomInputs(rng_, {.layers = 1, .heads = 1, .kv_heads = 1, .head_dim = 16}, DType::kF32,
                        100);
    // Only token 50 is like the last query, which looks at nothing else.
    std::fill(c.in.k[0].begin(), c.in.k[0].end(), 0.0f);
    for (int32_t e = 0; e < 16; ++e) c.in.k[0][50 * 16 + e] = 100 * c.in.Query(99, 0)[e];
    c.kv = {
        .window = 1, .pooling = pooling, .pool_before = 1, .pool_after = 3, .keep_sinks = false};
    c.budget = 6;
    c.queries = 1;
    PagedLayer paged(c.in, {}, 1, rng_());
    EXPECT_EQ(Select(workers_, paged, c).tokens[0], (std::vector<int32_t>{49, 50, 51, 52, 53, 99}));
  }
}

TEST_F(SelectTokensTest, DoesNotDependOnThreadsOrPages) {
  cpu::Workers alone(1), many(5);
  for (KvRule rule : {KvRule::kLatent, KvRule::kAdaKv}) {
    const Case c = RandomCase(rng_, rule);
    PagedLayer a(c.in, {}, c.kv.window, 1), b(c.in, {}, c.kv.window, 2);
    EXPECT_EQ(Select(alone, a, c).tokens, Select(many, b, c).tokens);
  }
}

// K, V and true positions of the kept tokens, in order, on fresh pages.
TEST_F(SelectTokensTest, CompactMovesRowsWithTheirPositions) {
  for (int round = 0; round < 20; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Case c = RandomCase(rng_, KvRule::kLatent);
    PagedLayer paged(c.in, {}, c.kv.window, rng_());
    paged.Cache(c.in.turn);
    const BatchSeq seq = paged.AfterPrefill();
    const int32_t kv_heads = c.in.shape.kv_heads, capacity = Capacity(c), d = c.in.shape.head_dim;
    const bool identity = round % 4 == 0;
    std::vector<int32_t> indices(int64_t{kv_heads} * capacity), counts(kv_heads);
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      const int32_t length = c.in.past[kv] + c.in.turn;
      for (int32_t t = 0; t < length; ++t) {
        if (identity || Pick(rng_, 0, 1)) indices[int64_t{kv} * capacity + counts[kv]++] = t;
      }
    }
    const int32_t max_new = PagesFor(capacity);
    const std::vector<int32_t> new_pages = paged.AddPages(kv_heads * max_new);
    const KvPool& pool = paged.pool();
    cpu::Compact(workers_.pool, {.seq = &seq,
                                 .pool = pool,
                                 .shape = c.in.shape,
                                 .layer = c.in.layer,
                                 .indices = identity ? nullptr : indices.data(),
                                 .counts = counts.data(),
                                 .capacity = capacity,
                                 .new_pages = new_pages.data(),
                                 .max_new_pages = max_new});
    for (int32_t kv = 0; kv < kv_heads; ++kv) {
      for (int32_t i = 0; i < counts[kv]; ++i) {
        const int32_t token = indices[int64_t{kv} * capacity + i];
        const int64_t row = PageRow(new_pages[kv * max_new + i / kPageTokens], i % kPageTokens);
        ASSERT_EQ(pool.positions[row], paged.Position(kv, token));
        for (int32_t ch = 0; ch < d; ++ch) {
          ASSERT_EQ(paged.Stored(pool.k, row, ch), c.in.Key(kv, token)[ch]);
          ASSERT_EQ(paged.Stored(pool.v, row, ch), c.in.Value(kv, token)[ch]);
        }
      }
      if (counts[kv] % kPageTokens) {  // and nothing behind them
        const int32_t i = counts[kv];
        const int64_t row = PageRow(new_pages[kv * max_new + i / kPageTokens], i % kPageTokens);
        EXPECT_EQ(pool.positions[row], -1);
      }
    }
  }
}

}  // namespace
}  // namespace entropyserve
