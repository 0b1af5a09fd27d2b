// Parameters of the attention method as kernels see them. Plain C++, included by .cu files.
// Formulas: ARCHITECTURE.md, "The method".
#pragma once

#include <cstdint>

namespace entropyserve {

enum class Estimator : uint8_t {
  kBox,    // block min/max against a segment's query centre (the paper's)
  kProbe,  // exact attention of every r-th query
};
enum class BudgetRule : uint8_t { kEntropy, kFixed, kCoverage };

// Which past blocks a segment of a prefill reads.
struct PrefillParams {
  bool full = false;          // every segment dense: all the rest is unused
  bool whole_prompt = false;  // the released code's rule (entropy_paper): one exclusive chunk
  Estimator estimator = Estimator::kBox;
  BudgetRule budget = BudgetRule::kEntropy;
  bool forced = true;         // the turn's first block and the previous segment are always read
  int32_t correction = 32;    // stride of the correction's probes, tokens; 0: off; divides segment
  int32_t probe_stride = 32;  // stride r of the `probe` estimator, tokens; divides segment
  int32_t segment = 512;      // S, tokens: 128, 256, 512, 1024
  int32_t block = 8;          // B, tokens: 8, 16, 32, 64
  int32_t dense_prefix = 4096;  // T, tokens: a segment that starts before it is dense
  int32_t dense_suffix = 256;   // tokens: a segment that holds one of the turn's last ones is dense
  int32_t first_sparse_layer = 1;  // layers below are dense
  int32_t base = 2048;             // base budget, tokens
  float e_t = 1e-5f;               // entropy (nats) under which a head counts as rigid
  float delta = 0.4f;              // relative change of entropy at which a budget stays
  float alpha = 0.5f;              // gain of the budget update
  float temperature = 1.0f;        // factor on box scores before their softmax
  float coverage = 0.95f;          // attention mass to reach; >= 1 selects everything
  int32_t coverage_min = 128;      // tokens
  int32_t coverage_max = 8192;     // tokens
};

enum class KvRule : uint8_t { kFull, kLatent, kSnapKv, kAdaKv };
enum class Pooling : uint8_t { kAverage, kMax };

// Which cached tokens survive compression.
struct KvParams {
  KvRule rule = KvRule::kLatent;
  int32_t budget = 2048;  // tokens kept per kv head
  float fraction = 0.0f;  // of the positions so far; the larger of budget and fraction counts
  int32_t gap = 16;  // g: tokens generated over the whole cache before compression (latent, adakv)
  int32_t window = 32;  // W: queries that score, tokens that always stay
  Pooling pooling = Pooling::kAverage;
  // Tokens before and after one that the window looked at, which share in its score: what follows a
  // name is its value, and stays whole (docs/quality.md).
  int32_t pool_before = 8;
  int32_t pool_after = 40;
  bool keep_sinks = true;    // the first 4 tokens always stay
  float adakv_floor = 0.5f;  // share of its budget that every head keeps under adakv
};

inline constexpr int32_t kSinkTokens = 4;
inline constexpr int32_t kPageTokens = 64;  // tokens, block bounds or window queries of a page half

}  // namespace entropyserve
