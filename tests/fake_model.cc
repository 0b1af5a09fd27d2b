#include "tests/fake_model.h"

#include <algorithm>
#include <string>

#include "kernels/kv_view.h"

namespace entropyserve {
namespace {

uint64_t Mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15u + (hash << 6) + (hash >> 2);
  return hash * 0xff51afd7ed558ccdu;
}

int32_t TokenOf(uint64_t hash) {
  return 2 + int32_t((hash >> 20) % uint64_t(FakeConfig().vocab - 2));
}

Vocabulary FakeVocabulary() {
  Vocabulary vocabulary;
  for (int id = 0; id < FakeConfig().vocab; ++id) {
    vocabulary.bytes.push_back(id < 128 ? std::string(1, char(id))
                                        : "<" + std::to_string(id) + ">");
    vocabulary.kinds.push_back(TokenKind::kText);
  }
  vocabulary.eos_ids = FakeConfig().eos_ids;
  return vocabulary;
}

}  // namespace

void FakeHash::Add(int64_t position, int32_t token) {
  hash_ = Mix(Mix(hash_, uint64_t(position)), uint64_t(token));
}

int32_t FakeHash::Next() const { return TokenOf(hash_); }

int32_t NextFakeToken(const std::vector<int32_t>& tokens) {
  FakeHash hash;
  for (size_t i = 0; i < tokens.size(); ++i) hash.Add(int64_t(i), tokens[i]);
  return hash.Next();
}

FakeModel::FakeModel(Backend* backend) : backend_(backend) {
  backend_->Reserve({.shape = shape(),
                     .max_rows = 4096,
                     .max_context = config_.context,
                     .max_seqs = 256,
                     .vocab = config_.vocab});
}

absl::Status FakeModel::EnsureRows(int64_t rows) {
  if (rows > max_rows) return absl::ResourceExhaustedError("the step does not fit (fake)");
  return absl::OkStatus();
}

const float* FakeModel::Forward(const Batch& batch, const KvPool& pool, const int32_t* logit_rows,
                                int64_t num_logits) {
  if (before_step) before_step();
  if (tamper) tamper(batch);
  for (int s = 0; s < batch.num_seqs; ++s) Write(batch, batch.seqs[s], pool);
  residual_.assign(size_t(batch.rows), 0.0f);
  for (int s = 0; s < batch.num_seqs; ++s) ReadBack(batch.seqs[s], pool);
  logits_.resize(size_t(num_logits) * config_.vocab);
  for (int64_t i = 0; i < num_logits; ++i) {
    Logits(&residual_[logit_rows[i]], 1, &logits_[i * config_.vocab]);
  }
  return logits_.data();
}

void FakeModel::Logits(const float* residual, int64_t n, float* logits) {
  std::fill_n(logits, n * config_.vocab, 0.0f);
  for (int64_t i = 0; i < n; ++i) logits[i * config_.vocab + int64_t(residual[i])] = 20.0f;
}

void FakeModel::Write(const Batch& batch, const BatchSeq& seq, const KvPool& pool) {
  float* const k = static_cast<float*>(pool.k);
  for (int layer = 0; layer < config_.layers; ++layer) {
    for (int head = 0; head < config_.kv_heads; ++head) {
      const HeadView view = ViewHead(seq, config_.kv_heads, layer, head);
      // The tag: of the conversation's first token, which this step writes or an earlier one wrote.
      const float tag = seq.position == 0 ? float(batch.tokens[seq.row_begin])
                                          : k[view.Row(0) * config_.head_dim + 1];
      for (int i = 0; i < seq.rows; ++i) {
        const int64_t row = view.TurnRow(view.turn + i);
        k[row * config_.head_dim] = float(batch.tokens[seq.row_begin + i]);
        k[row * config_.head_dim + 1] = tag;
        pool.positions[row] = seq.position + i;
      }
    }
  }
}

void FakeModel::ReadBack(const BatchSeq& seq, const KvPool& pool) {
  const float* const k = static_cast<const float*>(pool.k);
  for (int layer = 0; layer < config_.layers; ++layer) {
    for (int head = 0; head < config_.kv_heads; ++head) {
      const HeadView view = ViewHead(seq, config_.kv_heads, layer, head);
      const int32_t length = view.past + view.turn + seq.rows;
      uint64_t hash = 0;
      int32_t previous = -1;
      const float tag = k[view.Row(0) * config_.head_dim + 1];
      for (int32_t i = 0; i < length; ++i) {
        const int64_t row = view.Row(i);
        const int32_t position = pool.positions[row];
        if (position <= previous || k[row * config_.head_dim + 1] != tag) ++corruptions_;
        previous = position;
        hash = Mix(Mix(hash, uint64_t(position)), uint64_t(k[row * config_.head_dim]));
        const int32_t own = i - (length - seq.rows);  // row of this step
        if (layer == 0 && head == 0 && own >= 0) {
          residual_[seq.row_begin + own] = float(TokenOf(hash));
        }
      }
      if (previous != seq.position + seq.rows - 1) ++corruptions_;
    }
  }
}

FakeTokenizer::FakeTokenizer() : Tokenizer(FakeVocabulary()) {}

absl::Status FakeTokenizer::EncodeText(std::string_view text, bool, WorkMeter*,
                                       std::vector<int32_t>* ids) const {
  for (char c : text) ids->push_back(uint8_t(c) & 127);
  return absl::OkStatus();
}

}  // namespace entropyserve
