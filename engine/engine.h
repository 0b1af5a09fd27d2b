// The engine: everything between a tokenized request and a stream of tokens. It knows nothing of
// gRPC.
//
// One thread (the engine thread) owns the model, the KV cache, the scheduler, the sequences and the
// sessions. Callers hand requests in through Submit and get events through an EventSink.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/observer.h"
#include "engine/policy/policy.h"
#include "engine/receipt.h"
#include "engine/sampling.h"

namespace entropyserve {

class Tokenizer;

// A monotonic id of an admitted request, made by the engine.
using RequestId = uint64_t;

struct EngineRequest {
  std::string request_id;       // the caller's own, for logs; may be empty
  std::vector<int32_t> prompt;  // token ids, BOS and template included
  std::string session_id;       // empty: no session
  // Whether the prompt begins the session (BOS, system message); absent: it fits any turn. Whoever
  // makes a prompt looks at the session before it is taken: another turn may be first.
  std::optional<bool> first_turn;
  std::string owner;        // the caller's identity; sessions are bound to it
  SamplingParams sampling;  // see engine/sampling.h
  PrefillPolicy prefill;
  KvPolicy kv;
  bool progress = false;  // send a progress event after every prefill step
  bool trace = false;     // collect entropies, budgets, kept positions
  std::vector<int32_t>
      end_of_turn;  // the template's ids after an answer, stored as pending in a session
  bool strip_leading_space = false;  // see TextStream::Options; true for an answer to messages
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
};

struct AcceptedEvent {
  int64_t prompt_tokens = 0;
  int64_t session_tokens = 0;  // positions the session held before this turn
  int64_t queue_position = 0;  // requests ahead
  double estimated_ttft_seconds = 0;
};

struct TokenLogprobs {
  float logprob = 0;  // of the chosen token, raw model (before temperature, penalties, filters)
  std::vector<std::pair<int32_t, float>> top;  // the `logprobs` likeliest, descending
};

struct TokensEvent {
  std::vector<int32_t> ids;
  std::string text;  // valid UTF-8; may be empty when a character is not complete yet
  std::vector<TokenLogprobs> logprobs;  // one per id when requested
};

enum class FinishReason : uint8_t { kStop, kStopString, kStopToken, kLength, kCancelled, kError };

struct FinishedEvent {
  FinishReason reason = FinishReason::kStop;
  std::string stop_string;  // which one, for kStopString
  absl::Status status;      // not OK for kCancelled and kError
  Receipt receipt;
  std::shared_ptr<const Trace> trace;  // when requested
};

// Called on the engine thread; must not block and must not call back into the engine except Cancel
// and SetPaused. OnFinished is the last call, and is made exactly once for each request that Submit
// accepted.
class EventSink {
 public:
  virtual ~EventSink() = default;
  virtual void OnAccepted(const AcceptedEvent& event) = 0;
  virtual void OnProgress(int64_t prefilled, int64_t total) = 0;
  virtual void OnTokens(TokensEvent event) = 0;
  virtual void OnFinished(FinishedEvent event) = 0;
};

struct EngineOptions {
  int64_t max_context = 0;  // tokens; 0: the model's own
  int64_t kv_bytes = 0;     // the page pool's size; 0: chosen by the backend's free memory
  int max_sequences = 64;   // running at the same time
  int max_queue_requests = 1024;
  int64_t max_queue_tokens = 8 << 20;
  int64_t step_tokens = 0;                  // token budget of one step; 0: by the backend's speed
  int64_t lone_chunk_tokens = 0;            // chunk of a prefill that runs alone; 0: the same
  int64_t max_whole_prompt_tokens = 32768;  // limit of preset entropy_paper
  int64_t max_sessions = 10000;

  // Idle sessions live in pages of the pool, then in host memory, then in files; each tier has a
  // limit in bytes, and the session that was used longest ago moves on first. What no tier can take
  // is dropped, and its next use is SESSION_LOST.
  double session_ttl_seconds = 0;    // an idle session is dropped after this time; 0: never
  int64_t session_device_bytes = 0;  // of idle sessions in the pool; 0: as much as is not needed
  int64_t session_host_bytes = 0;    // 0: no host tier
  std::string session_dir;           // empty: no files
  int64_t session_dir_bytes = 0;     // 0: no limit but the disk's
  // Of sessions' pages, copied into and out of the pool beside one step, and as much again for
  // every 128 rows of it: what runs waits for it. 32 MiB are 0.6 ms on a GPU's host link.
  int64_t session_step_bytes = int64_t{32} << 20;

  // Of one owner (EngineRequest::owner); 0: no limit.
  int64_t max_owner_queue_tokens = 0;   // prompt tokens in the queue
  int64_t max_owner_requests = 0;       // queued and running
  int64_t max_owner_sessions = 0;       // in all tiers
  int64_t max_owner_session_bytes = 0;  // KV bytes of its sessions, in all tiers
  // A request whose deadline lies before its estimated first token is refused at once, unless the
  // engine is idle: DEADLINE_EXCEEDED when its own prompt takes too long, RESOURCE_EXHAUSTED (to be
  // retried) when what is ahead of it does.
  bool refuse_late = false;
};

// A part of the memory that the engine holds or has promised.
struct MemoryEntry {
  std::string name;  // "weights", "kv_pages", "activations", "session_host", ...
  int64_t bytes = 0;
};

// A moment's load, consistent in itself.
struct EngineStats {
  int64_t running = 0, waiting = 0, queued_tokens = 0;
  int64_t pages_total = 0, pages_used = 0, page_bytes = 0;
  // What the KV of all cached positions on the device would take uncompressed and unshared.
  int64_t kv_logical_bytes = 0;
  int64_t weight_bytes = 0, activation_bytes = 0;
  int64_t admitted = 0, completed = 0, cancelled = 0,
          failed = 0;  // since start; admitted is the sum of
                       // the others, running and waiting
  int64_t prompt_tokens = 0, generated_tokens = 0, steps = 0;
  int64_t sessions = 0;  // all tiers
  // By tier, in the order of SessionTier.
  int64_t tier_sessions[kSessionTiers] = {};
  int64_t tier_bytes[kSessionTiers] = {};
  std::vector<MemoryEntry> memory;  // the ledger; its sum is what the engine holds
};

struct SessionInfo {
  std::string id;
  int64_t positions = 0;  // true length so far
  int64_t kv_bytes = 0;
  int64_t kept_tokens = 0;  // mean per kv head
  int64_t turns = 0;
  bool busy = false;
  double idle_seconds = 0;
  std::string kv_policy;
  SessionTier tier = SessionTier::kDevice;
};

// Reads one text under two policies and compares the predictions. Tokens before `decode_from` are a
// prompt; from there on each is fed alone, as if it had been generated, so that the KV policy has
// its effect.
struct CompareRequest {
  std::vector<int32_t> tokens;         // at least two
  int64_t score_from = 0;              // first position whose prediction is compared
  int64_t decode_from = 0;             // 0: everything is prompt
  PrefillPolicy prefill_a, prefill_b;  // a is the reference
  KvPolicy kv_a, kv_b;
  std::chrono::steady_clock::time_point deadline = std::chrono::steady_clock::time_point::max();
};

// The predictions of the token at position + 1.
struct ComparePosition {
  int64_t position = 0;
  double kl = 0;  // KL(a || b), nats
  bool top1_equal = false;
  double logprob_a = 0, logprob_b = 0;  // of the token that follows
};

struct CompareResult {
  double attention_flops_a = 0, attention_flops_b = 0;  // of the prefill, as in Receipt
  double attention_flops_dense = 0;
  double prefill_seconds_a = 0, prefill_seconds_b = 0;  // each policy's steps, timed apart
  int64_t kv_bytes_a = 0, kv_bytes_b = 0;               // at the end
};

// Called on the thread that waits in Compare, in order of position; false cancels. It may block:
// the comparison pauses when much waits for it. An empty span says that the comparison goes on.
using CompareSink = std::function<bool(std::span<const ComparePosition>)>;

// Thread-safe.
class Engine {
 public:
  virtual ~Engine() = default;

  // Queues `request`; events go to `sink`, which stays alive until OnFinished returned.
  // INVALID_ARGUMENT: a field, named; a prompt longer than the context. RESOURCE_EXHAUSTED: the
  // queue or the owner's quota is full (IsRetryable(status)), or the request can never fit (not
  // retryable; need and have are said). FAILED_PRECONDITION: SESSION_BUSY, SESSION_LOST. NOT_FOUND:
  // session. UNAVAILABLE: draining.
  virtual absl::StatusOr<RequestId> Submit(EngineRequest request,
                                           std::shared_ptr<EventSink> sink) = 0;

  // Ends the request with FinishReason::kCancelled within one step. No effect once it has finished.
  virtual void Cancel(RequestId id, absl::Status why) = 0;

  // A paused sequence keeps its pages and is not scheduled: its reader does not read.
  virtual void SetPaused(RequestId id, bool paused) = 0;

  virtual EngineStats Stats() const = 0;

  // A forward pass of a few tokens through the whole model; OK when its logits are finite. Health
  // turns SERVING after it.
  virtual absl::Status WarmUp() = 0;

  // Reads `tokens` random tokens under policy `full`, in the steps of a prompt that has the engine
  // to itself, and forgets them; seconds of those steps. Nobody's request: it is in no count.
  // Nothing else runs meanwhile, so it is for the time before requests are taken. INVALID_ARGUMENT:
  // longer than the context. RESOURCE_EXHAUSTED: it does not fit into the pool.
  virtual absl::StatusOr<double> TimeDensePrefill(int64_t /*tokens*/) {
    return absl::UnimplementedError("this engine cannot time prefills");
  }

  // New requests are refused from now on; returns once nothing is running or `deadline` passed,
  // after which what is left is cancelled.
  virtual void Drain(std::chrono::steady_clock::time_point deadline) = 0;

  // Blocks until done; other requests are served between its steps. One at a time: another one is
  // RESOURCE_EXHAUSTED (retryable). INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNAVAILABLE as for
  // Submit; CANCELLED: the sink said so. DEADLINE_EXCEEDED: the request's own.
  virtual absl::StatusOr<CompareResult> Compare(CompareRequest /*request*/, CompareSink /*sink*/) {
    return absl::UnimplementedError("this engine cannot compare policies");
  }

  // Sessions; lost ones can be deleted. Owner must match, otherwise NOT_FOUND (no id is probed).
  virtual absl::StatusOr<SessionInfo> CreateSession(const std::string& owner) = 0;
  virtual absl::StatusOr<SessionInfo> GetSession(const std::string& owner,
                                                 const std::string& id) = 0;
  virtual std::vector<SessionInfo> ListSessions(const std::string& owner) = 0;
  virtual absl::StatusOr<SessionInfo> ForkSession(const std::string& owner,
                                                  const std::string& id) = 0;
  virtual absl::Status DeleteSession(const std::string& owner, const std::string& id) = 0;
};

}  // namespace entropyserve
