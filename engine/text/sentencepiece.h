// SentencePiece vocabularies: BPE by score or by merge rank, and unigram, with byte fallback.
#pragma once

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/sentencepiece_model.h"
#include "engine/text/tokenizer.h"

namespace entropyserve {

struct SentencePieceParts {
  std::string source;  // for error messages: "tokenizer.model", "tokenizer.json", "tokenizer.ggml"
  SentencePieceModel model;
  // "left right" by rank: replaces merging by score (a tokenizer.json made from a SentencePiece
  // file).
  std::vector<std::pair<std::string, std::string>> merges;
  bool merges_by_rank = false;
  // The dummy prefix goes before the first word of the whole sequence only, not of every text that
  // follows a control token.
  bool prefix_first_only = false;
  // Neighbouring unknown characters are one unknown token, as the library has it.
  bool fuse_unknown = true;
  // Everything but bytes, which come from the pieces, and strips_leading_space. `kinds` is by id:
  // what side files say beyond the piece's own type; empty: nothing.
  Vocabulary vocabulary;
};

// INVALID_ARGUMENT: an id out of range, a score that is not finite, byte fallback without all 256
// byte pieces, a text the vocabulary could not encode. UNIMPLEMENTED: unused pieces in a BPE file.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeSentencePiece(SentencePieceParts parts);

}  // namespace entropyserve
