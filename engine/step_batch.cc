#include "engine/step_batch.h"

#include <algorithm>
#include <cstring>

#include "kernels/check.h"

namespace entropyserve {

void StepBatch::Clear() {
  seqs_.clear();
  segments_.clear();
  for (auto* v : {&decodes_, &tokens_, &row_seq_, &rows_to_sample_, &banned_}) v->clear();
  sample_rows_.clear();
  banned_at_.clear();
  sampled_.clear();
}

void StepBatch::Add(Sequence* s, int64_t tokens, bool prefill, bool wants_logits,
                    const std::vector<int32_t>& banned) {
  BatchSeq seq;
  s->cache->Describe(&seq);
  seq.row_begin = int32_t(tokens_.size());
  seq.rows = int32_t(tokens);
  const int32_t index = int32_t(seqs_.size());
  if (prefill) {
    seq.turn_total = int32_t(s->input.size());
    seq.policy = s->request.prefill.params;
    tokens_.insert(tokens_.end(), s->input.begin() + s->prefilled,
                   s->input.begin() + s->prefilled + tokens);
    AddSegments(seq, tokens);
  } else {
    Check(tokens == 1 && s->last_token >= 0, "a decoding sequence feeds its last token");
    decodes_.push_back(index);
    tokens_.push_back(s->last_token);
  }
  row_seq_.insert(row_seq_.end(), size_t(tokens), index);
  seqs_.push_back(seq);
  if (!wants_logits) return;
  SampleRow row = MakeSampleRow(*s);
  row.logits_row = int32_t(rows_to_sample_.size());
  row.position = seq.position + tokens;  // of the token to come
  if (!banned.empty()) {
    banned_at_.push_back({sample_rows_.size(), banned_.size()});
    row.num_banned = int32_t(banned.size());
    banned_.insert(banned_.end(), banned.begin(), banned.end());
  }
  rows_to_sample_.push_back(int32_t(tokens_.size()) - 1);
  sample_rows_.push_back(row);
  sampled_.push_back(s);
}

void StepBatch::AddSegments(const BatchSeq& seq, int64_t tokens) {
  const int32_t size = seq.policy.segment;
  Check(seq.appended % size == 0, "prefill chunks start at a multiple of the segment");
  for (int32_t at = 0; at < tokens; at += size) {
    segments_.push_back({.seq = int32_t(seqs_.size()),
                         .row_begin = seq.row_begin + at,
                         .rows = int32_t(std::min<int64_t>(size, tokens - at)),
                         .index = (seq.appended + at) / size});
  }
}

bool StepBatch::Upload() {
  staging_.clear();
  auto put = [this]<typename T>(const std::vector<T>& values) {
    constexpr size_t kAlignment = 16;
    staging_.resize(CeilDiv(staging_.size(), kAlignment) * kAlignment);
    const size_t at = staging_.size();
    staging_.resize(at + values.size() * sizeof(T));
    if (!values.empty())
      std::memcpy(staging_.data() + at, values.data(), values.size() * sizeof(T));
    return at;
  };
  const size_t seqs = put(seqs_), segments = put(segments_), decodes = put(decodes_),
               tokens = put(tokens_), row_seq = put(row_seq_), rows = put(rows_to_sample_),
               banned = put(banned_);
  if (int64_t(staging_.size()) > device_.size()) {
    device_ = {};
    device_ = DeviceArray<char>(backend_, int64_t(staging_.size()) * 2);
    if (!device_.ok()) return false;
  }
  backend_->CopyIn(device_.data(), staging_.data(), staging_.size());
  char* const base = device_.data();
  batch_ = Batch{.rows = int32_t(tokens_.size()),
                 .num_seqs = int32_t(seqs_.size()),
                 .num_segments = int32_t(segments_.size()),
                 .num_decodes = int32_t(decodes_.size()),
                 .seqs = seqs_.data(),
                 .segments = segments_.data(),
                 .decodes = decodes_.data(),
                 .device_seqs = reinterpret_cast<const BatchSeq*>(base + seqs),
                 .device_segments = reinterpret_cast<const BatchSegment*>(base + segments),
                 .device_decodes = reinterpret_cast<const int32_t*>(base + decodes),
                 .tokens = reinterpret_cast<const int32_t*>(base + tokens),
                 .row_seq = reinterpret_cast<const int32_t*>(base + row_seq)};
  logit_rows_ = reinterpret_cast<const int32_t*>(base + rows);
  for (const Banned& b : banned_at_) {
    sample_rows_[b.row].banned = reinterpret_cast<const int32_t*>(base + banned) + b.offset;
  }
  return true;
}

}  // namespace entropyserve
