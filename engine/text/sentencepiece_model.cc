#include "engine/text/sentencepiece_model.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <functional>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

absl::Status Malformed(const char* where) {
  return absl::InvalidArgumentError(
      absl::StrCat("tokenizer.model: truncated or malformed ", where));
}

// One field of a protocol buffer message. Groups are not used by this format and are refused.
struct Field {
  uint32_t number = 0;
  uint64_t value = 0;      // varint, or the bits of a fixed32 or fixed64
  std::string_view bytes;  // length-delimited
  bool is_bytes = false;
};

class WireReader {
 public:
  explicit WireReader(std::string_view bytes) : rest_(bytes) {}

  bool done() const { return rest_.empty(); }

  // False: the bytes are not a field.
  bool Next(Field* field) {
    uint64_t tag = 0;
    if (!Varint(&tag) || tag >> 3 == 0 || tag >> 3 > (1u << 29) - 1) return false;
    *field = Field();
    field->number = static_cast<uint32_t>(tag >> 3);
    switch (tag & 7) {
      case 0:
        return Varint(&field->value);
      case 1:
        return Fixed(8, &field->value);
      case 5:
        return Fixed(4, &field->value);
      case 2: {
        uint64_t length = 0;
        if (!Varint(&length) || length > rest_.size()) return false;
        field->bytes = rest_.substr(0, length);
        field->is_bytes = true;
        rest_.remove_prefix(length);
        return true;
      }
      default:
        return false;
    }
  }

 private:
  bool Varint(uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (rest_.empty()) return false;
      const uint8_t byte = static_cast<uint8_t>(rest_[0]);
      rest_.remove_prefix(1);
      *value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if ((byte & 0x80) == 0) return true;
    }
    return false;
  }

  bool Fixed(size_t size, uint64_t* value) {
    if (rest_.size() < size) return false;
    *value = 0;
    for (size_t i = 0; i < size; ++i) {
      *value |= static_cast<uint64_t>(static_cast<uint8_t>(rest_[i])) << (8 * i);
    }
    rest_.remove_prefix(size);
    return true;
  }

  std::string_view rest_;
};

// Calls visit for every field of a message.
absl::Status ForEachField(std::string_view message, const char* where,
                          const std::function<absl::Status(const Field&)>& visit) {
  WireReader reader(message);
  Field field;
  while (!reader.done()) {
    if (!reader.Next(&field)) return Malformed(where);
    RETURN_IF_ERROR(visit(field));
  }
  return absl::OkStatus();
}

absl::Status ParsePiece(std::string_view message, SentencePieceModel* model) {
  SentencePieceModel::Piece piece;
  RETURN_IF_ERROR(ForEachField(message, "pieces", [&](const Field& field) -> absl::Status {
    if (field.is_bytes != (field.number == 1) && field.number <= 3) return Malformed("pieces");
    if (field.number == 1) piece.text = std::string(field.bytes);
    if (field.number == 2) piece.score = std::bit_cast<float>(static_cast<uint32_t>(field.value));
    if (field.number == 3) {
      if (field.value < 1 || field.value > 6) return Malformed("pieces.type");
      piece.type = static_cast<PieceType>(field.value);
    }
    return absl::OkStatus();
  }));
  model->pieces.push_back(std::move(piece));
  return absl::OkStatus();
}

absl::Status ParseTrainerSpec(std::string_view message, SentencePieceModel* model) {
  return ForEachField(message, "trainer_spec", [&](const Field& field) -> absl::Status {
    switch (field.number) {
      case 3:
        if (field.value != 1 && field.value != 2) {
          return absl::UnimplementedError(
              absl::StrCat("tokenizer.model: trainer_spec.model_type ", field.value,
                           " is not supported; only unigram (1) and BPE (2) are"));
        }
        model->algorithm = static_cast<SentencePieceModel::Algorithm>(field.value);
        return absl::OkStatus();
      case 24:
        if (field.value == 0) return absl::OkStatus();
        return absl::UnimplementedError(
            "tokenizer.model: trainer_spec.treat_whitespace_as_suffix is not supported");
      case 35:
        model->byte_fallback = field.value != 0;
        return absl::OkStatus();
      case 40:
        model->unk_id = static_cast<int32_t>(field.value);
        return absl::OkStatus();
      case 41:
        model->bos_id = static_cast<int32_t>(field.value);
        return absl::OkStatus();
      case 42:
        model->eos_id = static_cast<int32_t>(field.value);
        return absl::OkStatus();
      default:
        return absl::OkStatus();
    }
  });
}

absl::Status ParseNormalizerSpec(std::string_view message, SentencePieceModel* model) {
  return ForEachField(message, "normalizer_spec", [&](const Field& field) -> absl::Status {
    if (field.number == 2) model->charsmap = std::string(field.bytes);
    if (field.number == 3) model->add_dummy_prefix = field.value != 0;
    if (field.number == 4) model->remove_extra_whitespaces = field.value != 0;
    if (field.number == 5) model->escape_whitespaces = field.value != 0;
    return absl::OkStatus();
  });
}

}  // namespace

absl::StatusOr<SentencePieceModel> ParseSentencePieceModel(std::string_view bytes) {
  SentencePieceModel model;
  RETURN_IF_ERROR(ForEachField(bytes, "file", [&](const Field& field) -> absl::Status {
    if (field.number >= 1 && field.number <= 3 && !field.is_bytes) return Malformed("file");
    if (field.number == 1) return ParsePiece(field.bytes, &model);
    if (field.number == 2) return ParseTrainerSpec(field.bytes, &model);
    if (field.number == 3) return ParseNormalizerSpec(field.bytes, &model);
    return absl::OkStatus();
  }));
  if (model.pieces.empty()) return absl::InvalidArgumentError("tokenizer.model: no pieces");
  return model;
}

}  // namespace entropyserve
