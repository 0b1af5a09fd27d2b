#include "engine/text/sentencepiece.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/bpe.h"
#include "engine/text/byte_trie.h"
#include "engine/text/sentencepiece_normalizer.h"
#include "engine/text/utf8.h"

namespace entropyserve {
namespace {

using Algorithm = SentencePieceModel::Algorithm;

struct Rules {
  Algorithm algorithm = Algorithm::kBpe;
  SentencePieceNormalizer normalizer;
  bool prefix_first_only = false;
  bool fuse_unknown = true;
  bool byte_fallback = false;
  int32_t unk_id = -1;
  std::array<int32_t, 256> byte_ids = {};
  ByteTrie user_defined;  // found in text before anything merges

  // BPE. Characters that are part of pieces but no piece themselves have ids from the vocabulary's
  // size on; their texts are in `letters`.
  PairTable pairs;
  TextMap<std::string, int32_t> characters;
  std::vector<std::string> letters;
  // No piece has a space mark behind another character, so words merge on their own.
  bool words_are_separate = true;

  // Unigram.
  ByteTrie pieces;
  std::vector<float> scores;  // by id
  float max_score = 0;
  float unk_score = 0;
};

// Collects ids; unknown text becomes byte tokens or the unknown token.
class Output {
 public:
  Output(const Rules& rules, std::vector<int32_t>* ids) : rules_(rules), ids_(*ids) {}

  void Known(int32_t id) {
    ids_.push_back(id);
    after_unknown_ = false;
  }
  void Unknown(std::string_view text) {
    if (rules_.byte_fallback) {
      for (const char c : text) ids_.push_back(rules_.byte_ids[static_cast<uint8_t>(c)]);
    } else if (!after_unknown_ || !rules_.fuse_unknown) {
      ids_.push_back(rules_.unk_id);
    }
    after_unknown_ = !rules_.byte_fallback;
  }

 private:
  const Rules& rules_;
  std::vector<int32_t>& ids_;
  bool after_unknown_ = false;
};

class SentencePieceTokenizer final : public Tokenizer {
 public:
  SentencePieceTokenizer(Vocabulary vocabulary, Rules rules)
      : Tokenizer(std::move(vocabulary)), rules_(std::move(rules)) {}

 private:
  absl::Status EncodeText(std::string_view text, bool first, WorkMeter* meter,
                          std::vector<int32_t>* ids) const override {
    const std::string normalized =
        rules_.normalizer.Normalize(text, rules_.user_defined, first || !rules_.prefix_first_only);
    Output output(rules_, ids);
    return rules_.algorithm == Algorithm::kUnigram ? EncodeUnigram(normalized, meter, &output)
                                                   : EncodeBpe(normalized, meter, &output);
  }

  absl::Status EncodeBpe(std::string_view text, WorkMeter* meter, Output* output) const;
  absl::Status EncodeWord(std::string_view word, BpeMerger* merger, WordCache* cache,
                          Output* output) const;
  absl::Status EncodeUnigram(std::string_view text, WorkMeter* meter, Output* output) const;

  const Rules rules_;
};

// Cuts the text where nothing can merge across: at user-defined pieces, at characters that no piece
// has, and, where the vocabulary allows it, before words.
absl::Status SentencePieceTokenizer::EncodeBpe(std::string_view text, WorkMeter* meter,
                                               Output* output) const {
  BpeMerger merger(rules_.pairs, meter);
  WordCache cache;
  size_t begin = 0;
  const auto flush = [&](size_t end) -> absl::Status {
    if (end > begin) {
      RETURN_IF_ERROR(EncodeWord(text.substr(begin, end - begin), &merger, &cache, output));
    }
    begin = end;
    return absl::OkStatus();
  };
  bool after_mark = true;
  for (size_t pos = 0; pos < text.size();) {
    const std::string_view rest = text.substr(pos);
    if (const ByteTrie::Match kept = rules_.user_defined.Longest(rest); kept.length > 0) {
      RETURN_IF_ERROR(flush(pos));
      output->Known(kept.value);
      begin = pos += kept.length;
      after_mark = true;
      continue;
    }
    const size_t length = NextUtf8(rest).length;
    RETURN_IF_ERROR(meter->Add(length));
    const std::string_view character = rest.substr(0, length);
    if (!rules_.characters.contains(character)) {
      RETURN_IF_ERROR(flush(pos));
      output->Unknown(character);
      begin = pos += length;
      after_mark = true;
      continue;
    }
    const bool mark = character == kSpaceMark;
    if (mark && !after_mark && rules_.words_are_separate) RETURN_IF_ERROR(flush(pos));
    after_mark = mark;
    pos += length;
  }
  return flush(text.size());
}

absl::Status SentencePieceTokenizer::EncodeWord(std::string_view word, BpeMerger* merger,
                                                WordCache* cache, Output* output) const {
  const auto emit = [&](std::span<const int32_t> merged) {
    for (const int32_t id : merged) {
      if (id < vocab_size()) {
        output->Known(id);
      } else {
        output->Unknown(rules_.letters[id - vocab_size()]);
      }
    }
    return absl::OkStatus();
  };
  if (const auto known = cache->Find(word); known.has_value()) return emit(*known);
  std::vector<int32_t> symbols;
  symbols.reserve(word.size());
  for (size_t pos = 0; pos < word.size();) {
    const size_t length = NextUtf8(word.substr(pos)).length;
    symbols.push_back(rules_.characters.find(word.substr(pos, length))->second);
    pos += length;
  }
  ASSIGN_OR_RETURN(const std::span<const int32_t> merged, merger->Merge(symbols));
  cache->Add(word, merged);
  return emit(merged);
}

// Viterbi's algorithm over bytes: the best way to reach every position. Scores are added up in
// float and compared in double, as the library does, so that near ties fall the same way.
absl::Status SentencePieceTokenizer::EncodeUnigram(std::string_view text, WorkMeter* meter,
                                                   Output* output) const {
  struct Arrival {
    float score = 0;
    int32_t id = -1;
    int64_t from = -1;  // -1: not reached
  };
  std::vector<Arrival> best(text.size() + 1);
  for (size_t pos = 0; pos < text.size();) {
    const float score_here = best[pos].score;
    const size_t character = NextUtf8(text.substr(pos)).length;
    RETURN_IF_ERROR(meter->Add(character));
    bool has_character = false;
    const auto arrive = [&](size_t length, int32_t id, float score) {
      Arrival& arrival = best[pos + length];
      const float candidate = score + score_here;
      if (arrival.from >= 0 && candidate <= arrival.score) return;
      arrival = {candidate, id, static_cast<int64_t>(pos)};
    };
    rules_.pieces.ForEachPrefix(text.substr(pos), [&](size_t length, int32_t id) {
      // A user-defined piece always wins: it counts as its length in best pieces.
      const float score = vocabulary().kinds[id] == TokenKind::kText
                              ? rules_.scores[id]
                              : static_cast<float>(length) * rules_.max_score - 0.1f;
      arrive(length, id, score);
      has_character |= length == character;
    });
    if (!has_character) arrive(character, -1, rules_.unk_score);
    pos += character;
  }
  std::vector<size_t> cuts;
  for (size_t end = text.size(); end > 0; end = static_cast<size_t>(best[end].from))
    cuts.push_back(end);
  size_t begin = 0;
  for (auto end = cuts.rbegin(); end != cuts.rend(); ++end) {
    if (best[*end].id >= 0) {
      output->Known(best[*end].id);
    } else {
      output->Unknown(text.substr(begin, *end - begin));
    }
    begin = *end;
  }
  return absl::OkStatus();
}

// "<0x41>" as 0x41; -1 for anything else.
int ByteOfPiece(std::string_view name) {
  if (name.size() != 6 || !name.starts_with("<0x") || name[5] != '>') return -1;
  int byte = 0;
  for (const char c : name.substr(3, 2)) {
    const int digit = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                                             : -1;
    if (digit < 0) return -1;
    byte = byte * 16 + digit;
  }
  return byte;
}

std::string WithSpaces(std::string_view piece) {
  std::string out;
  for (size_t pos = 0; pos < piece.size();) {
    if (piece.substr(pos).starts_with(kSpaceMark)) {
      out.push_back(' ');
      pos += kSpaceMark.size();
    } else {
      out.push_back(piece[pos++]);
    }
  }
  return out;
}

// Takes names and types of the pieces into the vocabulary, and byte pieces into the rules.
absl::Status FillVocabulary(const SentencePieceParts& parts, Vocabulary* vocabulary, Rules* rules) {
  const std::vector<SentencePieceModel::Piece>& pieces = parts.model.pieces;
  std::vector<TokenKind> told = std::move(vocabulary->kinds);
  told.resize(pieces.size(), TokenKind::kText);
  rules->byte_ids.fill(-1);
  vocabulary->bytes.clear();
  vocabulary->kinds.clear();
  for (size_t id = 0; id < pieces.size(); ++id) {
    const SentencePieceModel::Piece& piece = pieces[id];
    TokenKind kind = told[id];
    std::string bytes = WithSpaces(piece.text);
    if (piece.type == PieceType::kControl || piece.type == PieceType::kUnknown) {
      kind = TokenKind::kControl;
    } else if (piece.type == PieceType::kUserDefined && kind == TokenKind::kText) {
      kind = TokenKind::kUserDefined;
    } else if (piece.type == PieceType::kByte && kind == TokenKind::kText) {
      const int byte = ByteOfPiece(piece.text);
      if (byte < 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(parts.source, ": piece ", id, " is of type byte, but not named <0xNN>"));
      }
      rules->byte_ids[byte] = static_cast<int32_t>(id);
      bytes.assign(1, static_cast<char>(byte));
    }
    if (kind != TokenKind::kText) bytes = piece.text;
    vocabulary->bytes.push_back(std::move(bytes));
    vocabulary->kinds.push_back(kind);
  }
  return absl::OkStatus();
}

bool IsMergeable(const SentencePieceParts& parts, const Vocabulary& vocabulary, size_t id) {
  return vocabulary.kinds[id] == TokenKind::kText &&
         parts.model.pieces[id].type == PieceType::kNormal && !parts.model.pieces[id].text.empty();
}

bool HasMarkInside(std::string_view piece) {
  bool other = false;
  for (size_t pos = 0; pos < piece.size();) {
    const size_t length = NextUtf8(piece.substr(pos)).length;
    const bool mark = piece.substr(pos, length) == kSpaceMark;
    if (mark && other) return true;
    other |= !mark;
    pos += length;
  }
  return false;
}

using Names = TextMap<std::string_view, int32_t>;

// Characters of all pieces get ids, whether they are pieces or not; merging by score may pass
// through a character that the vocabulary lacks on its own.
void FillCharacters(const SentencePieceParts& parts, const Vocabulary& vocabulary,
                    const Names& names, Rules* rules) {
  for (size_t id = 0; id < vocabulary.bytes.size(); ++id) {
    if (!IsMergeable(parts, vocabulary, id)) continue;
    const std::string_view piece = parts.model.pieces[id].text;
    rules->words_are_separate &= !HasMarkInside(piece);
    for (size_t pos = 0; pos < piece.size();) {
      const size_t length = NextUtf8(piece.substr(pos)).length;
      const std::string_view character = piece.substr(pos, length);
      pos += length;
      if (rules->characters.contains(character)) continue;
      const auto own = names.find(character);
      if (own != names.end()) {
        rules->characters.emplace(character, own->second);
      } else if (!parts.merges_by_rank) {
        rules->characters.emplace(
            character, static_cast<int32_t>(vocabulary.bytes.size() + rules->letters.size()));
        rules->letters.emplace_back(character);
      }
    }
  }
}

// Every way to make a piece of two others is a merge whose rank is the piece's place by score.
void AddMergesByScore(const SentencePieceParts& parts, const Vocabulary& vocabulary,
                      const Names& names, Rules* rules) {
  const std::vector<SentencePieceModel::Piece>& pieces = parts.model.pieces;
  std::vector<float> scores;
  for (const SentencePieceModel::Piece& piece : pieces) scores.push_back(piece.score);
  std::sort(scores.begin(), scores.end(), std::greater<>());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  const auto id_of = [&](std::string_view part) {
    if (const auto name = names.find(part); name != names.end()) return name->second;
    const auto letter = rules->characters.find(part);
    return letter == rules->characters.end() ? -1 : letter->second;
  };
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (!IsMergeable(parts, vocabulary, id)) continue;
    const std::string_view piece = pieces[id].text;
    const auto place =
        std::lower_bound(scores.begin(), scores.end(), pieces[id].score, std::greater<>());
    const int32_t rank = static_cast<int32_t>(place - scores.begin());
    for (size_t cut = NextUtf8(piece).length; cut < piece.size();
         cut += NextUtf8(piece.substr(cut)).length) {
      const int32_t left = id_of(piece.substr(0, cut));
      const int32_t right = left < 0 ? -1 : id_of(piece.substr(cut));
      if (right >= 0) rules->pairs.Add(left, right, {rank, static_cast<int32_t>(id)});
    }
  }
}

absl::Status AddMergesByRank(const SentencePieceParts& parts, const Names& names, Rules* rules) {
  for (size_t rank = 0; rank < parts.merges.size(); ++rank) {
    const auto& [left, right] = parts.merges[rank];
    const auto l = names.find(left);
    const auto r = names.find(right);
    const auto made = names.find(left + right);
    if (l == names.end() || r == names.end() || made == names.end()) {
      return absl::InvalidArgumentError(absl::StrCat(
          parts.source, ": merges[", rank, "] names or makes a token that the vocabulary lacks"));
    }
    rules->pairs.Add(l->second, r->second, {static_cast<int32_t>(rank), made->second});
  }
  return absl::OkStatus();
}

absl::Status FillBpe(const SentencePieceParts& parts, const Vocabulary& vocabulary, Rules* rules) {
  Names names;
  for (size_t id = 0; id < vocabulary.bytes.size(); ++id) {
    if (parts.model.pieces[id].type == PieceType::kUnused && parts.source == "tokenizer.model") {
      return absl::UnimplementedError(absl::StrCat(
          "tokenizer.model: unused pieces in a BPE model are not supported (piece ", id, ")"));
    }
    if (IsMergeable(parts, vocabulary, id)) {
      names.emplace(parts.model.pieces[id].text, static_cast<int32_t>(id));
    }
  }
  FillCharacters(parts, vocabulary, names, rules);
  if (parts.merges_by_rank) return AddMergesByRank(parts, names, rules);
  AddMergesByScore(parts, vocabulary, names, rules);
  return absl::OkStatus();
}

void FillUnigram(const SentencePieceParts& parts, const Vocabulary& vocabulary, Rules* rules) {
  // The library's penalty for a character that no piece covers, below the worst piece.
  constexpr float kUnknownPenalty = 10.0f;
  float min_score = std::numeric_limits<float>::max();
  rules->max_score = std::numeric_limits<float>::lowest();
  for (size_t id = 0; id < vocabulary.bytes.size(); ++id) {
    const SentencePieceModel::Piece& piece = parts.model.pieces[id];
    rules->scores.push_back(piece.score);
    if (piece.type == PieceType::kNormal) {
      min_score = std::min(min_score, piece.score);
      rules->max_score = std::max(rules->max_score, piece.score);
    }
    if (IsMergeable(parts, vocabulary, id) || vocabulary.kinds[id] == TokenKind::kUserDefined) {
      rules->pieces.Insert(piece.text, static_cast<int32_t>(id));
    }
  }
  rules->unk_score = min_score - kUnknownPenalty;
}

absl::Status CheckIds(const SentencePieceParts& parts, Rules* rules) {
  const std::vector<SentencePieceModel::Piece>& pieces = parts.model.pieces;
  for (size_t id = 0; id < pieces.size(); ++id) {
    if (!std::isfinite(pieces[id].score)) {
      return absl::InvalidArgumentError(
          absl::StrCat(parts.source, ": the score of piece ", id, " is not finite"));
    }
  }
  const bool all_bytes = std::count(rules->byte_ids.begin(), rules->byte_ids.end(), -1) == 0;
  if (parts.model.byte_fallback && !all_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(parts.source, ": byte_fallback without all 256 byte pieces"));
  }
  rules->byte_fallback = parts.model.byte_fallback;
  rules->unk_id = parts.model.unk_id;
  const bool has_unknown = rules->unk_id >= 0 && static_cast<size_t>(rules->unk_id) < pieces.size();
  if (!rules->byte_fallback && !has_unknown) {
    return absl::InvalidArgumentError(absl::StrCat(
        parts.source, ": neither byte fallback nor an unknown token (unk_id ", rules->unk_id, ")"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeSentencePiece(SentencePieceParts parts) {
  Rules rules;
  rules.algorithm = parts.model.algorithm;
  rules.prefix_first_only = parts.prefix_first_only;
  rules.fuse_unknown = parts.fuse_unknown;
  ASSIGN_OR_RETURN(rules.normalizer.charsmap, CharsMap::Parse(parts.model.charsmap));
  rules.normalizer.add_dummy_prefix = parts.model.add_dummy_prefix;
  rules.normalizer.remove_extra_whitespaces = parts.model.remove_extra_whitespaces;
  rules.normalizer.escape_whitespaces = parts.model.escape_whitespaces;

  Vocabulary vocabulary = std::move(parts.vocabulary);
  RETURN_IF_ERROR(FillVocabulary(parts, &vocabulary, &rules));
  vocabulary.strips_leading_space = parts.model.add_dummy_prefix;
  RETURN_IF_ERROR(CheckIds(parts, &rules));
  for (size_t id = 0; id < vocabulary.bytes.size(); ++id) {
    if (vocabulary.kinds[id] == TokenKind::kUserDefined && !vocabulary.splits_user_defined &&
        IsValidUtf8(parts.model.pieces[id].text)) {
      rules.user_defined.Insert(parts.model.pieces[id].text, static_cast<int32_t>(id));
    }
  }
  if (rules.algorithm == Algorithm::kUnigram) {
    FillUnigram(parts, vocabulary, &rules);
  } else {
    RETURN_IF_ERROR(FillBpe(parts, vocabulary, &rules));
  }
  return std::make_unique<SentencePieceTokenizer>(std::move(vocabulary), std::move(rules));
}

}  // namespace entropyserve
