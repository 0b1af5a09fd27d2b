// Sampling fields of a request. Validation names the field; the arithmetic is kernels/'s Sample.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace entropyserve {

inline constexpr int kMaxLogprobs = 20;
inline constexpr int kMaxStopStrings = 16;
inline constexpr int kMaxStopStringBytes = 1024;
inline constexpr int kMaxStopTokenIds = 256;  // looked through, and masked, for every token

struct SamplingParams {
  float temperature = 1.0f;         // >= 0; 0: greedy
  float top_p = 1.0f;               // (0, 1]
  int32_t top_k = 0;                // >= 0; 0: off
  float min_p = 0.0f;               // [0, 1]
  float repetition_penalty = 1.0f;  // > 0; sees the session's tokens, prompt included
  float presence_penalty = 0.0f;    // [-2, 2]; sees this answer's tokens
  float frequency_penalty = 0.0f;   // [-2, 2]; the same
  std::optional<uint64_t> seed;     // absent: drawn by the server and reported
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  int64_t max_new_tokens = 1024;  // 0: read, compress, park
  int64_t min_new_tokens = 0;     // end and stop ids are masked before it
  bool ignore_eos = false;
  int32_t logprobs = -1;                  // -1: none; 0: the chosen token's; up to kMaxLogprobs
  std::vector<int32_t> forced_token_ids;  // the answer's first tokens; their logprobs are reported
};

// INVALID_ARGUMENT naming the field ("sampling.top_p") for anything out of range, NaN or infinite.
absl::Status Validate(const SamplingParams& params, int vocab_size);

}  // namespace entropyserve
