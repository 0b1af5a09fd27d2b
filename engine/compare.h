// One text read under two policies, and how far the predictions lie apart: Engine::Compare without
// the engine's loop (engine_compare.cc).
#pragma once

#include <algorithm>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/base/clock.h"
#include "engine/base/mutex.h"
#include "engine/engine.h"
#include "engine/model/model.h"
#include "engine/sequence.h"
#include "engine/step_batch.h"
#include "kernels/device_array.h"

namespace entropyserve {

// Carries positions from the engine thread to the caller that waits. Thread-safe. The caller may
// outlive the engine, so nothing here points into it.
class CompareChannel {
 public:
  // The engine thread's side. An empty `positions` only says that work goes on.
  void Push(std::vector<ComparePosition> positions);
  void Finish(absl::StatusOr<CompareResult> result);  // the last call
  bool full() const;                                  // enough waits for the caller: make no more
  bool cancelled() const;

  // The caller's: hands positions to `sink` until the end.
  absl::StatusOr<CompareResult> Wait(const CompareSink& sink);

 private:
  mutable Mutex mutex_;
  CondVar ready_;
  std::deque<std::vector<ComparePosition>> batches_ ABSL_GUARDED_BY(mutex_);
  size_t pending_ ABSL_GUARDED_BY(mutex_) = 0;  // positions in batches_
  bool cancelled_ ABSL_GUARDED_BY(mutex_) = false;
  std::optional<absl::StatusOr<CompareResult>> result_ ABSL_GUARDED_BY(mutex_);
};

// The work, in steps of at most one chunk under one policy. The text goes by in pieces: policy a
// reads a piece, b reads it, then what both left is scored, some rows at a time.
//
// Owned by the engine thread; not thread-safe.
class CompareJob {
 public:
  CompareJob(CompareRequest request, std::shared_ptr<CompareChannel> channel, Backend* backend,
             Model* model, PagePool* pool, const Clock* clock);

  int64_t WorstCasePages() const;  // of both caches
  // Reserves both caches' worst case. RESOURCE_EXHAUSTED: it can never fit; retryable: not now.
  absl::Status Begin();
  bool begun() const { return begun_; }
  // The next step; a chunk of a prefill has about `chunk` tokens. What it found is added to `out`.
  // RESOURCE_EXHAUSTED: no memory for the step. INTERNAL: logits that are not finite.
  absl::Status Step(int64_t chunk, StepBatch* batch, std::vector<ComparePosition>* out);
  bool done() const { return a_.fed == to_feed_ && b_.fed == to_feed_ && scored_ == scored_end(); }
  CompareResult Result() const;

  const std::shared_ptr<CompareChannel>& channel() const { return channel_; }
  TimePoint deadline() const { return request_.deadline; }
  int64_t buffer_bytes() const;  // of logits, beside the caches

 private:
  // How one policy reads the text.
  struct Side {
    Sequence sequence;
    int64_t fed = 0;          // tokens
    std::vector<float> rows;  // [scored rows of the piece, hidden]
    double prefill_seconds = 0, attention_flops = 0;
  };
  struct Piece {  // of the text, tokens; prompt or decoded, never both
    int64_t begin = 0, end = 0;
  };

  int64_t size() const { return int64_t(request_.tokens.size()); }
  // Scored positions of the piece are [scored_begin(), scored_end()).
  int64_t scored_begin() const { return std::max(piece_.begin, request_.score_from); }
  int64_t scored_end() const { return std::max(scored_begin(), std::min(piece_.end, size() - 1)); }
  void SetUp(Side* side, PrefillPolicy prefill, KvPolicy kv);
  void NextPiece(int64_t chunk);
  absl::Status Feed(Side* side, StepBatch* batch);
  void AfterPrefill(Side* side);
  void Compress(Side* side);
  absl::Status Score(std::vector<ComparePosition>* out);

  const CompareRequest request_;
  const std::shared_ptr<CompareChannel> channel_;
  Backend* const backend_;
  Model* const model_;
  PagePool* const pool_;
  const Clock* const clock_;
  const int64_t prompt_;   // tokens before decode_from
  const int64_t to_feed_;  // the last token is fed only as a part of a prompt
  bool begun_ = false;
  Side a_, b_;
  Piece piece_;
  int64_t scored_ = 0;  // next position to score
  // A slice of rows that is scored at a time.
  DeviceArray<float> hidden_;               // [kMaxLogitsRows, hidden]
  DeviceArray<float> logits_a_, logits_b_;  // [kMaxLogitsRows, vocab]
  DeviceArray<int32_t> targets_;            // [kMaxLogitsRows]
  DeviceArray<LogitsComparison> results_;   // [kMaxLogitsRows]
};

}  // namespace entropyserve
