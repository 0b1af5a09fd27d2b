// SentencePiece's normalization: a precompiled character map, white space, the dummy prefix.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/byte_trie.h"

namespace entropyserve {

inline constexpr std::string_view kSpaceMark = "\xE2\x96\x81";  // U+2581, a space in a piece

// A precompiled_charsmap: a double-array trie of replaced strings, and the text they become. Every
// access is checked, since the file is not trusted.
class CharsMap {
 public:
  // INVALID_ARGUMENT: the sizes in `blob` do not agree. An empty blob is the identity.
  static absl::StatusOr<CharsMap> Parse(std::string_view blob);

  struct Match {
    size_t length = 0;             // bytes of text replaced; 0: no entry
    std::string_view replacement;  // valid while the map lives
  };
  // The longest entry that `text` begins with.
  Match Longest(std::string_view text) const;

 private:
  std::vector<uint32_t> units_;
  std::string replacements_;  // each ends with a zero byte
};

struct SentencePieceNormalizer {
  CharsMap charsmap;
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = false;
  bool escape_whitespaces = true;

  // `protect`: strings that are left as they are (user-defined pieces). `prefix`: whether a dummy
  // prefix belongs here, if the model has one.
  std::string Normalize(std::string_view text, const ByteTrie& protect, bool prefix) const;
};

}  // namespace entropyserve
