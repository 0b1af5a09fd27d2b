#include "engine/cache/turn_plan.h"

#include <algorithm>
#include <cmath>

#include "kernels/kv_view.h"

namespace entropyserve {

int32_t BoundsPages(const TurnPlan& plan) {
  // Only the box estimator reads bounds.
  if (plan.prefill.full || plan.prefill.estimator != Estimator::kBox) return 0;
  return PagesFor(CeilDiv<int64_t>(plan.prompt, plan.prefill.block));
}

int32_t WindowPages(const TurnPlan& plan, int group) {
  if (plan.kv.rule == KvRule::kFull) return 0;
  return CeilDiv(group * plan.kv.window, 2 * kPageTokens);
}

int64_t Budget(const KvParams& kv, int64_t positions) {
  const int64_t fraction = int64_t(std::ceil(double(kv.fraction) * double(positions)));
  return std::max<int64_t>(kv.budget, fraction);
}

bool ExceedsBudget(const CachedLengths& cached, int64_t appended, int64_t budget) {
  const int64_t length = cached.mean_head + appended;
  return cached.ever_compressed ? 2 * length > 3 * budget : length > budget;
}

TurnLengths WorstCaseLengths(const TurnPlan& plan, const CachedLengths& cached, int kv_heads) {
  TurnLengths t;
  t.live = plan.prompt + plan.max_new;
  if (plan.kv.rule == KvRule::kFull) return t;
  const int64_t gap = plan.kv.rule == KvRule::kSnapKv ? 0 : plan.kv.gap;
  // No head keeps more than it has.
  const int64_t most = cached.longest_head + plan.prompt + plan.max_new;
  const int64_t budget = Budget(plan.kv, cached.positions + plan.prompt + plan.max_new);
  const bool shared = plan.kv.rule == KvRule::kAdaKv;
  t.kept = std::min(budget, most);
  t.longest = std::min(shared ? budget * kv_heads : budget, most);
  // Compression comes gap tokens after the prompt if the cache is long enough by then. A cache that
  // stays shorter until then keeps growing to the end of the turn.
  const int64_t budget_then = Budget(plan.kv, cached.positions + plan.prompt + gap);
  if (plan.max_new > gap && ExceedsBudget(cached, plan.prompt + gap, budget_then)) {
    t.live = plan.prompt + gap;
    t.rest = plan.max_new - gap;
  }
  return t;
}

int64_t WorstCasePages(const TurnPlan& plan, const CachedLengths& cached,
                       const AttentionShape& shape) {
  const TurnLengths t = WorstCaseLengths(plan, cached, shape.kv_heads);
  const bool compresses = plan.kv.rule != KvRule::kFull;
  // adakv spreads a layer's pages unevenly: one more page a head for the rounding.
  const int64_t after = compresses ? PagesFor(t.kept + t.rest) + 1 : 0;
  const int64_t live = PagesFor(t.live);
  // A kept turn that is repacked copies the page that the past ends in; a fork does not get that
  // page back.
  const int64_t copied = plan.keep ? 1 : 0;
  const int64_t per_head =
      std::max(live + copied, after) + BoundsPages(plan) + WindowPages(plan, shape.group());
  // In transit while one layer is gathered: what compression keeps, or a turn that is repacked.
  const int64_t transit =
      std::max<int64_t>(compresses ? PagesFor(t.kept) + 1 : 0, plan.keep ? live + 1 : 0);
  return shape.layers * shape.kv_heads * per_head + shape.kv_heads * transit;
}

}  // namespace entropyserve
