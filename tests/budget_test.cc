// The entropy budget rule alone, on entropies made up for it.
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "kernels/cpu/select_internal.h"

namespace entropyserve {
namespace {

std::vector<float> Budgets(const PrefillParams& policy, const std::vector<float>& entropy) {
  HeadState state;
  std::vector<float> budgets;
  for (int32_t s = 0; s < int32_t(entropy.size()); ++s) {
    if (s > 0 && entropy[s] >= policy.e_t) state.not_rigid = 1;
    state.budget =
        cpu::Part(BudgetRule::kEntropy).tokens(policy, s, entropy[s], state, state.not_rigid != 0);
    state.entropy = entropy[s];
    budgets.push_back(state.budget);
  }
  return budgets;
}

TEST(EntropyBudget, FollowsTheFormula) {
  const PrefillParams policy{.base = 1000, .e_t = 1e-3f, .delta = 0.4f, .alpha = 0.5f};
  // D: -, delta, 1 (up 300), 1.4 at most (up 500), 0 at least (down 200), 0.5 (up 50).
  const auto b = Budgets(policy, {0, 1, 2, 10, 1, 1.5f});
  const float expected[] = {1000, 1000, 1300, 1800, 1600, 1650};
  for (int i = 0; i < 6; ++i) EXPECT_NEAR(b[i], expected[i], 0.01) << i;
}

TEST(EntropyBudget, StaysBetweenBaseAndThreeTimesBase) {
  const PrefillParams policy{.base = 1000, .alpha = 5.0f};
  const auto b = Budgets(policy, {0, 1, 9, 99, 999, 9});
  EXPECT_EQ(b[2], 3000);
  EXPECT_EQ(b[4], 3000);
  EXPECT_EQ(b[5], 1000);
}

TEST(EntropyBudget, ARigidHeadStaysAtBaseUntilItsFirstEntropyOverTheThreshold) {
  const PrefillParams policy{.base = 1000, .e_t = 0.1f};
  const auto b = Budgets(policy, {5, 0.01f, 0.05f, 0.09f, 0.2f, 0.2f, 0.05f});
  EXPECT_EQ(b[2], 1000);  // five times the last entropy, but rigid
  EXPECT_EQ(b[3], 1000);
  EXPECT_GT(b[4], 1000);
  EXPECT_LT(b[5], b[4]);  // and it does not come back
}

TEST(EntropyBudget, IsSafeWithNumbersThatAreNone) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (float b : Budgets({.base = 1000}, {0, 1, nan, nan, 1})) {
    EXPECT_GE(b, 1000);
    EXPECT_LE(b, 3000);
  }
}

TEST(CoverageBudget, TheLeastCountsInBlocksUpToTheLargestNumber) {
  std::vector<float> p(64, 0.0f), score = p;
  p[0] = score[0] = 1.0f;  // reaches any coverage alone
  const cpu::Estimate estimate{.score = score, .p = p};
  std::vector<int32_t> order;
  for (const auto& [least, blocks] : {std::pair{0, 1}, {100, 13}, {INT32_MAX, 64}}) {
    const PrefillParams policy{.budget = BudgetRule::kCoverage,
                               .forced = false,
                               .block = 8,
                               .coverage_min = least,
                               .coverage_max = INT32_MAX};
    EXPECT_EQ(cpu::ChooseBlocks(policy, 3, estimate, 64, order).size(), size_t(blocks)) << least;
  }
}

TEST(WholePromptBlocks, TakesTheMaximumOverHeadsAndJudgesRigidOnTheWholePrompt) {
  const PrefillParams policy{.whole_prompt = true,
                             .segment = 128,
                             .block = 8,
                             .base = 128,
                             .e_t = 0.5f,
                             .delta = 0.1f,
                             .alpha = 1.0f};
  // Head 0 is rigid. Head 1's last entropy alone ends it, and so its budgets from the start.
  const std::vector<float> entropy = {4, .1f, .2f, .3f, .4f, 4, .1f, .2f, .3f, .6f};
  std::vector<float> budgets(10);
  const auto c = cpu::WholePromptBlocks(policy, 5 * 128, 2, entropy, budgets);
  for (int s = 0; s < 5; ++s) EXPECT_EQ(budgets[s], 128) << s;
  EXPECT_NEAR(budgets[7], 128 + 128 * 0.9, 0.01);    // D = 1
  EXPECT_NEAR(budgets[8], 243.2 + 128 * 0.4, 0.01);  // D = 0.5
  EXPECT_EQ(c, (std::vector<int32_t>{0, 16, 30, 36, 48}));
}

TEST(WholePromptBlocks, LeavesRoomForTheRaggedSegment) {
  const PrefillParams policy{.whole_prompt = true, .segment = 128, .block = 8, .base = 1024};
  std::vector<float> budgets(3);
  // N = 32 blocks; of 25 ragged tokens 3 whole blocks and one more are left out.
  EXPECT_EQ(cpu::WholePromptBlocks(policy, 256 + 25, 1, std::vector<float>{4, 1, 1}, budgets),
            (std::vector<int32_t>{0, 16, 28}));
  // One segment sees nothing, and has no blocks to choose from.
  EXPECT_EQ(cpu::WholePromptBlocks(policy, 100, 1, std::vector<float>{0}, budgets),
            (std::vector<int32_t>{0}));
}

}  // namespace
}  // namespace entropyserve
