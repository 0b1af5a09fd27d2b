// What a turn may need at worst, before it starts: the arithmetic behind the memory promise
// (ARCHITECTURE.md, "KV cache"). Pure functions of the plan and of what is cached already.
#pragma once

#include <cstdint>

#include "kernels/backend.h"

namespace entropyserve {

// One turn, as it is known before it starts.
struct TurnPlan {
  int64_t prompt = 0;   // tokens this turn prefills
  int64_t max_new = 0;  // tokens it may generate
  PrefillParams prefill;
  KvParams kv;
  bool keep = false;  // the cache stays (a session) when the turn ends
  bool trace = false;
};

// How much a cache holds.
struct CachedLengths {
  int64_t positions = 0;     // true position of the next token
  int64_t longest_head = 0;  // cached tokens
  int64_t mean_head = 0;     // cached tokens, rounded down
  bool ever_compressed = false;
};

// Lengths of a turn at worst, in tokens of one head beyond what was cached before it.
struct TurnLengths {
  int64_t live = 0;     // turn tokens before compression, or in all when there is none
  int64_t kept = 0;     // tokens after compression, mean of a layer's heads (0: none)
  int64_t longest = 0;  // the same of one head: adakv may give one head the whole layer's budget
  int64_t rest = 0;     // tokens appended after it
};
TurnLengths WorstCaseLengths(const TurnPlan& plan, const CachedLengths& cached, int kv_heads);

// Pages beyond what is cached already: turn pages or what is left after compression, block bounds,
// window queries, and one layer's compaction target.
int64_t WorstCasePages(const TurnPlan& plan, const CachedLengths& cached,
                       const AttentionShape& shape);

// Pages of block bounds and of window queries, per head.
int32_t BoundsPages(const TurnPlan& plan);
int32_t WindowPages(const TurnPlan& plan, int group);

// Tokens per kv head that `kv` keeps of `positions`.
int64_t Budget(const KvParams& kv, int64_t positions);

// Whether a cache, `appended` tokens later, is worth compressing: its heads are longer than the
// budget, or than 1.5 budgets when it was compressed before. In the mean: adakv may give one head
// what the others of its layer do without.
bool ExceedsBudget(const CachedLengths& cached, int64_t appended, int64_t budget);

}  // namespace entropyserve
