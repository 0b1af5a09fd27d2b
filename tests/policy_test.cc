// Presets, names, and every bound of the policies' fields.
#include "engine/policy/policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <limits>

namespace entropyserve {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

std::string Message(const absl::Status& status) { return std::string(status.message()); }

// INVALID_ARGUMENT that names the field.
void ExpectRefused(const absl::Status& status, const std::string& path) {
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << path;
  EXPECT_EQ(Message(status).substr(0, path.size() + 1), path + ":");
}

PrefillPolicy Prefill(const std::string& preset) { return *PrefillPreset(preset, "preset"); }
KvPolicy Kv(const std::string& preset) { return *KvPreset(preset, "preset"); }

TEST(Presets, AreValidAndKnownByName) {
  EXPECT_THAT(PrefillPresetNames(),
              ElementsAre("entropy", "coverage", "entropy_paper", "critiprefill", "full"));
  EXPECT_THAT(KvPresetNames(), ElementsAre("latent", "snapkv", "adakv", "full"));
  for (const std::string& name : PrefillPresetNames()) {
    EXPECT_EQ(Prefill(name).name, name);
    EXPECT_TRUE(Validate(Prefill(name), "policy.prefill").ok()) << name;
  }
  for (const std::string& name : KvPresetNames()) {
    EXPECT_EQ(Kv(name).name, name);
    EXPECT_TRUE(Validate(Kv(name), "policy.kv").ok()) << name;
  }
}

TEST(Presets, CombineTheParts) {
  const PrefillParams entropy = Prefill("entropy").params;
  EXPECT_EQ(entropy.estimator, Estimator::kBox);
  EXPECT_EQ(entropy.budget, BudgetRule::kEntropy);
  EXPECT_EQ(entropy.base, 2048);
  EXPECT_TRUE(entropy.forced);
  EXPECT_EQ(entropy.correction, 32);
  EXPECT_FALSE(entropy.full || entropy.whole_prompt);

  const PrefillParams coverage = Prefill("coverage").params;
  EXPECT_EQ(coverage.estimator, Estimator::kProbe);
  EXPECT_EQ(coverage.budget, BudgetRule::kCoverage);
  EXPECT_FLOAT_EQ(coverage.coverage, 0.95f);
  EXPECT_TRUE(coverage.forced);
  EXPECT_EQ(coverage.correction, 0);

  const PrefillParams paper = Prefill("entropy_paper").params;
  EXPECT_TRUE(paper.whole_prompt);
  EXPECT_EQ(paper.estimator, Estimator::kBox);
  EXPECT_EQ(paper.budget, BudgetRule::kEntropy);
  EXPECT_FALSE(paper.forced);
  EXPECT_EQ(paper.correction, 0);

  const PrefillParams criti = Prefill("critiprefill").params;
  EXPECT_EQ(criti.estimator, Estimator::kBox);
  EXPECT_EQ(criti.block, 32);
  EXPECT_EQ(criti.budget, BudgetRule::kFixed);
  EXPECT_FALSE(criti.forced);
  EXPECT_EQ(criti.correction, 0);

  EXPECT_TRUE(Prefill("full").params.full);

  EXPECT_EQ(Kv("latent").params.rule, KvRule::kLatent);
  EXPECT_EQ(Kv("latent").params.gap, 16);
  EXPECT_EQ(Kv("latent").params.pool_before, 8);
  EXPECT_EQ(Kv("latent").params.pool_after, 40);
  EXPECT_EQ(Kv("snapkv").params.pool_before, 2);
  EXPECT_EQ(Kv("snapkv").params.pool_after, 2);
  EXPECT_EQ(Kv("snapkv").params.rule, KvRule::kSnapKv);
  EXPECT_EQ(Kv("snapkv").params.gap, 0);
  EXPECT_EQ(Kv("adakv").params.rule, KvRule::kAdaKv);
  EXPECT_EQ(Kv("adakv").params.pooling, Pooling::kMax);
  EXPECT_EQ(Kv("adakv").params.pool_before, 3);
  EXPECT_EQ(Kv("adakv").params.pool_after, 3);
  EXPECT_EQ(Kv("full").params.rule, KvRule::kFull);
}

TEST(Names, UnknownOnesAreRefusedWithTheKnownOnes) {
  const absl::Status preset = PrefillPreset("Entropy", "policy.prefill.preset").status();
  ExpectRefused(preset, "policy.prefill.preset");
  EXPECT_THAT(Message(preset), HasSubstr("entropy, coverage, entropy_paper, critiprefill, full"));
  const absl::Status kv = KvPreset("", "policy.kv.preset").status();
  ExpectRefused(kv, "policy.kv.preset");
  EXPECT_THAT(Message(kv), HasSubstr("latent, snapkv, adakv, full"));
  ExpectRefused(ParseEstimator("boxes", "e").status(), "e");
  ExpectRefused(ParseBudgetRule("box", "b").status(), "b");
  // A megabyte of name does not come back.
  EXPECT_LT(Message(PrefillPreset(std::string(1 << 20, 'x'), "p").status()).size(), 300u);
}

TEST(Names, PartsGoThereAndBack) {
  for (Estimator e : {Estimator::kBox, Estimator::kProbe}) {
    EXPECT_EQ(*ParseEstimator(Name(e), "e"), e);
  }
  for (BudgetRule b : {BudgetRule::kEntropy, BudgetRule::kFixed, BudgetRule::kCoverage}) {
    EXPECT_EQ(*ParseBudgetRule(Name(b), "b"), b);
  }
  EXPECT_EQ(Name(Estimator::kProbe), "probe");
  EXPECT_EQ(Name(BudgetRule::kCoverage), "coverage");
}

// One field set to a value, on top of a preset.
struct PrefillCase {
  std::string field;
  bool valid;
  std::function<void(PrefillParams&)> set;
  std::string preset = "entropy";
};

TEST(ValidatePrefill, EveryBound) {
  const PrefillCase cases[] = {
      {"segment_tokens", true, [](auto& p) { p.segment = 128; }},
      {"segment_tokens", true, [](auto& p) { p.segment = 256; }},
      {"segment_tokens", true, [](auto& p) { p.segment = 1024; }},
      {"segment_tokens", false, [](auto& p) { p.segment = 64; }},
      {"segment_tokens", false, [](auto& p) { p.segment = 513; }},
      {"segment_tokens", false, [](auto& p) { p.segment = 2048; }},
      {"segment_tokens", false, [](auto& p) { p.segment = 0; }},
      {"segment_tokens", false, [](auto& p) { p.segment = -512; }},
      {"block_tokens", true, [](auto& p) { p.block = 16; }},
      {"block_tokens", true, [](auto& p) { p.block = 32; }},
      {"block_tokens", true, [](auto& p) { p.block = 64; }},
      {"block_tokens", false, [](auto& p) { p.block = 4; }},
      {"block_tokens", false, [](auto& p) { p.block = 12; }},
      {"block_tokens", false, [](auto& p) { p.block = 128; }},
      {"block_tokens", false, [](auto& p) { p.block = 0; }},
      {"correction", true, [](auto& p) { p.correction = 0; }},
      {"correction", true, [](auto& p) { p.correction = 1; }},
      {"correction", true, [](auto& p) { p.correction = 512; }},
      {"correction", false, [](auto& p) { p.correction = -1; }},
      {"correction", false, [](auto& p) { p.correction = 33; }},
      {"correction", false, [](auto& p) { p.correction = 1024; }},
      {"probe_stride", true, [](auto& p) { p.probe_stride = 1; }},
      {"probe_stride", true, [](auto& p) { p.probe_stride = 512; }},
      {"probe_stride", false, [](auto& p) { p.probe_stride = 0; }},
      {"probe_stride", false, [](auto& p) { p.probe_stride = 48; }},
      {"probe_stride", false, [](auto& p) { p.probe_stride = 1024; }},
      {"dense_prefix_tokens", true, [](auto& p) { p.dense_prefix = 0; }},
      {"dense_prefix_tokens", true,
       [](auto& p) { p.dense_prefix = std::numeric_limits<int32_t>::max(); }},
      {"dense_prefix_tokens", false, [](auto& p) { p.dense_prefix = -1; }},
      {"dense_suffix_tokens", true, [](auto& p) { p.dense_suffix = 0; }},
      {"dense_suffix_tokens", false, [](auto& p) { p.dense_suffix = -1; }},
      {"first_sparse_layer", true, [](auto& p) { p.first_sparse_layer = 0; }},
      {"first_sparse_layer", true, [](auto& p) { p.first_sparse_layer = 1000; }},
      {"first_sparse_layer", false, [](auto& p) { p.first_sparse_layer = -1; }},
      {"base_tokens", true, [](auto& p) { p.base = 520; }},  // segment + block
      {"base_tokens", false, [](auto& p) { p.base = 519; }},
      {"base_tokens", true, [](auto& p) { p.base = 1; }, "critiprefill"},
      {"base_tokens", false, [](auto& p) { p.base = 0; }, "critiprefill"},
      {"base_tokens", false, [](auto& p) { p.forced = true, p.base = 543; }, "critiprefill"},
      {"base_tokens", true, [](auto& p) { p.forced = true, p.base = 544; }, "critiprefill"},
      {"e_t", true, [](auto& p) { p.e_t = 0; }},
      {"e_t", false, [](auto& p) { p.e_t = -1e-9f; }},
      {"e_t", false, [](auto& p) { p.e_t = kNan; }},
      {"e_t", false, [](auto& p) { p.e_t = kInf; }},
      {"delta", true, [](auto& p) { p.delta = 0; }},
      {"delta", false, [](auto& p) { p.delta = -0.1f; }},
      {"delta", false, [](auto& p) { p.delta = kNan; }},
      {"delta", false, [](auto& p) { p.delta = kInf; }},
      {"alpha", true, [](auto& p) { p.alpha = 0; }},
      {"alpha", false, [](auto& p) { p.alpha = -1; }},
      {"alpha", false, [](auto& p) { p.alpha = kNan; }},
      {"alpha", false, [](auto& p) { p.alpha = kInf; }},
      {"temperature", true, [](auto& p) { p.temperature = 0.125f; }},
      {"temperature", false, [](auto& p) { p.temperature = 0; }},
      {"temperature", false, [](auto& p) { p.temperature = -1; }},
      {"temperature", false, [](auto& p) { p.temperature = kNan; }},
      {"temperature", false, [](auto& p) { p.temperature = kInf; }},
      {"coverage", true, [](auto& p) { p.coverage = 2; }, "coverage"},
      {"coverage", true, [](auto& p) { p.coverage = 1e-3f; }, "coverage"},
      {"coverage", false, [](auto& p) { p.coverage = 0; }, "coverage"},
      {"coverage", false, [](auto& p) { p.coverage = -1; }, "coverage"},
      {"coverage", false, [](auto& p) { p.coverage = kNan; }, "coverage"},
      {"coverage", false, [](auto& p) { p.coverage = kInf; }, "coverage"},
      {"coverage_min_tokens", true, [](auto& p) { p.coverage_min = 0; }, "coverage"},
      {"coverage_min_tokens", false, [](auto& p) { p.coverage_min = -1; }, "coverage"},
      {"coverage_max_tokens", true, [](auto& p) { p.coverage_max = 520; }, "coverage"},
      {"coverage_max_tokens", false, [](auto& p) { p.coverage_max = 519; }, "coverage"},
      {"coverage_max_tokens", true, [](auto& p) { p.forced = false, p.coverage_max = 128; },
       "coverage"},
      {"coverage_max_tokens", false, [](auto& p) { p.forced = false, p.coverage_max = 127; },
       "coverage"},
      {"coverage_max_tokens", false, [](auto& p) { p.coverage_min = 0, p.coverage_max = 0; },
       "coverage"},
      {"base_tokens", true, [](auto& p) { p.base = 1; }, "coverage"},  // it has no base
      {"estimator", false, [](auto& p) { p.estimator = Estimator::kProbe; }, "entropy_paper"},
      {"budget", false, [](auto& p) { p.budget = BudgetRule::kFixed; }, "entropy_paper"},
      {"forced", false, [](auto& p) { p.forced = true; }, "entropy_paper"},
      {"correction", false, [](auto& p) { p.correction = 32; }, "entropy_paper"},
      {"base_tokens", true, [](auto& p) { p.base = 128; }, "entropy_paper"},
      {"base_tokens", true, [](auto& p) { p.base = 1; }, "full"},  // the parts do not act
      {"segment_tokens", false, [](auto& p) { p.segment = 100; }, "full"},
      {"alpha", false, [](auto& p) { p.alpha = kNan; }, "full"},
  };
  int number = 0;
  for (const PrefillCase& c : cases) {
    SCOPED_TRACE(testing::Message() << "case " << number++ << ": " << c.field);
    PrefillPolicy policy = Prefill(c.preset);
    c.set(policy.params);
    const absl::Status status = Validate(policy, "policy.prefill");
    if (c.valid) {
      EXPECT_TRUE(status.ok()) << Message(status);
    } else {
      ExpectRefused(status, "policy.prefill." + c.field);
    }
  }
}

struct KvCase {
  std::string field;
  bool valid;
  std::function<void(KvParams&)> set;
  std::string preset = "latent";
};

TEST(ValidateKv, EveryBound) {
  const KvCase cases[] = {
      {"budget_tokens", true, [](auto& p) { p.budget = 36; }},  // window + 4
      {"budget_tokens", false, [](auto& p) { p.budget = 35; }},
      {"budget_tokens", false, [](auto& p) { p.budget = 0; }},
      {"budget_tokens", false, [](auto& p) { p.budget = -1; }},
      {"budget_tokens", true, [](auto& p) { p.budget = std::numeric_limits<int32_t>::max(); }},
      {"budget_tokens", true, [](auto& p) { p.budget = 1; }, "full"},
      {"budget_tokens", false, [](auto& p) { p.budget = 0; }, "full"},
      {"fraction", true, [](auto& p) { p.fraction = 0; }},
      {"fraction", true, [](auto& p) { p.fraction = 1; }},
      {"fraction", false, [](auto& p) { p.fraction = 1.001f; }},
      {"fraction", false, [](auto& p) { p.fraction = -0.1f; }},
      {"fraction", false, [](auto& p) { p.fraction = kNan; }},
      {"fraction", false, [](auto& p) { p.fraction = kInf; }},
      {"gap_tokens", true, [](auto& p) { p.gap = 0; }},
      {"gap_tokens", true, [](auto& p) { p.gap = 1000; }},
      {"gap_tokens", false, [](auto& p) { p.gap = -1; }},
      {"gap_tokens", false, [](auto& p) { p.gap = 1; }, "snapkv"},
      {"gap_tokens", true, [](auto& p) { p.gap = 1; }, "adakv"},
      {"window_tokens", true, [](auto& p) { p.window = 1; }},
      {"window_tokens", true, [](auto& p) { p.window = 1024; }},
      {"window_tokens", false, [](auto& p) { p.window = 1025; }},
      {"window_tokens", false, [](auto& p) { p.window = 0; }},
      {"window_tokens", false, [](auto& p) { p.window = -32; }},
      {"pool_before", true, [](auto& p) { p.pool_before = 0; }},
      {"pool_before", true, [](auto& p) { p.pool_before = 127; }},
      {"pool_before", false, [](auto& p) { p.pool_before = 128; }},
      {"pool_before", false, [](auto& p) { p.pool_before = -1; }},
      {"pool_after", true, [](auto& p) { p.pool_after = 0; }},
      {"pool_after", true, [](auto& p) { p.pool_after = 127; }},
      {"pool_after", false, [](auto& p) { p.pool_after = 128; }},
      {"pool_after", false, [](auto& p) { p.pool_after = -1; }},
      {"adakv_floor", true, [](auto& p) { p.adakv_floor = 0; }, "adakv"},
      {"adakv_floor", true, [](auto& p) { p.adakv_floor = 1; }, "adakv"},
      {"adakv_floor", false, [](auto& p) { p.adakv_floor = 1.5f; }, "adakv"},
      {"adakv_floor", false, [](auto& p) { p.adakv_floor = -0.5f; }, "adakv"},
      {"adakv_floor", false, [](auto& p) { p.adakv_floor = kNan; }, "adakv"},
  };
  int number = 0;
  for (const KvCase& c : cases) {
    SCOPED_TRACE(testing::Message() << "case " << number++ << ": " << c.field);
    KvPolicy policy = Kv(c.preset);
    c.set(policy.params);
    const absl::Status status = Validate(policy, "policy.kv");
    if (c.valid) {
      EXPECT_TRUE(status.ok()) << Message(status);
    } else {
      ExpectRefused(status, "policy.kv." + c.field);
    }
  }
}

TEST(Validate, WithoutAPrefixTheFieldStandsAlone) {
  PrefillPolicy policy;
  policy.params.block = 5;
  ExpectRefused(Validate(policy, ""), "block_tokens");
}

}  // namespace
}  // namespace entropyserve
