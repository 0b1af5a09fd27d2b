#include "engine/text/byte_level_bpe.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/bpe.h"
#include "engine/text/utf8.h"

namespace entropyserve {
namespace {

using NameMap = TextMap<std::string_view, int32_t>;

// The files' alphabet: bytes that are printable in Latin-1 stand for themselves, the 68 others for
// the characters from U+0100 on, in order.
std::array<uint32_t, 256> MakeAlphabet() {
  std::array<uint32_t, 256> alphabet;
  uint32_t next = 0x100;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable =
        (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    alphabet[byte] = printable ? byte : next++;
  }
  return alphabet;
}

constexpr uint32_t kAlphabetEnd = 0x100 + 68;

// A name in the files' alphabet as bytes; nothing if it has a character from outside.
std::optional<std::string> ToBytes(std::string_view name,
                                   const std::array<int, kAlphabetEnd>& inverse) {
  std::string bytes;
  while (!name.empty()) {
    const Utf8Step step = NextUtf8(name);
    if (!step.valid) return std::nullopt;
    const uint32_t point = DecodeUtf8(name, step.length);
    if (point >= kAlphabetEnd || inverse[point] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(inverse[point]));
    name.remove_prefix(step.length);
  }
  return bytes;
}

// Bytes that no usable vocabulary lacks. Real ones do lack control characters and lead bytes of
// planes that their training text did not have.
bool IsPlainText(int byte) { return byte == '\n' || (byte >= ' ' && byte <= '~'); }

class ByteLevelBpe final : public Tokenizer {
 public:
  struct Rules {
    PairTable pairs;
    std::array<int32_t, 256> byte_ids;
    TextMap<std::string, int32_t> whole;  // filled when merges are ignored for whole pieces
    bool nfc = false;
  };

  ByteLevelBpe(Vocabulary vocabulary, Rules rules, const std::vector<SplitPattern>& splits)
      : Tokenizer(std::move(vocabulary)), rules_(std::move(rules)), splitter_(splits) {}

 private:
  absl::Status EncodeText(std::string_view text, bool first, WorkMeter* meter,
                          std::vector<int32_t>* ids) const override {
    (void)first;
    std::string normalized;
    if (rules_.nfc) {
      normalized = NormalizeNfc(text);
      text = normalized;
    }
    BpeMerger merger(rules_.pairs, meter);
    WordCache cache;
    std::vector<int32_t> symbols;
    return splitter_.Split(text, [&](std::string_view piece) -> absl::Status {
      RETURN_IF_ERROR(meter->Add(piece.size()));
      if (!rules_.whole.empty()) {
        if (const auto found = rules_.whole.find(piece); found != rules_.whole.end()) {
          ids->push_back(found->second);
          return absl::OkStatus();
        }
      }
      if (const auto known = cache.Find(piece); known.has_value()) {
        ids->insert(ids->end(), known->begin(), known->end());
        return absl::OkStatus();
      }
      symbols.resize(piece.size());
      std::transform(piece.begin(), piece.end(), symbols.begin(),
                     [&](char c) { return rules_.byte_ids[static_cast<uint8_t>(c)]; });
      // A byte that the vocabulary has no token for gives nothing (SmolLM2 lacks a few), as in the
      // `tokenizers` library: its neighbours may merge.
      std::erase(symbols, -1);
      ASSIGN_OR_RETURN(const std::span<const int32_t> merged, merger.Merge(symbols));
      ids->insert(ids->end(), merged.begin(), merged.end());
      cache.Add(piece, merged);
      return absl::OkStatus();
    });
  }

  const Rules rules_;
  const PreTokenizer splitter_;
};

absl::Status AddMerges(const ByteLevelParts& parts, const NameMap& names, PairTable* pairs) {
  pairs->Reserve(parts.merges.size());
  std::string made;
  for (size_t rank = 0; rank < parts.merges.size(); ++rank) {
    const auto& [left, right] = parts.merges[rank];
    made.assign(left).append(right);
    const auto l = names.find(left);
    const auto r = names.find(right);
    const auto m = names.find(made);
    if (l == names.end() || r == names.end() || m == names.end()) {
      return absl::InvalidArgumentError(absl::StrCat(parts.source, ": merges[", rank,
                                                     "] names or makes a token that the vocabulary "
                                                     "lacks"));
    }
    pairs->Add(l->second, r->second, {static_cast<int32_t>(rank), m->second});
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeByteLevelBpe(ByteLevelParts parts) {
  const std::array<uint32_t, 256> alphabet = MakeAlphabet();
  std::array<int, kAlphabetEnd> inverse;
  inverse.fill(-1);
  for (int byte = 0; byte < 256; ++byte) inverse[alphabet[byte]] = byte;

  Vocabulary& vocabulary = parts.vocabulary;
  // Control and user-defined tokens are found by name only, never made by merges.
  NameMap names;
  names.reserve(vocabulary.bytes.size());
  for (size_t id = 0; id < vocabulary.bytes.size(); ++id) {
    if (vocabulary.kinds[id] == TokenKind::kText) {
      names.emplace(vocabulary.bytes[id], static_cast<int32_t>(id));
    }
  }
  ByteLevelBpe::Rules rules;
  rules.nfc = parts.nfc;
  RETURN_IF_ERROR(AddMerges(parts, names, &rules.pairs));
  for (int byte = 0; byte < 256; ++byte) {
    std::string name;
    AppendUtf8(alphabet[byte], &name);
    const auto found = names.find(name);
    if (found == names.end() && IsPlainText(byte)) {
      return absl::InvalidArgumentError(
          absl::StrCat(parts.source, ": the vocabulary has no token for byte ", byte));
    }
    rules.byte_ids[byte] = found == names.end() ? -1 : found->second;
  }
  names.clear();  // it points into the names, which become bytes now
  for (size_t id = 0; id < vocabulary.bytes.size(); ++id) {
    if (vocabulary.kinds[id] != TokenKind::kText) continue;
    std::optional<std::string> bytes = ToBytes(vocabulary.bytes[id], inverse);
    if (!bytes.has_value()) continue;  // written in plain text; nothing can make it, but it decodes
    vocabulary.bytes[id] = *std::move(bytes);
    if (parts.ignore_merges && !vocabulary.bytes[id].empty()) {
      rules.whole.emplace(vocabulary.bytes[id], static_cast<int32_t>(id));
    }
  }
  return std::make_unique<ByteLevelBpe>(std::move(vocabulary), std::move(rules), parts.splits);
}

}  // namespace entropyserve
