// Byte-level BPE (GPT-2 and after): text is cut by patterns, every piece is a string of bytes, and
// merges by rank make tokens of them.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/pre_tokenizer.h"
#include "engine/text/tokenizer.h"

namespace entropyserve {

// What both file formats say, still in the files' alphabet, where every byte is a printable
// character (a space is U+0120).
struct ByteLevelParts {
  std::string source;  // for error messages: "tokenizer.json", "tokenizer.ggml"
  // `bytes` holds the names as written; text tokens are translated to bytes here.
  Vocabulary vocabulary;
  std::vector<std::pair<std::string, std::string>> merges;  // by rank
  std::vector<SplitPattern> splits;
  bool ignore_merges =
      false;         // a piece that is a token is that token, whatever the merges (Llama 3)
  bool nfc = false;  // normalize to NFC first (Qwen)
};

// INVALID_ARGUMENT: a merge that names or makes an unknown token, a byte of text without a token.
absl::StatusOr<std::unique_ptr<Tokenizer>> MakeByteLevelBpe(ByteLevelParts parts);

// `text` in Unicode's normalization form C. Valid UTF-8 in and out; O(n log n) in any text.
std::string NormalizeNfc(std::string_view text);

}  // namespace entropyserve
