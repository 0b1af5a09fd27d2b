// What a finished request reports: counted from what ran, never estimated.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace entropyserve {

struct Receipt {
  int64_t prompt_tokens = 0;  // of this turn
  int64_t cached_tokens = 0;  // positions the session already held
  int64_t generated_tokens = 0;
  double queue_seconds = 0, prefill_seconds = 0, ttft_seconds = 0, decode_seconds = 0,
         total_seconds = 0;
  // Attention FLOPs of the prefill: 4 * head_dim per (head, query, key) pair inside the mask, and
  // 4 * head_dim per (head, segment, visible block) of the box estimator. Padding is not counted.
  double attention_flops_executed = 0;
  double attention_flops_dense =
      0;                        // 4 * head_dim * heads * layers per pair of full causal attention
  double rigid_share = 0;       // of (layer, kv head) pairs that stayed rigid; sparse layers only
  int64_t kv_bytes_before = 0;  // when compression started; equal to after when none happened
  int64_t kv_bytes_after = 0;
  uint64_t seed = 0;
  std::string prefill_policy, kv_policy;  // what ran
  bool compressed = false;
};

// Per layer and kv head, for entropyserve-client inspect.
struct Trace {
  int32_t layers = 0, kv_heads = 0, segment = 0, block = 0;
  int32_t segments = 0;           // of this turn's prompt, the last may be short
  std::vector<float> entropy;     // [layers, kv_heads, segments]; NaN: none was computed
  std::vector<float> budget;      // [layers, kv_heads, segments], tokens; NaN likewise
  std::vector<int32_t> selected;  // [layers, kv_heads, segments], blocks; -1: a dense segment
  std::vector<std::vector<int32_t>>
      kept_positions;  // [layers * kv_heads][kept]; empty: not compressed
};

}  // namespace entropyserve
