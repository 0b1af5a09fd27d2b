// Selection and attention together, through the CPU backend: what a policy's output must equal.
#include <gtest/gtest.h>

#include <cmath>
#include <memory>

#include "tests/select_testing.h"

namespace entropyserve {
namespace {

constexpr float kRounding = 2e-5f;  // fp32; outputs are of size 1
constexpr float kRoundingBF16 = 2e-2f;

class PrefillPolicyTest : public testing::Test {
 protected:
  PrefillPolicyTest()
      : seed_(std::random_device{}()),
        rng_(seed_),
        trace_(__FILE__, __LINE__, "seed " + std::to_string(seed_)),
        backend_(MakeCpuBackend(2)) {}

  // Attention outputs of the whole turn, cut into chunks that end at `ends`.
  std::vector<float> Run(const LayerInputs& in, const PrefillParams& policy,
                         const std::vector<int32_t>& ends) {
    PagedLayer paged(in, policy, 8, rng_());
    std::vector<float> all;
    int32_t begin = 0;
    for (int32_t end : ends) {
      paged.Step(begin, end);
      const size_t n = size_t(end - begin) * in.shape.heads * in.shape.head_dim;
      std::vector<uint8_t> out(n * SizeOf(in.dtype));
      backend_->SelectBlocks(paged.Select());
      backend_->PrefillAttention(paged.Attention(out.data()));
      for (size_t i = 0; i < n; ++i) all.push_back(paged.Stored(out.data(), 0, int32_t(i)));
      begin = end;
    }
    return all;
  }

  static float LargestDifference(const std::vector<float>& a, const std::vector<float>& b,
                                 size_t begin, size_t end) {
    float largest = 0;
    for (size_t i = begin; i < end; ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
    return largest;
  }

  LayerInputs Inputs(int32_t turn, std::vector<int32_t> past = {}, DType dtype = DType::kF32) {
    return RandomInputs(rng_, {.layers = 2, .heads = 6, .kv_heads = 2, .head_dim = 32}, dtype, turn,
                        past);
  }
  // Sparse from the second segment on.
  static PrefillParams Policy() {
    return {.correction = 0, .segment = 128, .dense_prefix = 128, .dense_suffix = 0, .base = 136};
  }

  const uint32_t seed_;
  std::mt19937 rng_;
  testing::ScopedTrace trace_;
  std::unique_ptr<Backend> backend_;
};

TEST_F(PrefillPolicyTest, CorrectionWithStrideOneEqualsFull) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    SCOPED_TRACE(Name(dtype));
    const float rounding = dtype == DType::kF32 ? kRounding : kRoundingBF16;
    const LayerInputs in = Inputs(900, {70, 131}, dtype);
    PrefillParams policy = Policy();
    const std::vector<float> sparse = Run(in, policy, {900});
    policy.correction = 1;
    const std::vector<float> corrected = Run(in, policy, {256, 900});
    const std::vector<float> full = Run(in, {.full = true, .segment = 128}, {900});
    EXPECT_LT(LargestDifference(corrected, full, 0, full.size()), rounding);
    EXPECT_GT(LargestDifference(sparse, full, 0, full.size()), 10 * rounding)
        << "the policy read everything: nothing was corrected";
  }
}

// o[i] += o*[m] - o[m], m the last probe at or before i.
TEST_F(PrefillPolicyTest, CorrectionAddsTheLastProbesDifference) {
  const LayerInputs in = Inputs(640);
  PrefillParams policy = Policy();
  const std::vector<float> sparse = Run(in, policy, {640});
  policy.correction = 32;
  const std::vector<float> corrected = Run(in, policy, {640});
  const std::vector<float> full = Run(in, {.full = true, .segment = 128}, {640});
  const int32_t row = in.shape.heads * in.shape.head_dim;
  for (int32_t t = 128; t < 640; ++t) {
    const int32_t m = t / 32 * 32;
    for (int32_t c = 0; c < row; ++c) {
      const float expected = sparse[t * row + c] + full[m * row + c] - sparse[m * row + c];
      ASSERT_NEAR(corrected[t * row + c], expected, kRounding) << "token " << t;
    }
  }
}

TEST_F(PrefillPolicyTest, ABudgetOverThePromptEqualsFull) {
  const LayerInputs in = Inputs(700, {5, 64});
  const std::vector<float> full = Run(in, {.full = true, .segment = 128}, {700});
  PrefillParams covering = Policy();
  covering.base = 800;
  PrefillParams coverage = Policy();
  coverage.estimator = Estimator::kProbe;
  coverage.budget = BudgetRule::kCoverage;
  coverage.coverage = 1;
  for (const PrefillParams& policy : {covering, coverage}) {
    EXPECT_LT(LargestDifference(Run(in, policy, {128, 700}), full, 0, full.size()), kRounding);
  }
  PrefillParams paper = covering;
  paper.whole_prompt = true;
  paper.forced = false;
  for (int32_t turn : {700, 767, 768, 769}) {  // its own bound on lists depends on the ragged end
    const LayerInputs whole = Inputs(turn);
    const std::vector<float> expected = Run(whole, {.full = true, .segment = 128}, {turn});
    EXPECT_LT(LargestDifference(Run(whole, paper, {turn}), expected, 0, expected.size()), kRounding)
        << turn;
  }
}

TEST_F(PrefillPolicyTest, OutputsDoNotDependOnChunks) {
  const LayerInputs in = Inputs(900, {70, 131});
  PrefillParams policy = Policy();
  policy.correction = 16;
  policy.base = 160;
  for (BudgetRule rule : {BudgetRule::kEntropy, BudgetRule::kFixed, BudgetRule::kCoverage}) {
    for (Estimator estimator : {Estimator::kBox, Estimator::kProbe}) {
      policy.budget = rule;
      policy.estimator = estimator;
      policy.coverage = 0.7f;
      const std::vector<float> whole = Run(in, policy, {900});
      const std::vector<float> cut = Run(in, policy, {128, 512, 640, 900});
      EXPECT_LT(LargestDifference(whole, cut, 0, whole.size()), kRounding);
    }
  }
}

TEST_F(PrefillPolicyTest, NoSegmentsOutputDependsOnATokenAfterIt) {
  const LayerInputs in = Inputs(900);
  LayerInputs changed = in;
  const int32_t token = 520, segment_begin = 512;
  for (int32_t c = 0; c < 6 * 32; ++c) changed.q[token * 6 * 32 + c] += 4;
  for (int32_t kv = 0; kv < 2; ++kv) {
    for (int32_t c = 0; c < 32; ++c) {
      changed.k[kv][token * 32 + c] += 4;
      changed.v[kv][token * 32 + c] += 4;
    }
  }
  PrefillParams policy = Policy();
  policy.correction = 32;
  const std::vector<float> a = Run(in, policy, {900}), b = Run(changed, policy, {900});
  const size_t before = size_t(segment_begin) * 6 * 32;
  EXPECT_EQ(LargestDifference(a, b, 0, before), 0.0f);
  EXPECT_GT(LargestDifference(a, b, before, a.size()), 0.01f);
}

}  // namespace
}  // namespace entropyserve
