// What must hold whatever the policy, on whole tiny models: chunked is unchunked, batched is alone,
// a covering budget is full, nothing looks past its own segment, a later turn continues an earlier
// one.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "tests/model_testing.h"

namespace entropyserve {
namespace {

constexpr double kTolerance = 1e-4;  // of max |logit|, f32
constexpr int kSegment = 128;
constexpr int64_t kTokens = 900;  // seven segments and a piece

// Acts on short prompts: sparse from the second segment on, budgets well below what is visible.
PrefillPolicy Acting(const std::string& preset) {
  PrefillPolicy policy = *PrefillPreset(preset, "test");
  policy.params.segment = kSegment;
  policy.params.dense_prefix = kSegment;
  policy.params.dense_suffix = 32;
  policy.params.base = 160;
  policy.params.coverage = 0.5f;
  EXPECT_TRUE(Validate(policy, "policy").ok()) << Validate(policy, "policy");
  return policy;
}

KvPolicy KeepAll() { return *KvPreset("full", "test"); }

std::vector<int32_t> RandomTokens(int vocab, int64_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(n);
  for (int32_t& token : tokens) token = int32_t(random() % unsigned(vocab));
  return tokens;
}

class InvariantsTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    model_ = LoadTestModel(GoldenPath("models/qwen2_yarn"), DType::kF32, 1024);
    tokens_ = RandomTokens(vocab(), kTokens, 42);
  }
  int vocab() const { return model_.model->config().vocab; }

  std::vector<float> Prefill(const std::vector<int32_t>& tokens, const PrefillPolicy& policy,
                             int64_t chunk) {
    TestSequence sequence(&model_, tokens, policy, KeepAll(), 0);
    std::vector<float> logits;
    while (sequence.left() > 0) {
      const auto out = RunStep(&model_, {{&sequence, std::min(chunk, sequence.left())}});
      logits.insert(logits.end(), out[0].begin(), out[0].end());
    }
    return logits;
  }
  // Rows [begin, end) of logits.
  std::vector<float> Rows(const std::vector<float>& logits, int64_t begin, int64_t end) const {
    return {logits.begin() + begin * vocab(), logits.begin() + end * vocab()};
  }

  TestModel model_;
  std::vector<int32_t> tokens_;
};

class PresetInvariantsTest : public InvariantsTest {};

TEST_P(PresetInvariantsTest, ChunkedIsUnchunked) {
  const PrefillPolicy policy = Acting(GetParam());
  const std::vector<float> whole = Prefill(tokens_, policy, kTokens);
  EXPECT_GT(RelativeError(whole, Prefill(tokens_, *PrefillPreset("full", "test"), kTokens)),
            10 * kTolerance)
      << "the policy read everything: this test would pass whatever it did";
  for (int64_t chunk : {kSegment, 3 * kSegment}) {
    EXPECT_LT(RelativeError(Prefill(tokens_, policy, chunk), whole), kTolerance)
        << "chunks of " << chunk;
  }
}

TEST_P(PresetInvariantsTest, NoSegmentLooksPastItself) {
  const PrefillPolicy policy = Acting(GetParam());
  const std::vector<float> before = Prefill(tokens_, policy, kTokens);
  for (int64_t changed : {kSegment * 2 + 5, kSegment * 5}) {
    std::vector<int32_t> tokens = tokens_;
    tokens[changed] = (tokens[changed] + 1) % vocab();
    const std::vector<float> after = Prefill(tokens, policy, kTokens);
    const int64_t begin = changed / kSegment * kSegment;
    EXPECT_LT(RelativeError(Rows(after, 0, begin), Rows(before, 0, begin)), kTolerance);
    EXPECT_GT(RelativeError(Rows(after, changed, kTokens), Rows(before, changed, kTokens)),
              kTolerance);
  }
}

TEST_P(PresetInvariantsTest, ACoveringBudgetIsFull) {
  PrefillPolicy policy = Acting(GetParam());
  policy.params.base = 4096;
  policy.params.coverage = 1.0f;
  EXPECT_LT(RelativeError(Prefill(tokens_, policy, kTokens),
                          Prefill(tokens_, *PrefillPreset("full", "test"), kTokens)),
            kTolerance);
}

INSTANTIATE_TEST_SUITE_P(Chunked, PresetInvariantsTest,
                         testing::Values("entropy", "coverage", "critiprefill"),
                         [](const auto& info) { return info.param; });

TEST_F(InvariantsTest, EntropyPaperWithACoveringBudgetIsFull) {
  PrefillPolicy policy = Acting("entropy_paper");
  policy.params.base = 4096;
  EXPECT_LT(RelativeError(Prefill(tokens_, policy, kTokens),
                          Prefill(tokens_, *PrefillPreset("full", "test"), kTokens)),
            kTolerance);
}

TEST_F(InvariantsTest, MixedPoliciesInOneBatchDoNotDisturbEachOther) {
  const std::vector<std::string> presets = {"full", "entropy", "coverage", "critiprefill",
                                            "entropy_paper"};
  std::vector<std::unique_ptr<TestSequence>> sequences;
  std::vector<std::vector<float>> alone;
  std::vector<std::pair<TestSequence*, int64_t>> work;
  int64_t n = 130;
  for (const std::string& preset : presets) {
    const std::vector<int32_t> tokens(tokens_.begin(), tokens_.begin() + n);
    alone.push_back(Prefill(tokens, Acting(preset), n));
    sequences.push_back(
        std::make_unique<TestSequence>(&model_, tokens, Acting(preset), KeepAll(), 0));
    work.emplace_back(sequences.back().get(), n);
    n += 30;
  }
  const auto together = RunStep(&model_, work);
  for (size_t i = 0; i < presets.size(); ++i)
    EXPECT_LT(RelativeError(together[i], alone[i]), kTolerance) << presets[i];
}

TEST_F(InvariantsTest, ALaterTurnContinuesAtTruePositions) {
  const PrefillPolicy full = *PrefillPreset("full", "test");
  const std::vector<float> whole = Prefill(tokens_, full, kTokens);
  // The same tokens in three turns, whose lengths are no multiples of a page; the second one is
  // forked.
  std::unique_ptr<SequenceCache> cache;
  const std::vector<int64_t> ends = {333, 500, kTokens};
  int64_t begin = 0;
  for (int64_t end : ends) {
    const std::vector<int32_t> turn(tokens_.begin() + begin, tokens_.begin() + end);
    auto sequence =
        cache ? std::make_unique<TestSequence>(&model_, cache->Fork(), turn, full, KeepAll(), 0)
              : std::make_unique<TestSequence>(&model_, turn, full, KeepAll(), 0);
    const auto out = RunStep(&model_, {{sequence.get(), end - begin}});
    EXPECT_LT(RelativeError(out[0], Rows(whole, begin, end)), kTolerance) << "turn from " << begin;
    sequence->cache().EndTurn();
    cache = sequence->TakeCache();
    begin = end;
  }
}

TEST_F(InvariantsTest, ATurnAfterCompressionIsDenseAttentionOverWhatWasKept) {
  // Layer 0's keys and values depend on a token and its position alone. So with one layer's worth
  // of history kept whole (a covering budget), the answer must not move at all; with less, it must.
  const PrefillPolicy full = *PrefillPreset("full", "test");
  const std::vector<int32_t> first(tokens_.begin(), tokens_.begin() + 400);
  const std::vector<int32_t> second(tokens_.begin() + 400, tokens_.begin() + 450);
  auto answer = [&](int budget) {
    KvPolicy kv = *KvPreset("snapkv", "test");
    kv.params.budget = budget;
    TestSequence one(&model_, first, full, kv, 0);
    RunStep(&model_, {{&one, 400}});
    one.cache().Compress(kv.params);
    one.cache().EndTurn();
    EXPECT_EQ(one.cache().position(), 400);
    EXPECT_EQ(one.cache().MaxLength(), std::min(budget, 400));
    TestSequence two(&model_, one.TakeCache(), second, full, kv, 0);
    return RunStep(&model_, {{&two, 50}})[0];
  };
  const std::vector<float> whole = Rows(Prefill(tokens_, full, kTokens), 400, 450);
  EXPECT_LT(RelativeError(answer(400), whole), kTolerance);
  const double lost = RelativeError(answer(300), whole);
  EXPECT_GT(lost, kTolerance);
  // Three quarters of the tokens, at their true positions, tell most of the story.
  EXPECT_LT(lost, 0.5);
}

}  // namespace
}  // namespace entropyserve
