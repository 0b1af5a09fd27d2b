// A request while it runs: what it still has to feed, what it has generated, when it ends.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/base/clock.h"
#include "engine/cache/sequence_cache.h"
#include "engine/engine.h"
#include "engine/sessions/session_store.h"
#include "engine/text/text_stream.h"
#include "kernels/backend.h"

namespace entropyserve {

// Owned by the engine thread; not thread-safe.
struct Sequence {
  RequestId id = 0;
  EngineRequest request;
  std::shared_ptr<EventSink> sink;
  Session* session = nullptr;            // null: none
  std::unique_ptr<SequenceCache> owned;  // the cache when there is no session
  SequenceCache* cache = nullptr;        // owned's or the session's
  TurnPlan plan;
  uint64_t seed = 0;

  std::vector<int32_t> input;  // to prefill: the session's pending ids, then the prompt
  int64_t prefilled = 0;
  double prefill_step_seconds = 0;  // of the steps that prefilled it
  bool shared = false;              // a step of it did something for another sequence too
  bool loading = false;             // its session is being read from a file
  bool admitted = false;
  bool arriving = false;  // its session is being copied into the pool
  bool paused = false;
  std::optional<TextStream> text;

  int64_t generated = 0;
  int64_t decode_steps = 0;            // generated tokens that a step has read
  int32_t last_token = -1;             // sampled, not read yet; -1: none
  DeviceArray<uint32_t> history;       // [vocab] see SampleRow; empty: no penalty asks for it
  std::vector<uint32_t> host_history;  // the same

  TimePoint submitted{}, started{}, prefill_done{}, first_token{};
  Receipt receipt;
  std::shared_ptr<Trace> trace;

  bool prefilling() const { return prefilled < int64_t(input.size()); }
  int64_t gap() const {
    return request.kv.params.rule == KvRule::kSnapKv ? 0 : request.kv.params.gap;
  }
};

// Of a prefill, as in Receipt.
double ExecutedAttentionFlops(const AttentionShape& shape, const SeqCounters& counters);
// The same of dense attention by `tokens` queries after `cached` tokens.
double DenseAttentionFlops(const AttentionShape& shape, int64_t cached, int64_t tokens);

// What one sampled token means for its sequence.
struct TokenOutcome {
  TokensEvent event;
  std::optional<FinishReason> finished;
  std::string stop_string;
};

// Takes a sampled token into account: text, stop conditions, counts. `end_ids`: the model's own.
TokenOutcome AcceptToken(Sequence* sequence, const SampleResult& sample,
                         const std::vector<int32_t>& end_ids);

// Fields of the sampler's row that do not change from step to step, and those that do.
SampleRow MakeSampleRow(const Sequence& sequence);

}  // namespace entropyserve
