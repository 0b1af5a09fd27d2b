// The paged cache against a naive model: random turns, compressions, forks, roll-backs.
#include "engine/cache/sequence_cache.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <random>
#include <set>
#include <vector>

#include "engine/cache/page_pool.h"
#include "kernels/kv_view.h"

namespace entropyserve {
namespace {

constexpr AttentionShape kShape{.layers = 2, .heads = 4, .kv_heads = 2, .head_dim = 8};
constexpr int kHeads = kShape.layers * kShape.kv_heads;

PrefillParams SparsePrefill() { return {.segment = 128, .block = 16}; }

KvParams Kv(KvRule rule, int budget) {
  KvParams kv{.rule = rule, .budget = budget, .gap = 4, .window = 8};
  if (rule == KvRule::kAdaKv) kv.pooling = Pooling::kMax;
  return kv;
}

// What a cached token should hold: a value made of who wrote it, where, and for which head.
float ValueOf(uint32_t writer, int64_t position, int head) {
  return float(writer * 131 + uint32_t(position) * 7 + uint32_t(head));
}

// The naive model: per head, the positions that are cached and the value at each.
struct Reference {
  std::vector<std::map<int64_t, float>> heads{kHeads};
  int64_t position = 0;
};

class Fixture {
 public:
  Fixture() : backend_(MakeCpuBackend(1)) {
    backend_->Reserve(
        {.shape = kShape, .max_rows = 512, .max_context = 4096, .max_seqs = 8, .vocab = 16});
    pool_ = *PagePool::Create(backend_.get(), DType::kF32, kShape.head_dim, 1500);
  }
  std::unique_ptr<SequenceCache> NewCache() {
    return std::make_unique<SequenceCache>(backend_.get(), pool_.get(), kShape);
  }
  PagePool& pool() { return *pool_; }

  // Stands in for a step: writes K, V, positions of n tokens as QkvPost does, and random window
  // queries.
  void Write(SequenceCache* cache, Reference* reference, uint32_t writer, int64_t n,
             std::mt19937* random) {
    cache->Append(n);
    BatchSeq seq;
    cache->Describe(&seq);
    const KvPool& kv = pool_->kv();
    float* const k = static_cast<float*>(kv.k);
    float* const v = static_cast<float*>(kv.v);
    std::uniform_real_distribution<float> uniform(-1, 1);
    for (int head = 0; head < kHeads; ++head) {
      const HeadView view =
          ViewHead(seq, kShape.kv_heads, head / kShape.kv_heads, head % kShape.kv_heads);
      for (int64_t i = 0; i < n; ++i) {
        const int64_t row = view.TurnRow(int32_t(view.turn + i));
        const int64_t position = reference->position + i;
        const float value = ValueOf(writer, position, head);
        for (int c = 0; c < kShape.head_dim; ++c)
          k[row * kShape.head_dim + c] = c == 0 ? value : uniform(*random);
        for (int c = 0; c < kShape.head_dim; ++c) v[row * kShape.head_dim + c] = -value;
        kv.positions[row] = int32_t(position);
        reference->heads[head][position] = value;
      }
      for (int i = 0; view.window_pages && i < seq.window * kShape.group(); ++i) {
        const WindowSlot slot = WindowRow(view.window_pages, i);
        float* const q = (slot.k_half ? k : v) + slot.row * kShape.head_dim;
        for (int c = 0; c < kShape.head_dim; ++c) q[c] = c == 0 ? 0.0f : uniform(*random);
      }
    }
    cache->Advance(n);
    reference->position += n;
  }

  // Every cached token is where the page table says, with its own value and its true position.
  void ExpectEqual(SequenceCache& cache, const Reference& reference) {
    ASSERT_EQ(cache.position(), reference.position);
    for (int head = 0; head < kHeads; ++head) {
      const std::vector<int32_t> positions =
          cache.ReadPositions(head / kShape.kv_heads, head % kShape.kv_heads);
      const auto& expected = reference.heads[head];
      ASSERT_EQ(positions.size(), expected.size()) << "head " << head;
      size_t i = 0;
      for (const auto& [position, value] : expected)
        ASSERT_EQ(positions[i++], position) << "head " << head;
    }
    if (!cache.in_turn()) return;
    BatchSeq seq;
    cache.Describe(&seq);
    const float* const k = static_cast<const float*>(pool_->kv().k);
    const float* const v = static_cast<const float*>(pool_->kv().v);
    for (int head = 0; head < kHeads; ++head) {
      const HeadView view =
          ViewHead(seq, kShape.kv_heads, head / kShape.kv_heads, head % kShape.kv_heads);
      int32_t i = 0;
      for (const auto& [position, value] : reference.heads[head]) {
        const int64_t row = view.Row(i++);
        ASSERT_EQ(k[row * kShape.head_dim], value) << "head " << head << " position " << position;
        ASSERT_EQ(v[row * kShape.head_dim + 1], -value);
      }
    }
  }

  // After a compression the reference keeps what the cache says it kept, checked against the rule.
  void FollowCompression(SequenceCache& cache, Reference* reference, const KvParams& kv,
                         int64_t turn_tokens) {
    int64_t layer_total = 0;
    for (int head = 0; head < kHeads; ++head) {
      const std::vector<int32_t> kept =
          cache.ReadPositions(head / kShape.kv_heads, head % kShape.kv_heads);
      std::map<int64_t, float> next;
      for (int32_t position : kept) {
        const auto it = reference->heads[head].find(position);
        ASSERT_NE(it, reference->heads[head].end()) << "kept a token that was not there";
        next.insert(*it);
      }
      ASSERT_EQ(next.size(), kept.size()) << "a token twice";
      if (kv.rule != KvRule::kAdaKv) {
        ASSERT_EQ(int64_t(kept.size()), std::min<int64_t>(cache.ResolveBudget(kv),
                                                          int64_t(reference->heads[head].size())));
      }
      layer_total += int64_t(kept.size());
      if ((head + 1) % kShape.kv_heads == 0) {
        ASSERT_LE(layer_total, cache.ResolveBudget(kv) * kShape.kv_heads);
        layer_total = 0;
      }
      // The window's tokens stay.
      auto last = reference->heads[head].rbegin();
      for (int64_t i = 0; i < std::min<int64_t>(kv.window, turn_tokens); ++i, ++last) {
        ASSERT_TRUE(next.count(last->first)) << "the window lost position " << last->first;
      }
      reference->heads[head] = std::move(next);
    }
  }

 private:
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<PagePool> pool_;
};

struct Live {
  std::unique_ptr<SequenceCache> cache;
  Reference reference, before_turn;
  TurnPlan plan;
  uint32_t writer = 0;
  int64_t written = 0;  // tokens of this turn
  bool compressed = false;
};

TurnPlan RandomPlan(std::mt19937* random) {
  auto in = [&](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(*random);
  };
  constexpr KvRule kRules[] = {KvRule::kFull, KvRule::kLatent, KvRule::kSnapKv, KvRule::kAdaKv};
  PrefillParams prefill = SparsePrefill();
  prefill.full = in(0, 1) == 0;
  KvParams kv = Kv(kRules[in(0, 3)], in(20, 90));
  if (in(0, 3) == 0)
    kv.fraction = 0.05f * float(in(1, 12));  // a budget that grows with the positions
  return {.prompt = in(1, 200),
          .max_new = in(0, 60),
          .prefill = prefill,
          .kv = kv,
          .keep = true,
          .trace = in(0, 3) == 0};
}

TEST(SequenceCacheTest, TenThousandRandomOperationsMatchANaiveModel) {
  constexpr int kOperations = 10000;
  const unsigned seed = 20261122;
  std::mt19937 random(seed);
  Fixture fixture;
  std::vector<Live> live(4);
  uint32_t writers = 0;
  int compressions = 0, rollbacks = 0, forks = 0, refusals = 0, later_turns = 0;
  for (int operation = 0; operation < kOperations; ++operation) {
    SCOPED_TRACE(testing::Message() << "seed " << seed << " operation " << operation);
    Live& one = live[random() % live.size()];
    if (!one.cache) {
      one = Live{.cache = fixture.NewCache(), .writer = ++writers};
      continue;
    }
    if (!one.cache->in_turn()) {
      const unsigned choice = random() % 10;
      if (choice == 0 || one.reference.position > 1500) {
        one.cache.reset();
      } else if (choice <= 3) {
        Live& other = live[random() % live.size()];
        if (&other != &one && (!other.cache || !other.cache->in_turn())) {
          other = Live{.cache = one.cache->Fork(), .reference = one.reference, .writer = ++writers};
          ++forks;
        }
      } else {
        one.plan = RandomPlan(&random);
        one.before_turn = one.reference;
        one.written = 0;
        one.compressed = false;
        const int64_t available = fixture.pool().available();
        if (!one.cache->BeginTurn(one.plan).ok()) {
          ++refusals;
          ASSERT_EQ(fixture.pool().available(), available) << "a refused turn keeps nothing";
        } else if (one.reference.position > 0) {
          ++later_turns;
        }
      }
      continue;
    }
    const int64_t gap = one.plan.kv.rule == KvRule::kSnapKv ? 0 : one.plan.kv.gap;
    const int64_t limit = one.plan.prompt + one.plan.max_new;
    const bool due =
        !one.compressed && one.written == one.plan.prompt + gap && one.plan.max_new > gap;
    if (due && one.cache->WantsCompression(one.plan.kv)) {
      one.cache->Compress(one.plan.kv);
      one.compressed = true;
      fixture.FollowCompression(*one.cache, &one.reference, one.plan.kv, one.written);
      ++compressions;
    } else if (one.written < one.plan.prompt && random() % 12 == 0) {
      one.cache->RollBack();
      one.reference = one.before_turn;
      ++rollbacks;
    } else if (one.written < limit && random() % 20 != 0) {
      int64_t n = 1;
      if (one.written < one.plan.prompt) {
        n = std::min<int64_t>(one.plan.prompt - one.written, 128);
      } else {
        // Never past the point where compression is due.
        const int64_t until_gap = one.plan.prompt + gap - one.written;
        n = std::min(1 + int64_t(random() % 8), until_gap > 0 ? until_gap : limit - one.written);
        n = std::min(n, limit - one.written);
      }
      fixture.Write(one.cache.get(), &one.reference, one.writer, n, &random);
      one.written += n;
      if (one.written == one.plan.prompt) one.cache->EndPrefill();
    } else if (one.written >= one.plan.prompt) {
      if (one.cache->WantsCompression(one.plan.kv)) {
        one.cache->Compress(one.plan.kv);
        fixture.FollowCompression(*one.cache, &one.reference, one.plan.kv, one.written);
        ++compressions;
      }
      one.cache->EndTurn();
    }
    fixture.ExpectEqual(*one.cache, one.reference);
    if (HasFatalFailure()) return;
  }
  // The test reached what it is for.
  EXPECT_GT(compressions, 100);
  EXPECT_GT(rollbacks, 50);
  EXPECT_GT(forks, 50);
  EXPECT_GT(later_turns, 200);
  live.clear();
  EXPECT_EQ(fixture.pool().used(), 0) << "every page returns";
  EXPECT_EQ(fixture.pool().reserved(), 0);
}

TEST(SequenceCacheTest, LaterTurnsWriteTruePositionsAfterCompression) {
  Fixture fixture;
  std::mt19937 random(7);
  auto cache = fixture.NewCache();
  Reference reference;
  const KvParams kv = Kv(KvRule::kSnapKv, 32);
  ASSERT_TRUE(
      cache
          ->BeginTurn(
              {.prompt = 200, .max_new = 0, .prefill = {.full = true}, .kv = kv, .keep = true})
          .ok());
  fixture.Write(cache.get(), &reference, 1, 200, &random);
  cache->EndPrefill();
  cache->Compress(kv);
  cache->EndTurn();
  ASSERT_EQ(cache->MaxLength(), 32);
  EXPECT_EQ(cache->position(), 200) << "length is not position";
  ASSERT_TRUE(
      cache
          ->BeginTurn(
              {.prompt = 3, .max_new = 0, .prefill = {.full = true}, .kv = kv, .keep = true})
          .ok());
  BatchSeq seq;
  cache->Describe(&seq);
  EXPECT_EQ(seq.position, 200);
  EXPECT_EQ(seq.lengths[0].past, 32);
}

TEST(SequenceCacheTest, ForksShareWholePagesAndNothingElse) {
  Fixture fixture;
  std::mt19937 random(8);
  auto cache = fixture.NewCache();
  Reference reference;
  const KvParams kv{.rule = KvRule::kFull};
  ASSERT_TRUE(
      cache
          ->BeginTurn(
              {.prompt = 130, .max_new = 0, .prefill = {.full = true}, .kv = kv, .keep = true})
          .ok());
  fixture.Write(cache.get(), &reference, 1, 130, &random);
  cache->EndTurn();
  EXPECT_EQ(fixture.pool().used(), kHeads * 3);
  auto fork = cache->Fork();
  EXPECT_EQ(fixture.pool().used(), kHeads * 3) << "a fork shares every page";
  Reference fork_reference = reference;
  ASSERT_TRUE(
      fork->BeginTurn(
              {.prompt = 5, .max_new = 0, .prefill = {.full = true}, .kv = kv, .keep = true})
          .ok());
  fixture.Write(fork.get(), &fork_reference, 2, 5, &random);
  fork->EndTurn();
  // Two whole pages stay shared, the partial one was copied and grew.
  EXPECT_EQ(fixture.pool().used(), kHeads * 4);
  fixture.ExpectEqual(*cache, reference);
  fixture.ExpectEqual(*fork, fork_reference);
  cache.reset();
  EXPECT_EQ(fixture.pool().used(), kHeads * 3);
  fork.reset();
  EXPECT_EQ(fixture.pool().used(), 0);
}

TEST(SequenceCacheTest, CompressionReturnsItsSurplusAtOnce) {
  Fixture fixture;
  std::mt19937 random(9);
  auto cache = fixture.NewCache();
  Reference reference;
  const KvParams kv = Kv(KvRule::kLatent, 40);
  const TurnPlan plan{.prompt = 1000, .max_new = 50, .prefill = SparsePrefill(), .kv = kv};
  const int64_t worst = cache->WorstCasePages(plan);
  ASSERT_TRUE(cache->BeginTurn(plan).ok());
  EXPECT_EQ(fixture.pool().available(), fixture.pool().total() - worst);
  fixture.Write(cache.get(), &reference, 1, 1000, &random);
  cache->EndPrefill();
  fixture.Write(cache.get(), &reference, 1, kv.gap, &random);
  cache->Compress(kv);
  // 40 kept and 46 more to come: two pages a head.
  EXPECT_EQ(fixture.pool().available(), fixture.pool().total() - kHeads * 2);
  EXPECT_EQ(cache->kv_bytes(), kHeads * fixture.pool().page_bytes());
}

// One head may hold far more than the budget: what counts is what all hold.
TEST(SequenceCacheTest, AnUnevenCacheIsNotCompressedAgain) {
  Fixture fixture;
  std::mt19937 random(13);
  auto cache = fixture.NewCache();
  Reference reference;
  KvParams kv{.rule = KvRule::kAdaKv, .budget = 40, .gap = 4, .window = 4, .adakv_floor = 0};
  ASSERT_TRUE(
      cache
          ->BeginTurn(
              {.prompt = 600, .max_new = 8, .prefill = {.full = true}, .kv = kv, .keep = true})
          .ok());
  fixture.Write(cache.get(), &reference, 1, 600, &random);
  cache->EndPrefill();
  fixture.Write(cache.get(), &reference, 1, kv.gap, &random);
  ASSERT_TRUE(cache->WantsCompression(kv));
  cache->Compress(kv);
  ASSERT_GT(2 * cache->MaxLength(), 3 * kv.budget) << "nothing uneven to look at";
  EXPECT_FALSE(cache->WantsCompression(kv));
}

// Compressed after the gap and again at the end, when the fraction's budget has grown.
TEST(SequenceCacheTest, AGrowingBudgetStaysWithinTheReservation) {
  Fixture fixture;
  std::mt19937 random(12);
  auto cache = fixture.NewCache();
  Reference reference;
  KvParams kv{.rule = KvRule::kLatent, .budget = 60, .fraction = 0.5f, .gap = 4, .window = 4};
  const TurnPlan plan{
      .prompt = 128, .max_new = 1024, .prefill = SparsePrefill(), .kv = kv, .keep = true};
  ASSERT_TRUE(cache->BeginTurn(plan).ok());
  fixture.Write(cache.get(), &reference, 1, 128, &random);
  cache->EndPrefill();
  fixture.Write(cache.get(), &reference, 1, kv.gap, &random);
  ASSERT_TRUE(cache->WantsCompression(kv));
  cache->Compress(kv);
  fixture.FollowCompression(*cache, &reference, kv, 132);
  for (int i = kv.gap; i < 1023; ++i) fixture.Write(cache.get(), &reference, 1, 1, &random);
  ASSERT_TRUE(cache->WantsCompression(kv));
  cache->Compress(kv);
  fixture.FollowCompression(*cache, &reference, kv, 1151);
  EXPECT_EQ(cache->MaxLength(), 576);  // half of 1151 positions, rounded up
  cache->EndTurn();
  fixture.ExpectEqual(*cache, reference);
}

TEST(SequenceCacheTest, AShortTurnIsNotChargedAWholeBudget) {
  Fixture fixture;
  auto cache = fixture.NewCache();
  const TurnPlan plan{
      .prompt = 50, .max_new = 14, .prefill = {.full = true}, .kv = Kv(KvRule::kLatent, 1 << 20)};
  EXPECT_LE(cache->WorstCasePages(plan), 6 * kHeads);
}

TEST(SequenceCacheTest, BudgetAtOrAboveTheLengthChangesNothing) {
  Fixture fixture;
  std::mt19937 random(10);
  for (KvRule rule : {KvRule::kLatent, KvRule::kSnapKv, KvRule::kAdaKv}) {
    auto cache = fixture.NewCache();
    Reference reference;
    const KvParams kv = Kv(rule, 100);
    ASSERT_TRUE(
        cache->BeginTurn({.prompt = 100, .max_new = 0, .prefill = {.full = true}, .kv = kv}).ok());
    fixture.Write(cache.get(), &reference, 1, 100, &random);
    EXPECT_FALSE(cache->WantsCompression(kv));
    const int64_t used = fixture.pool().used();
    cache->Compress(kv);
    EXPECT_EQ(fixture.pool().used(), used);
    fixture.ExpectEqual(*cache, reference);
  }
}

TEST(PagePoolTest, ReservesTakesAndCountsReferences) {
  auto backend = MakeCpuBackend(1);
  auto pool = *PagePool::Create(backend.get(), DType::kBF16, 64, 10);
  EXPECT_FALSE(pool->Reserve(11));
  ASSERT_TRUE(pool->Reserve(4));
  EXPECT_EQ(pool->available(), 6);
  std::vector<int32_t> pages(3);
  pool->Take(pages);
  EXPECT_EQ(std::set<int32_t>(pages.begin(), pages.end()).size(), 3u);
  EXPECT_EQ(pool->used(), 3);
  EXPECT_EQ(pool->available(), 6) << "taking does not change what others can have";
  pool->AddReference(pages[0]);
  pool->Release(pages[0]);
  EXPECT_EQ(pool->used(), 3);
  for (int32_t page : pages) pool->Release(page);
  pool->Unreserve(1);
  EXPECT_EQ(pool->used(), 0);
  EXPECT_EQ(pool->available(), 10);
  EXPECT_EQ(pool->page_bytes(), 64 * (2 * 64 * 2 + 4));
}

}  // namespace
}  // namespace entropyserve
