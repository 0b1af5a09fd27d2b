// What tokenizer loaders share: limits, and the small files beside a tokenizer.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/text/tokenizer.h"

namespace entropyserve {

// Several times what real files have; a file beyond them is refused before it costs memory.
inline constexpr size_t kMaxTokenizerFileBytes = size_t{128} << 20;
inline constexpr int32_t kMaxVocabularySize = 1 << 20;
inline constexpr size_t kMaxTokenBytes = 1024;

struct SideInfo {
  struct AddedToken {
    int32_t id;
    std::string content;
    bool special;
  };
  std::string bos;  // names; empty: not said
  std::string eos;
  std::optional<bool> add_bos;
  std::vector<AddedToken> added;  // tokenizer_config.json's added_tokens_decoder
  std::vector<int32_t> eos_ids;   // generation_config.json
  std::string chat_template;
};

// INVALID_ARGUMENT names file and field.
absl::StatusOr<SideInfo> ParseSideFiles(const TokenizerSideFiles& files);

// Settles bos, eos, add_bos and the chat template of `vocabulary`, whose kinds are set; `names` are
// the tokens as the file writes them. BOS, EOS and the markers that the chat template itself uses
// are control tokens, whatever their declared kind: text must not be able to write them.
// INVALID_ARGUMENT: a name or id that is not in the vocabulary.
absl::Status FinishVocabulary(const std::vector<std::string>& names, const SideInfo& side,
                              Vocabulary* vocabulary);

}  // namespace entropyserve
