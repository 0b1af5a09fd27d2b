// SelectBlocks against twins in double precision that work on plain arrays, and its invariants.
#include "kernels/cpu/select.h"

#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "kernels/cpu/select_internal.h"
#include "kernels/cpu/workers.h"
#include "tests/select_testing.h"
#include "tests/select_twins.h"

namespace entropyserve {
namespace {

constexpr double kScoreRounding = 2e-4;  // of fp32 dot products of a few hundred terms of size 10

int Pick(std::mt19937& rng, int low, int high) {
  return std::uniform_int_distribution(low, high)(rng);
}
template <typename T>
T OneOf(std::mt19937& rng, std::initializer_list<T> values) {
  return *(values.begin() + Pick(rng, 0, int(values.size()) - 1));
}

// The list is ascending, holds the forced blocks, and no block outside of it scores higher than one
// inside by more than rounding.
void ExpectBest(const std::vector<int32_t>& list, const std::set<int32_t>& forced,
                const NaiveEstimate& e, double rounding) {
  EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
  const std::set<int32_t> chosen(list.begin(), list.end());
  ASSERT_EQ(chosen.size(), list.size()) << "a block twice";
  double worst_in = 1e30, best_out = -1e30;
  for (int32_t j = 0; j < int32_t(e.score.size()); ++j) {
    if (forced.count(j)) {
      EXPECT_TRUE(chosen.count(j)) << "forced block " << j;
    } else if (chosen.count(j)) {
      worst_in = std::min(worst_in, e.score[j]);
    } else {
      best_out = std::max(best_out, e.score[j]);
    }
  }
  if (!list.empty()) {
    EXPECT_GE(list.front(), 0);
    EXPECT_LT(list.back(), int32_t(e.score.size()));
  }
  EXPECT_GE(worst_in, best_out - rounding);
}

// The shortest list: with it the coverage is reached, without its last one it is not.
void ExpectCoverage(const PrefillParams& policy, const std::vector<int32_t>& list,
                    const std::set<int32_t>& forced, const NaiveEstimate& e) {
  const int32_t visible = int32_t(e.score.size()), count = int32_t(list.size());
  const int32_t most = std::min(visible, policy.coverage_max / policy.block);
  const int32_t least =
      std::min(most, std::max(CeilDiv(policy.coverage_min, policy.block), int32_t(forced.size())));
  ASSERT_GE(count, least);
  ASSERT_LE(count, most);
  double mass = e.covered, last = 1e30;
  for (int32_t j : list) {
    mass += e.p[j];
    if (!forced.count(j)) last = std::min(last, e.p[j]);
  }
  constexpr double kRounding = 1e-5;
  if (count < most) {
    EXPECT_GE(mass, policy.coverage - kRounding);
  }
  if (count > least) {
    EXPECT_LT(mass - last, policy.coverage + kRounding);
  }
}

// ---- Running ----

struct Selection {
  std::vector<std::vector<ChosenBlocks>> lists;  // [segments of the turn][kv_heads]
  std::vector<float> p, entropy;                 // see SelectCapture
  std::vector<float> probe_out;                  // [turn, heads, head_dim]
};

// Selects for a whole turn, cut into chunks that end at `ends`.
Selection Select(cpu::Workers& workers, PagedLayer& paged, const LayerInputs& in,
                 const std::vector<int32_t>& ends, int32_t columns) {
  Selection all;
  int32_t begin = 0;
  for (int32_t end : ends) {
    paged.Step(begin, end);
    cpu::SelectCapture capture;
    capture.columns = columns;
    cpu::SelectBlocks(workers, paged.Select(), &capture);
    for (auto& segment : paged.Chosen()) all.lists.push_back(std::move(segment));
    all.p.insert(all.p.end(), capture.p.begin(), capture.p.end());
    all.entropy.insert(all.entropy.end(), capture.entropy.begin(), capture.entropy.end());
    all.probe_out.insert(all.probe_out.end(), paged.probe_out.begin(), paged.probe_out.end());
    begin = end;
  }
  Check(begin == in.turn, "chunks cover the turn");
  return all;
}

std::vector<int32_t> RandomCuts(std::mt19937& rng, int32_t turn, int32_t segment) {
  std::vector<int32_t> ends;
  for (int32_t at = segment; at < turn; at += segment) {
    if (Pick(rng, 0, 1)) ends.push_back(at);
  }
  ends.push_back(turn);
  return ends;
}

struct Case {
  AttentionShape shape;
  PrefillParams policy;
  LayerInputs in;
};

Case RandomCase(std::mt19937& rng) {
  Case c;
  c.shape = {.layers = 2, .kv_heads = Pick(rng, 1, 3), .head_dim = OneOf(rng, {16, 40, 64})};
  c.shape.heads = c.shape.kv_heads * Pick(rng, 1, 7);
  PrefillParams& p = c.policy;
  p.segment = OneOf(rng, {64, 128});
  p.block = OneOf(rng, {4, 8, 16, 32});
  p.estimator = OneOf(rng, {Estimator::kBox, Estimator::kProbe});
  p.budget = OneOf(rng, {BudgetRule::kEntropy, BudgetRule::kFixed, BudgetRule::kCoverage});
  p.forced = Pick(rng, 0, 1);
  p.correction = OneOf(rng, {0, 16, 32});
  p.probe_stride = OneOf(rng, {1, 16, 32});
  p.dense_prefix = OneOf(rng, {0, 128, 200});
  p.dense_suffix = OneOf(rng, {0, 1, 100});
  p.base = p.segment + p.block + OneOf(rng, {0, 24, 60});
  p.delta = OneOf(rng, {0.05f, 0.4f});
  p.alpha = OneOf(rng, {0.5f, 1.0f});
  p.temperature = OneOf(rng, {1.0f, 0.1f});
  p.coverage = OneOf(rng, {0.6f, 0.9f, 1.0f});
  p.coverage_min = OneOf(rng, {0, 128});
  p.coverage_max = OneOf(rng, {320, 8192});
  std::vector<int32_t> past(c.shape.kv_heads, 0);
  if (Pick(rng, 0, 1)) {
    for (int32_t& n : past) n = Pick(rng, 1, 150);
  }
  const DType dtype = OneOf(rng, {DType::kF32, DType::kBF16});
  c.in = RandomInputs(rng, c.shape, dtype, Pick(rng, 2 * p.segment, 9 * p.segment), past);
  return c;
}

// ---- Tests ----

// The length of a sparse segment's list, and what is in it.
void ExpectList(const PrefillParams& policy, int32_t s, const std::vector<int32_t>& list,
                float entropy_budget, const NaiveEstimate& e) {
  const std::set<int32_t> forced = NaiveForced(policy, s);
  ExpectBest(list, forced, e, policy.estimator == Estimator::kBox ? kScoreRounding : 1e-7);
  const int32_t visible = s * policy.segment / policy.block;
  switch (policy.budget) {
    case BudgetRule::kEntropy:
      EXPECT_EQ(int32_t(list.size()),
                std::min(visible, int32_t(entropy_budget / float(policy.block))));
      break;
    case BudgetRule::kFixed:
      EXPECT_EQ(int32_t(list.size()), std::min(visible, policy.base / policy.block));
      break;
    case BudgetRule::kCoverage:
      if (policy.coverage >= 1) {
        EXPECT_EQ(int32_t(list.size()), visible);
      } else {
        ExpectCoverage(policy, list, forced, e);
      }
  }
}

// One segment and kv head of a selection against the twins, whose state goes on to the next.
void ExpectSegment(const Case& c, const PagedLayer& paged, const Selection& got, int32_t columns,
                   int32_t s, int32_t kv, NaiveState* state) {
  const PrefillParams& policy = c.policy;
  const int32_t begin = s * policy.segment, end = std::min(c.in.turn, begin + policy.segment);
  const bool full_segment = end - begin == policy.segment;
  const bool dense = begin < policy.dense_prefix || end > c.in.turn - policy.dense_suffix;
  const ChosenBlocks& chosen = got.lists[s][kv];
  ASSERT_EQ(chosen.dense, dense);
  const bool remembered = policy.budget == BudgetRule::kEntropy && full_segment;
  const bool estimated = s > 0 && (!dense || remembered);
  const size_t at = size_t(s) * c.shape.kv_heads + kv;
  const int64_t trace = paged.TraceIndex(kv, s);
  ASSERT_EQ(std::isnan(got.entropy[at]), !estimated);
  NaiveEstimate e;
  if (estimated) {
    e = Naive(c.in, policy, s, kv);
    for (size_t j = 0; j < e.p.size(); ++j) {
      ASSERT_NEAR(got.p[at * columns + j], e.p[j], 1e-4) << "block " << j;
    }
    EXPECT_NEAR(got.entropy[at], e.entropy, 1e-3);
    EXPECT_EQ(paged.trace_entropy[trace], got.entropy[at]);
  }
  if (full_segment) NaiveAdvance(policy, s, estimated ? got.entropy[at] : 0, state);
  EXPECT_EQ(paged.trace_selected[trace], dense ? -1 : int32_t(chosen.blocks.size()));
  if (policy.budget == BudgetRule::kEntropy) {
    EXPECT_NEAR(paged.trace_budget[trace], state->budget, 0.02);
  }
  if (!dense) ExpectList(policy, s, chosen.blocks, paged.trace_budget[trace], e);
}

class SelectBlocksTest : public testing::Test {
 protected:
  SelectBlocksTest()
      : seed_(std::random_device{}()), rng_(seed_), trace_(__FILE__, __LINE__, Seed()) {}
  std::string Seed() const { return "seed " + std::to_string(seed_); }

  const uint32_t seed_;
  std::mt19937 rng_;
  testing::ScopedTrace trace_;
  cpu::Workers workers_{2};
};

// Every part, on random shapes, policies, chunks and past runs.
TEST_F(SelectBlocksTest, AgreesWithTheTwins) {
  for (int round = 0; round < 40; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Case c = RandomCase(rng_);
    const int32_t columns = CeilDiv(c.in.turn, c.policy.block);
    PagedLayer paged(c.in, c.policy, 8, rng_());
    paged.Trace();
    const Selection got =
        Select(workers_, paged, c.in, RandomCuts(rng_, c.in.turn, c.policy.segment), columns);
    ASSERT_EQ(int32_t(got.lists.size()), CeilDiv(c.in.turn, c.policy.segment));
    for (int32_t kv = 0; kv < c.shape.kv_heads; ++kv) {
      NaiveState state;
      for (int32_t s = 0; s < int32_t(got.lists.size()); ++s) {
        SCOPED_TRACE(testing::Message() << "segment " << s << " kv head " << kv);
        ExpectSegment(c, paged, got, columns, s, kv, &state);
      }
      EXPECT_EQ(paged.state(kv).segments, c.in.turn / c.policy.segment);
    }
  }
}

// The correction's probes: exact outputs at the right rows of sparse segments, nothing elsewhere.
TEST_F(SelectBlocksTest, ProbeOutputsAreExact) {
  for (int round = 0; round < 12; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    Case c = RandomCase(rng_);
    c.policy.correction = OneOf(rng_, {1, 16, 32});
    PagedLayer paged(c.in, c.policy, 8, rng_());
    const Selection got =
        Select(workers_, paged, c.in, RandomCuts(rng_, c.in.turn, c.policy.segment), 0);
    const int32_t d = c.shape.head_dim, group = c.shape.group();
    for (int32_t t = 0; t < c.in.turn; ++t) {
      const int32_t s = t / c.policy.segment;
      const bool probe =
          !got.lists[s][0].dense && (t % c.policy.segment) % c.policy.correction == 0;
      const int32_t h = Pick(rng_, 0, c.shape.heads - 1);
      const float* out = got.probe_out.data() + (int64_t{t} * c.shape.heads + h) * d;
      if (!probe) {
        EXPECT_TRUE(std::isnan(out[0])) << "row " << t << " was written";
        continue;
      }
      const int32_t kv = h / group, limit = c.in.past[kv] + t + 1;
      const auto w = NaiveWeights(c.in, kv, c.in.Query(t, h), limit);
      for (int32_t channel = 0; channel < d; ++channel) {
        double sum = 0;
        for (int32_t key = 0; key < limit; ++key) sum += w[key] * c.in.Value(kv, key)[channel];
        ASSERT_NEAR(out[channel], sum, 2e-5) << "row " << t;
      }
    }
  }
}

TEST_F(SelectBlocksTest, CountsWhatRan) {
  for (int round = 0; round < 20; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Case c = RandomCase(rng_);
    const PrefillParams& policy = c.policy;
    PagedLayer paged(c.in, policy, 8, rng_());
    const Selection got =
        Select(workers_, paged, c.in, RandomCuts(rng_, c.in.turn, policy.segment), 1);
    uint64_t pairs = 0, box_blocks = 0;
    for (int32_t h = 0; h < c.shape.heads; ++h) {
      const int32_t kv = h / c.shape.group();
      for (int32_t t = 0; t < c.in.turn; ++t) {
        const int32_t s = t / policy.segment, offset = t % policy.segment;
        const bool sparse = !got.lists[s][kv].dense;
        const bool estimated = !std::isnan(got.entropy[s * c.shape.kv_heads + kv]);
        const bool box = policy.estimator == Estimator::kBox;
        const bool estimates = estimated && !box && offset % policy.probe_stride == 0;
        const bool corrects = sparse && policy.correction > 0 && offset % policy.correction == 0 &&
                              !(estimated && !box && policy.correction == policy.probe_stride);
        pairs += (estimates + corrects) * uint64_t(c.in.past[kv] + t + 1);
        if (estimated && box && offset == 0) box_blocks += s * (policy.segment / policy.block);
      }
    }
    EXPECT_EQ(paged.counters.pairs, pairs);
    EXPECT_EQ(paged.counters.box_blocks, box_blocks);
  }
}

// The same lists, states and probes, bit for bit, for every chunking and number of threads.
TEST_F(SelectBlocksTest, DoesNotDependOnChunksOrThreads) {
  cpu::Workers alone(1), many(5);
  for (int round = 0; round < 15; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Case c = RandomCase(rng_);
    PagedLayer whole_paged(c.in, c.policy, 8, rng_());
    const Selection whole = Select(alone, whole_paged, c.in, {c.in.turn}, 64);
    for (int i = 0; i < 3; ++i) {
      PagedLayer paged(c.in, c.policy, 8, rng_());
      const Selection cut =
          Select(many, paged, c.in, RandomCuts(rng_, c.in.turn, c.policy.segment), 64);
      EXPECT_EQ(cut.lists, whole.lists);
      EXPECT_EQ(cut.p, whole.p);
      EXPECT_EQ(0, std::memcmp(cut.probe_out.data(), whole.probe_out.data(),
                               whole.probe_out.size() * sizeof(float)));
      EXPECT_EQ(paged.counters.pairs, whole_paged.counters.pairs);
      EXPECT_EQ(paged.counters.box_blocks, whole_paged.counters.box_blocks);
      for (int32_t kv = 0; kv < c.shape.kv_heads; ++kv) {
        EXPECT_EQ(paged.state(kv).entropy, whole_paged.state(kv).entropy);
        EXPECT_EQ(paged.state(kv).budget, whole_paged.state(kv).budget);
        EXPECT_EQ(paged.state(kv).not_rigid, whole_paged.state(kv).not_rigid);
      }
    }
  }
}

// A token changes nothing before its own segment. What later chunks bring is not even in the cache
// (PagedLayer holds NaN there), so here everything is one chunk.
TEST_F(SelectBlocksTest, SeesNothingAfterTheSegment) {
  for (int round = 0; round < 10; ++round) {
    SCOPED_TRACE(testing::Message() << "round " << round);
    const Case c = RandomCase(rng_);
    LayerInputs changed = c.in;
    const int32_t token = Pick(rng_, c.policy.segment, c.in.turn - 1);
    const int32_t d = c.shape.head_dim;
    for (int32_t i = 0; i < c.shape.heads * d; ++i) {
      changed.q[int64_t{token} * c.shape.heads * d + i] += 3;
    }
    for (int32_t kv = 0; kv < c.shape.kv_heads; ++kv) {
      for (int32_t i = 0; i < d; ++i) {
        changed.k[kv][int64_t{c.in.past[kv] + token} * d + i] += 3;
        changed.v[kv][int64_t{c.in.past[kv] + token} * d + i] += 3;
      }
    }
    PagedLayer a(c.in, c.policy, 8, 1), b(changed, c.policy, 8, 1);
    const Selection before = Select(workers_, a, c.in, {c.in.turn}, 64);
    const Selection after = Select(workers_, b, changed, {c.in.turn}, 64);
    const int32_t segment = token / c.policy.segment;
    const int64_t items = int64_t{segment} * c.shape.kv_heads;
    for (int32_t s = 0; s < segment; ++s) EXPECT_EQ(before.lists[s], after.lists[s]);
    EXPECT_TRUE(std::equal(before.p.begin(), before.p.begin() + items * 64, after.p.begin()));
    EXPECT_EQ(0, std::memcmp(before.probe_out.data(), after.probe_out.data(),
                             int64_t{segment} * c.policy.segment * c.shape.heads * d * 4));
  }
}

TEST_F(SelectBlocksTest, ABudgetOverEverythingSelectsEverything) {
  for (BudgetRule rule : {BudgetRule::kEntropy, BudgetRule::kFixed, BudgetRule::kCoverage}) {
    Case c = RandomCase(rng_);
    c.policy.budget = rule;
    c.policy.base = c.in.turn;
    c.policy.coverage = 1.0f;
    c.policy.dense_prefix = c.policy.dense_suffix = 0;
    PagedLayer paged(c.in, c.policy, 8, rng_());
    const Selection got = Select(workers_, paged, c.in, {c.in.turn}, 0);
    for (int32_t s = 0; s < int32_t(got.lists.size()); ++s) {
      std::vector<int32_t> all(s * c.policy.segment / c.policy.block);
      std::iota(all.begin(), all.end(), 0);
      for (const ChosenBlocks& one : got.lists[s]) EXPECT_EQ(one.blocks, all);
    }
  }
}

// Equal keys make equal scores: the earlier blocks are taken.
TEST_F(SelectBlocksTest, TiesGoToTheEarlierBlock) {
  for (Estimator estimator : {Estimator::kBox, Estimator::kProbe}) {
    const AttentionShape shape{.layers = 1, .heads = 2, .kv_heads = 1, .head_dim = 16};
    LayerInputs in = RandomInputs(rng_, shape, DType::kF32, 512);
    for (int32_t t = 1; t < in.turn; ++t) std::copy_n(in.k[0].data(), 16, in.k[0].data() + t * 16);
    PrefillParams policy{.estimator = estimator,
                         .budget = BudgetRule::kFixed,
                         .forced = false,
                         .correction = 0,
                         .segment = 128,
                         .dense_prefix = 0,
                         .dense_suffix = 0,
                         .first_sparse_layer = 0,
                         .base = 80};
    PagedLayer paged(in, policy, 8, rng_());
    const Selection got = Select(workers_, paged, in, {in.turn}, 0);
    for (int32_t s = 1; s < 4; ++s) {
      EXPECT_EQ(got.lists[s][0].blocks, (std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9}));
    }
    policy.forced = true;  // block 0 and the previous segment, nothing left to choose
    policy.base = 128 + 8;
    PagedLayer forced(in, policy, 8, rng_());
    const Selection with = Select(workers_, forced, in, {in.turn}, 0);
    std::vector<int32_t> expected(17, 0);
    std::iota(expected.begin() + 1, expected.end(), 32);
    EXPECT_EQ(with.lists[3][0].blocks, expected);
  }
}

TEST_F(SelectBlocksTest, FullPoliciesAndLayersBelowTheFirstSparseOneAreDense) {
  Case c = RandomCase(rng_);
  c.policy.full = true;
  PagedLayer full(c.in, c.policy, 8, rng_());
  c.policy.full = false;
  c.policy.first_sparse_layer = 2;  // the layer that runs is 1
  PagedLayer low(c.in, c.policy, 8, rng_());
  for (PagedLayer* paged : {&full, &low}) {
    const Selection got = Select(workers_, *paged, c.in, {c.in.turn}, 0);
    for (const auto& segment : got.lists) {
      for (const ChosenBlocks& one : segment) EXPECT_TRUE(one.dense);
    }
    EXPECT_EQ(paged->counters.pairs, 0u);
    EXPECT_EQ(paged->counters.box_blocks, 0u);
    EXPECT_EQ(paged->state(0).segments, 0);
  }
}

}  // namespace
}  // namespace entropyserve
