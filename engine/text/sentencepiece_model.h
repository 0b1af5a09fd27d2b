// Reader of tokenizer.model, the protocol buffer file of the SentencePiece library. Only the fields
// that change the encoding are read. (Debian's libsentencepiece cannot be linked beside
// libprotobuf.)
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace entropyserve {

// Numbers are the file's (ModelProto.SentencePiece.Type); GGUF's token types are the same ones.
enum class PieceType : uint8_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

struct SentencePieceModel {
  enum class Algorithm : uint8_t { kUnigram = 1, kBpe = 2 };

  struct Piece {
    std::string text;  // with U+2581 for a space
    float score = 0;
    PieceType type = PieceType::kNormal;
  };
  std::vector<Piece> pieces;  // by id
  Algorithm algorithm = Algorithm::kUnigram;
  bool byte_fallback = false;
  int32_t unk_id = 0;
  int32_t bos_id = 1;  // -1: none
  int32_t eos_id = 2;

  std::string charsmap;  // precompiled character map; empty: identity
  bool add_dummy_prefix = true;
  bool remove_extra_whitespaces = true;
  bool escape_whitespaces = true;
};

// INVALID_ARGUMENT: not such a file, or a truncated one; the message names the field.
// UNIMPLEMENTED: a word or character model, or white space as a suffix.
absl::StatusOr<SentencePieceModel> ParseSentencePieceModel(std::string_view bytes);

}  // namespace entropyserve
