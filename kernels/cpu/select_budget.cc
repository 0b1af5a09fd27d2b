// Budget rules and the choice of blocks (ARCHITECTURE.md, "The method"; entropy: arXiv 2606.09508).
#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/cpu/select_internal.h"

namespace entropyserve::cpu {
namespace {

// x within [low, high]; low for a NaN, so that no input makes an index out of it.
float Clamp(float x, float low, float high) { return x > low ? (x < high ? x : high) : low; }

// b[s] = clamp(b[s-1] + alpha * base * (D[s] - delta), base, 3 * base), in fp32 and in this order
// of operations, as the released code does it.
float NextBudget(const PrefillParams& policy, int32_t s, float entropy, float last_entropy,
                 float last_budget) {
  const float base = float(policy.base);
  if (s == 0) return base;
  const float change =
      s == 1 ? policy.delta
             : Clamp((entropy - last_entropy) / (last_entropy + 1e-9f), 0.0f, 1.0f + policy.delta);
  return Clamp(last_budget + policy.alpha * base * (change - policy.delta), base, 3.0f * base);
}

float EntropyTokens(const PrefillParams& policy, int32_t s, float entropy, const HeadState& last,
                    bool not_rigid) {
  if (!not_rigid) return float(policy.base);
  return NextBudget(policy, s, entropy, last.entropy, last.budget);
}

float FixedTokens(const PrefillParams& policy, int32_t, float, const HeadState&, bool) {
  return float(policy.base);
}

float CoverageTokens(const PrefillParams& policy, int32_t, float, const HeadState&, bool) {
  return policy.coverage >= 1.0f ? std::numeric_limits<float>::infinity()
                                 : float(policy.coverage_max);
}

// The shortest list whose mass, with what is read anyway, reaches the coverage.
int32_t EnoughCoverage(const PrefillParams& policy, const Estimate& estimate,
                       std::span<const int32_t> ranked) {
  const int32_t size = int32_t(ranked.size());
  if (policy.coverage >= 1.0f) return size;
  const int64_t least = CeilDiv<int64_t>(policy.coverage_min, policy.block);
  float mass = estimate.covered;
  for (int32_t i = 0; i < size; ++i) {
    if (i >= least && mass >= policy.coverage) return i;
    mass += estimate.p[ranked[i]];
  }
  return size;
}

// Indexed by BudgetRule.
constexpr BudgetPart kBudgets[] = {
    {true, EntropyTokens, nullptr},
    {false, FixedTokens, nullptr},
    {false, CoverageTokens, EnoughCoverage},
};

// How many of the blocks before segment s are forced.
int32_t ForcedBlocks(const PrefillParams& policy, int32_t s) {
  if (!policy.forced || s == 0) return 0;
  return policy.segment / policy.block + (s > 1 ? 1 : 0);
}

}  // namespace

const BudgetPart& Part(BudgetRule rule) { return kBudgets[int(rule)]; }

bool IsForced(const PrefillParams& policy, int32_t s, int32_t j) {
  if (!policy.forced) return false;
  return j == 0 || j >= (s - 1) * (policy.segment / policy.block);
}

std::span<const int32_t> ChooseBlocks(const PrefillParams& policy, int32_t s,
                                      const Estimate& estimate, int32_t limit,
                                      std::vector<int32_t>& order) {
  const BudgetPart& rule = Part(policy.budget);
  const int32_t visible = int32_t(estimate.score.size());
  limit = std::min(limit, visible);
  order.resize(visible);
  std::iota(order.begin(), order.end(), 0);
  if (limit == visible && rule.enough == nullptr) return order;
  for (int32_t j = 0; j < visible; ++j) {  // a NaN would break the order
    if (IsForced(policy, s, j)) estimate.score[j] = std::numeric_limits<float>::infinity();
    if (!(estimate.score[j] == estimate.score[j])) {
      estimate.score[j] = -std::numeric_limits<float>::infinity();
    }
  }
  const auto better = [&](int32_t a, int32_t b) {
    return estimate.score[a] != estimate.score[b] ? estimate.score[a] > estimate.score[b] : a < b;
  };
  if (limit < visible) std::nth_element(order.begin(), order.begin() + limit, order.end(), better);
  int32_t count = limit;
  if (rule.enough != nullptr) {
    std::sort(order.begin(), order.begin() + limit, better);
    count = rule.enough(policy, estimate, {order.data(), size_t(limit)});
    count = std::max(count, std::min(limit, ForcedBlocks(policy, s)));
  }
  std::sort(order.begin(), order.begin() + count);
  return {order.data(), size_t(count)};
}

std::vector<int32_t> WholePromptBlocks(const PrefillParams& policy, int64_t n, int32_t kv_heads,
                                       std::span<const float> entropy, std::span<float> budgets) {
  const int32_t segments = int32_t(entropy.size()) / kv_heads;
  const int64_t per_segment = policy.segment / policy.block;
  const int64_t blocks = (segments - 1) * per_segment;
  // The released code's own bound; it leaves room for the last, ragged segment.
  const int64_t bound = blocks - (n % policy.segment) / policy.block - 1;
  std::vector<int32_t> counts(segments, 0);
  for (int32_t kv = 0; kv < kv_heads; ++kv) {
    const float* h = entropy.data() + int64_t{kv} * segments;
    float* b = budgets.data() + int64_t{kv} * segments;
    const bool rigid = std::none_of(h + std::min(1, segments), h + segments,
                                    [&](float x) { return x >= policy.e_t; });
    for (int32_t s = 0; s < segments; ++s) {
      b[s] = rigid || s == 0 ? float(policy.base) : NextBudget(policy, s, h[s], h[s - 1], b[s - 1]);
      const int64_t count = std::min({int64_t(b[s] / float(policy.block)), s * per_segment, bound});
      if (s > 0) counts[s] = std::max(counts[s], int32_t(std::max<int64_t>(count, 0)));
    }
  }
  return counts;
}

}  // namespace entropyserve::cpu
