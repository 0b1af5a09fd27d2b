// The ragged batch of one step: built on the host, copied to the backend in one piece.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "kernels/backend.h"
#include "kernels/device_array.h"

namespace entropyserve {

class StepBatch {
 public:
  explicit StepBatch(Backend* backend) : backend_(backend) {}

  void Clear();
  // Adds `tokens` of the sequence: a piece of its prefill, or its last sampled token.
  // `wants_logits`: its last row is sampled from; `banned`: ids that may not be taken there.
  void Add(Sequence* sequence, int64_t tokens, bool prefill, bool wants_logits,
           const std::vector<int32_t>& banned);
  // Copies everything to the backend. False: there is no memory for it.
  bool Upload();

  const Batch& batch() const { return batch_; }
  const int32_t* logit_rows() const { return logit_rows_; }  // backend memory
  std::vector<SampleRow>& sample_rows() { return sample_rows_; }
  // Sequences that are sampled from, in the order of sample_rows().
  const std::vector<Sequence*>& sampled() const { return sampled_; }

 private:
  struct Banned {
    size_t row, offset;
  };
  void AddSegments(const BatchSeq& seq, int64_t tokens);

  Backend* const backend_;
  std::vector<BatchSeq> seqs_;
  std::vector<BatchSegment> segments_;
  std::vector<int32_t> decodes_, tokens_, row_seq_, rows_to_sample_, banned_;
  std::vector<SampleRow> sample_rows_;
  std::vector<Banned> banned_at_;
  std::vector<Sequence*> sampled_;
  std::vector<char> staging_;
  DeviceArray<char> device_;
  Batch batch_;
  const int32_t* logit_rows_ = nullptr;
};

}  // namespace entropyserve
