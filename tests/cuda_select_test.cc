// What is read and what is kept: SelectBlocks, SelectTokens and Compact, CUDA against the CPU.
#include <gtest/gtest.h>

#include <set>

#include "cuda_world.h"

namespace entropyserve {
namespace {

class Selection : public testing::TestWithParam<DType> {
 protected:
  Selection() : rng_(TestSeed()) { RecordProperty("seed", std::to_string(TestSeed())); }
  std::mt19937 rng_;
};
INSTANTIATE_TEST_SUITE_P(All, Selection, testing::Values(DType::kF32, DType::kBF16),
                         [](const auto& info) { return std::string(Name(info.param)); });

// Share of the elements of `expected`'s lists that `got`'s do not have; both ascending. A count may
// be off by `slack`: a budget or a mass that ties within rounding.
struct ListDifference {
  int64_t elements = 0, missing = 0;

  void Add(const int32_t* expected, int32_t expected_count, const int32_t* got, int32_t got_count,
           int32_t slack) {
    ASSERT_EQ(expected_count < 0, got_count < 0);
    if (expected_count < 0) return;
    ASSERT_NEAR(got_count, expected_count, slack);
    ASSERT_TRUE(std::is_sorted(got, got + got_count));
    ASSERT_EQ(std::set<int32_t>(got, got + got_count).size(), size_t(got_count));
    std::vector<int32_t> lost;
    std::set_difference(expected, expected + expected_count, got, got + got_count,
                        std::back_inserter(lost));
    elements += expected_count;
    missing += int64_t(lost.size());
  }
  // Ranks are fp32 on both sides: only scores that tie within rounding may change places.
  bool Small() const { return missing * 500 <= elements; }
};

void ExpectNear(const std::vector<float>& got, const std::vector<float>& expected,
                float tolerance) {
  ASSERT_EQ(got.size(), expected.size());
  for (size_t i = 0; i < got.size(); ++i) {
    ASSERT_EQ(std::isnan(got[i]), std::isnan(expected[i])) << i;
    if (std::isnan(got[i])) continue;
    EXPECT_NEAR(got[i], expected[i], tolerance * (1 + std::abs(expected[i]))) << i;
  }
}

void ExpectSameBlocks(const World& world, int32_t slack) {
  Side cpu(Cpu(), world), cuda(Cuda(), world);
  cpu.SelectBlocks();
  cuda.SelectBlocks();
  const std::vector<int32_t> counts = cpu.Counts(), blocks = cpu.Blocks();
  const std::vector<int32_t> cuda_counts = cuda.Counts(), cuda_blocks = cuda.Blocks();
  ListDifference difference;
  for (size_t i = 0; i < counts.size(); ++i) {
    const size_t at = i * size_t(cpu.lists.capacity);
    difference.Add(&blocks[at], counts[i], &cuda_blocks[at], cuda_counts[i], slack);
  }
  EXPECT_TRUE(difference.Small()) << difference.missing << " of " << difference.elements;
  EXPECT_LT(RelativeError(cuda.ProbeOut(), cpu.ProbeOut()),
            world.dtype == DType::kF32 ? 2e-5 : 1e-2);
  for (size_t i = 0; i < world.specs.size(); ++i) {
    if (world.specs[i].turn_total == 0) continue;
    EXPECT_EQ(cuda.Counters(i).pairs, cpu.Counters(i).pairs);
    EXPECT_EQ(cuda.Counters(i).box_blocks, cpu.Counters(i).box_blocks);
    const std::vector<HeadState> a = cuda.States(i), b = cpu.States(i);
    for (size_t h = 0; h < a.size(); ++h) {
      EXPECT_NEAR(a[h].entropy, b[h].entropy, 2e-3f * (1 + b[h].entropy));
      if (std::isfinite(b[h].budget)) {
        EXPECT_NEAR(a[h].budget, b[h].budget, 2e-3f * (1 + b[h].budget));
      } else {
        EXPECT_EQ(a[h].budget, b[h].budget);
      }
      EXPECT_EQ(a[h].segments, b[h].segments);
      EXPECT_EQ(a[h].not_rigid, b[h].not_rigid);
    }
    const size_t n = a.size() * size_t(cpu.seqs[i].trace_segments);
    ExpectNear(cuda.arena.Get(cuda.seqs[i].trace_entropy, n),
               cpu.arena.Get(cpu.seqs[i].trace_entropy, n), 2e-3f);
    ExpectNear(cuda.arena.Get(cuda.seqs[i].trace_budget, n),
               cpu.arena.Get(cpu.seqs[i].trace_budget, n), slack > 0 ? 0.05f : 2e-3f);
  }
}

PrefillParams SmallPolicy() {
  PrefillParams policy;
  policy.segment = 128;
  policy.dense_prefix = 256;
  policy.dense_suffix = 20;
  policy.first_sparse_layer = 0;
  policy.base = 256;
  return policy;
}

// Three prompts of one policy: a fresh one, a later chunk of one with a past, one that ends
// raggedly.
World Prompts(const AttentionShape& shape, DType dtype, const PrefillParams& policy,
              uint32_t seed) {
  const int32_t s = policy.segment;
  return World(shape, dtype,
               {{.rows = 8 * s, .turn_total = 9 * s, .policy = policy, .bounds = true},
                {.past = {70},
                 .before = 5 * s,
                 .rows = 3 * s,
                 .turn_total = 10 * s,
                 .policy = policy,
                 .bounds = true},
                {.past = {5}, .before = 8, .rows = 1},
                {.rows = 6 * s + 33, .turn_total = 6 * s + 33, .policy = policy, .bounds = true}},
               seed);
}

const std::vector<AttentionShape> kShapes = {
    {2, 8, 2, 64}, {2, 4, 1, 128}, {2, 9, 3, 64}, {2, 4, 2, 32}};

TEST_P(Selection, EntropyBudgets) {
  for (const AttentionShape& shape : kShapes) {
    for (const bool forced : {true, false}) {
      PrefillParams policy = SmallPolicy();
      policy.forced = forced;
      policy.temperature = forced ? 0.3f : 1.0f;
      policy.block = forced ? 8 : 32;
      ExpectSameBlocks(Prompts(shape, GetParam(), policy, rng_()), 1);
    }
  }
}

TEST_P(Selection, FixedBudgets) {
  for (const Estimator estimator : {Estimator::kBox, Estimator::kProbe}) {
    for (const AttentionShape& shape : kShapes) {
      PrefillParams policy = SmallPolicy();
      policy.estimator = estimator;
      policy.budget = BudgetRule::kFixed;
      policy.correction = 16;
      ExpectSameBlocks(Prompts(shape, GetParam(), policy, rng_()), 0);
    }
  }
}

TEST_P(Selection, CoverageBudgets) {
  for (const Estimator estimator : {Estimator::kBox, Estimator::kProbe}) {
    for (const float coverage : {0.6f, 0.95f, 1.0f}) {
      PrefillParams policy = SmallPolicy();
      policy.estimator = estimator;
      policy.budget = BudgetRule::kCoverage;
      policy.coverage = coverage;
      policy.coverage_max = 512;
      policy.forced = coverage > 0.7f;
      policy.temperature = 0.2f;
      policy.probe_stride = 16;
      policy.correction = 16;
      ExpectSameBlocks(Prompts({1, 8, 2, 64}, GetParam(), policy, rng_()), 1);
    }
  }
}

TEST_P(Selection, WholePromptBudgets) {
  for (const int32_t n : {8 * 128, 9 * 128 + 50}) {
    PrefillParams policy = SmallPolicy();
    policy.whole_prompt = true;
    policy.forced = false;
    policy.correction = 0;
    policy.temperature = 0.3f;
    const World world({2, 8, 2, 64}, GetParam(),
                      {{.rows = n, .turn_total = n, .policy = policy, .bounds = true}}, rng_());
    ExpectSameBlocks(world, 1);
  }
}

TEST_P(Selection, DenseLayersAreMarked) {
  PrefillParams policy = SmallPolicy();
  policy.first_sparse_layer = 5;
  ExpectSameBlocks(Prompts({2, 8, 2, 64}, GetParam(), policy, rng_()), 0);
  policy.full = true;
  ExpectSameBlocks(Prompts({2, 8, 2, 64}, GetParam(), policy, rng_()), 0);
}

KvParams Kv(KvRule rule) {
  KvParams kv;
  kv.rule = rule;
  kv.window = 16;
  kv.budget = 200;
  kv.pool_before = 2, kv.pool_after = 5;
  if (rule == KvRule::kAdaKv) kv.pooling = Pooling::kMax, kv.pool_before = 3;
  return kv;
}

struct KeptTokens {
  std::vector<int32_t> indices, counts;
};

KeptTokens SelectTokens(Side& side, const BatchSeq& seq, const KvParams& kv, int32_t budget,
                        int32_t window_queries, int32_t capacity) {
  const size_t kv_heads = size_t(side.world.shape.kv_heads);
  SelectTokensParams p;
  p.seq = &seq;
  p.pool = side.pool;
  p.shape = side.world.shape;
  p.layer = side.world.layer;
  p.kv = kv;
  p.budget = budget;
  p.window_queries = window_queries;
  p.capacity = capacity;
  p.indices = side.arena.Put(std::vector<int32_t>(kv_heads * size_t(capacity), -5));
  p.counts = side.arena.Put(std::vector<int32_t>(kv_heads, -5));
  side.arena.backend.SelectTokens(p);
  return {side.arena.Get(p.indices, kv_heads * size_t(capacity)),
          side.arena.Get(p.counts, kv_heads)};
}

TEST_P(Selection, KeptTokensAndTheirMove) {
  for (const AttentionShape& shape : kShapes) {
    for (const KvRule rule : {KvRule::kLatent, KvRule::kSnapKv, KvRule::kAdaKv, KvRule::kFull}) {
      for (const bool sinks : {true, false}) {
        SCOPED_TRACE(testing::Message() << "rule " << int(rule) << ", head_dim " << shape.head_dim);
        KvParams kv = Kv(rule);
        kv.keep_sinks = sinks;
        std::vector<int32_t> past(size_t(shape.kv_heads), 0);
        for (int32_t& length : past) length = int32_t(rng_() % 400);
        const World world(shape, GetParam(), {{.past = past, .before = 900, .window = 16}}, rng_());
        Side cpu(Cpu(), world), cuda(Cuda(), world);
        const int32_t capacity = 64 * kPageTokens;
        KeptTokens kept[2];
        for (Side* side : {&cpu, &cuda}) {
          BatchSeq seq = side->seqs[0];  // as after the step
          seq.appended += 1;
          seq.position += 1;
          kept[side == &cuda] = SelectTokens(*side, seq, kv, kv.budget, sinks ? 16 : 9, capacity);
        }
        ListDifference difference;
        for (int32_t h = 0; h < shape.kv_heads; ++h) {
          const size_t at = size_t(h) * size_t(capacity);
          // Only adakv moves budget between heads.
          difference.Add(&kept[0].indices[at], kept[0].counts[size_t(h)], &kept[1].indices[at],
                         kept[1].counts[size_t(h)], rule == KvRule::kAdaKv ? 2 : 0);
        }
        EXPECT_TRUE(difference.Small()) << difference.missing << " of " << difference.elements;

        // Into pages of layer 0, which holds nothing that counts here.
        const int32_t most = *std::max_element(kept[0].counts.begin(), kept[0].counts.end());
        const int32_t new_pages = PagesFor(most);
        ASSERT_LE(new_pages * shape.kv_heads * shape.layers, int32_t(world.tables[0].pages.size()));
        std::vector<int32_t> targets(world.tables[0].pages.begin(),
                                     world.tables[0].pages.begin() + new_pages * shape.kv_heads);
        std::vector<float> k[2], v[2];
        std::vector<int32_t> positions[2];
        for (Side* side : {&cpu, &cuda}) {
          BatchSeq seq = side->seqs[0];
          seq.appended += 1;
          CompactParams p;
          p.seq = &seq;
          p.pool = side->pool;
          p.shape = shape;
          p.layer = world.layer;
          p.indices = side->arena.Put(kept[0].indices);
          p.counts = side->arena.Put(kept[0].counts);
          p.capacity = capacity;
          p.new_pages = side->arena.Put(targets);
          p.max_new_pages = new_pages;
          side->arena.backend.Compact(p);
          const int i = side == &cuda;
          k[i] = side->arena.GetFloats(side->pool.k, int64_t(world.k.size()), GetParam());
          v[i] = side->arena.GetFloats(side->pool.v, int64_t(world.v.size()), GetParam());
          positions[i] = side->arena.Get(side->pool.positions, world.positions.size());
        }
        EXPECT_EQ(RelativeError(k[1], k[0]), 0);
        EXPECT_EQ(RelativeError(v[1], v[0]), 0);
        EXPECT_EQ(positions[1], positions[0]);
      }
    }
  }
}

}  // namespace
}  // namespace entropyserve
