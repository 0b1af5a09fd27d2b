#include "engine/sequence.h"

#include <algorithm>
#include <utility>

namespace entropyserve {
namespace {

bool Contains(const std::vector<int32_t>& ids, int32_t id) {
  return std::find(ids.begin(), ids.end(), id) != ids.end();
}

std::optional<FinishReason> EndReason(const Sequence& s, int32_t token,
                                      const std::vector<int32_t>& end_ids) {
  const SamplingParams& p = s.request.sampling;
  if (s.generated > int64_t(p.forced_token_ids.size()) || p.forced_token_ids.empty()) {
    if (Contains(p.stop_token_ids, token)) return FinishReason::kStopToken;
    if (!p.ignore_eos && Contains(end_ids, token)) return FinishReason::kStop;
  }
  return std::nullopt;
}

void CountToken(Sequence* s, int32_t token) {
  if (s->session) s->session->seen[token] = true;
  if (s->host_history.empty()) return;
  constexpr uint32_t kInSession = 1u << 31;
  s->host_history[token] = (s->host_history[token] + 1) | kInSession;
}

// Multiplications and additions of q·k and p·v, for one (query, key) pair of one head.
double FlopsPerPair(const AttentionShape& shape) { return 4.0 * shape.head_dim; }

}  // namespace

double ExecutedAttentionFlops(const AttentionShape& shape, const SeqCounters& counters) {
  return FlopsPerPair(shape) * double(counters.pairs + counters.box_blocks);
}

double DenseAttentionFlops(const AttentionShape& shape, int64_t cached, int64_t tokens) {
  const double before = double(cached), n = double(tokens);
  return FlopsPerPair(shape) * shape.heads * shape.layers * (before * n + n * (n + 1) / 2);
}

TokenOutcome AcceptToken(Sequence* s, const SampleResult& sample,
                         const std::vector<int32_t>& end_ids) {
  TokenOutcome outcome;
  ++s->generated;
  s->last_token = sample.token;
  CountToken(s, sample.token);
  outcome.event.ids.push_back(sample.token);
  if (s->request.sampling.logprobs >= 0) {
    TokenLogprobs logprobs{.logprob = sample.logprob, .top = {}};
    for (int i = 0; i < sample.num_top; ++i) {
      logprobs.top.emplace_back(sample.top_ids[i], sample.top_logprobs[i]);
    }
    outcome.event.logprobs.push_back(std::move(logprobs));
  }
  outcome.finished = EndReason(*s, sample.token, end_ids);
  // A token that ends the answer gives no text.
  if (!outcome.finished) outcome.event.text = s->text->Push(sample.token);
  if (s->text->stopped()) {
    outcome.finished = FinishReason::kStopString;
    outcome.stop_string = s->text->matched_stop();
  } else if (!outcome.finished && s->generated >= s->plan.max_new) {
    outcome.finished = FinishReason::kLength;
  }
  if (outcome.finished) outcome.event.text += s->text->Flush();
  return outcome;
}

SampleRow MakeSampleRow(const Sequence& s) {
  const SamplingParams& p = s.request.sampling;
  SampleRow row;
  row.temperature = p.temperature;
  row.top_p = p.top_p;
  row.min_p = p.min_p;
  row.top_k = p.top_k;
  row.repetition = p.repetition_penalty;
  row.presence = p.presence_penalty;
  row.frequency = p.frequency_penalty;
  row.seed = s.seed;
  row.position = s.cache->position();  // called before the step counts as done; see StepBatch
  row.logprobs = p.logprobs;
  row.history = s.history.data();
  if (s.generated < int64_t(p.forced_token_ids.size()))
    row.forced = p.forced_token_ids[s.generated];
  return row;
}

}  // namespace entropyserve
