// tokenizer.model with its side files, and the tokenizer.ggml metadata of a GGUF file.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/byte_level_bpe.h"
#include "engine/text/sentencepiece.h"
#include "engine/text/tokenizer_files.h"

namespace entropyserve {
namespace {

constexpr char kModelFile[] = "tokenizer.model";
constexpr char kGguf[] = "tokenizer.ggml";

absl::Status CheckPieces(const SentencePieceModel& model) {
  if (model.pieces.size() > static_cast<size_t>(kMaxVocabularySize)) {
    return absl::InvalidArgumentError(absl::StrCat(kModelFile, ": too many pieces"));
  }
  for (size_t id = 0; id < model.pieces.size(); ++id) {
    if (model.pieces[id].text.size() > kMaxTokenBytes) {
      return absl::InvalidArgumentError(absl::StrCat(kModelFile, ": piece ", id, " is too long"));
    }
  }
  return absl::OkStatus();
}

// Tokens that tokenizer_config.json declares: a special one is a control token whatever its piece,
// and ids beyond the file's pieces are new ones.
absl::Status AddDeclared(const SideInfo& info, SentencePieceModel* model,
                         std::vector<TokenKind>* kinds) {
  kinds->assign(model->pieces.size(), TokenKind::kText);
  for (const SideInfo::AddedToken& token : info.added) {
    const size_t id = static_cast<size_t>(token.id);
    if (id >= model->pieces.size()) {
      model->pieces.resize(id + 1, {"", 0.0f, PieceType::kUserDefined});
      kinds->resize(id + 1, TokenKind::kText);
      model->pieces[id].text = token.content;
    } else if (model->pieces[id].text != token.content) {
      return absl::InvalidArgumentError(
          absl::StrCat("tokenizer_config.json: added_tokens_decoder and ", kModelFile,
                       " disagree about id ", id));
    }
    if (token.special) (*kinds)[id] = TokenKind::kControl;
  }
  return absl::OkStatus();
}

std::vector<std::string> NamesOf(const SentencePieceModel& model) {
  std::vector<std::string> names;
  for (const SentencePieceModel::Piece& piece : model.pieces) names.push_back(piece.text);
  return names;
}

absl::Status CheckGguf(const GgufTokenizerData& data) {
  const auto invalid = [](const std::string& what) {
    return absl::InvalidArgumentError(absl::StrCat(kGguf, ".", what));
  };
  const size_t count = data.tokens.size();
  if (count == 0 || count > static_cast<size_t>(kMaxVocabularySize)) {
    return invalid(absl::StrCat("tokens: ", count, " tokens, from 1 to ", kMaxVocabularySize));
  }
  for (size_t id = 0; id < count; ++id) {
    if (data.tokens[id].size() > kMaxTokenBytes) {
      return invalid(absl::StrCat("tokens: token ", id, " is too long"));
    }
  }
  if (!data.types.empty() && data.types.size() != count) {
    return invalid(
        absl::StrCat("token_type: ", data.types.size(), " entries for ", count, " tokens"));
  }
  if (std::any_of(data.types.begin(), data.types.end(), [](int32_t t) { return t < 0 || t > 6; })) {
    return invalid("token_type: an entry is not from 0 to 6");
  }
  const std::pair<const char*, int32_t> ids[] = {{"bos_token_id", data.bos_id},
                                                 {"eos_token_id", data.eos_id},
                                                 {"eot_token_id", data.eot_id},
                                                 {"unknown_token_id", data.unk_id}};
  for (const auto& [key, id] : ids) {
    if (id < -1 || (id >= 0 && static_cast<size_t>(id) >= count)) {
      return invalid(
          absl::StrCat(key, ": ", id, " is not in the vocabulary of ", count, " tokens"));
    }
  }
  return absl::OkStatus();
}

Vocabulary GgufVocabulary(const GgufTokenizerData& data, bool add_bos) {
  Vocabulary vocabulary;
  if (data.bos_id >= 0) vocabulary.bos_id = data.bos_id;
  if (data.eos_id >= 0) vocabulary.eos_ids.push_back(data.eos_id);
  if (data.eot_id >= 0) vocabulary.eos_ids.push_back(data.eot_id);
  vocabulary.add_bos = data.add_bos.value_or(add_bos);
  vocabulary.kinds.resize(data.tokens.size(), TokenKind::kText);
  if (data.types.empty()) {  // old files: nothing else says which tokens are control tokens
    for (const int32_t id : {data.bos_id, data.eos_id, data.eot_id, data.unk_id}) {
      if (id >= 0) vocabulary.kinds[id] = TokenKind::kControl;
    }
  }
  for (size_t id = 0; id < data.types.size(); ++id) {
    const auto type = static_cast<PieceType>(data.types[id]);
    if (type == PieceType::kControl || type == PieceType::kUnknown) {
      vocabulary.kinds[id] = TokenKind::kControl;
    } else if (type == PieceType::kUserDefined) {
      vocabulary.kinds[id] = TokenKind::kUserDefined;
    }
  }
  return vocabulary;
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeGgufByteLevel(GgufTokenizerData data) {
  ByteLevelParts parts;
  parts.source = kGguf;
  bool add_bos = false;
  if (data.pre == "llama-bpe" || data.pre == "llama3" || data.pre == "llama-v3") {
    parts.splits = {SplitPattern::kLlama3};
    parts.ignore_merges = true;
    add_bos = true;
  } else if (data.pre == "qwen2") {
    parts.splits = {SplitPattern::kQwen2};
    parts.nfc = true;  // as in the family's own tokenizer.json
  } else if (data.pre == "smollm") {
    parts.splits = {SplitPattern::kSingleDigit, SplitPattern::kGpt2};
  } else if (data.pre == "gpt-2") {
    parts.splits = {SplitPattern::kGpt2};
  } else {
    return absl::UnimplementedError(
        absl::StrCat(kGguf, ".pre: \"", data.pre,
                     "\" is not supported; supported are llama-bpe, qwen2, smollm and gpt-2"));
  }
  parts.merges.reserve(data.merges.size());
  for (const std::string& merge : data.merges) {
    const size_t space = merge.find(' ', 1);
    if (space == std::string::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat(kGguf, ".merges: entry ", parts.merges.size(), " is not two tokens"));
    }
    parts.merges.emplace_back(merge.substr(0, space), merge.substr(space + 1));
  }
  parts.vocabulary = GgufVocabulary(data, add_bos);
  SideInfo info;
  info.chat_template = std::move(data.chat_template);
  RETURN_IF_ERROR(FinishVocabulary(data.tokens, info, &parts.vocabulary));
  parts.vocabulary.bytes = std::move(data.tokens);
  return MakeByteLevelBpe(std::move(parts));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeGgufSentencePiece(GgufTokenizerData data) {
  if (data.scores.size() != data.tokens.size()) {
    return absl::InvalidArgumentError(absl::StrCat(kGguf, ".scores: ", data.scores.size(),
                                                   " entries for ", data.tokens.size(), " tokens"));
  }
  SentencePieceParts parts;
  parts.source = kGguf;
  parts.vocabulary = GgufVocabulary(data, /*add_bos=*/true);
  parts.vocabulary.splits_user_defined = false;
  SideInfo info;
  info.chat_template = std::move(data.chat_template);
  RETURN_IF_ERROR(FinishVocabulary(data.tokens, info, &parts.vocabulary));
  SentencePieceModel& model = parts.model;
  model.algorithm = SentencePieceModel::Algorithm::kBpe;
  model.unk_id = data.unk_id;
  model.add_dummy_prefix = data.add_space_prefix.value_or(true);
  model.remove_extra_whitespaces = false;
  for (size_t id = 0; id < data.tokens.size(); ++id) {
    // Type 0, "undefined", is what converters give to tokens added beside the SentencePiece file.
    const int32_t type = data.types.empty() || data.types[id] == 0 ? 1 : data.types[id];
    model.byte_fallback |= type == static_cast<int32_t>(PieceType::kByte);
    model.pieces.push_back(
        {std::move(data.tokens[id]), data.scores[id], static_cast<PieceType>(type)});
  }
  return MakeSentencePiece(std::move(parts));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseSentencePiece(std::string_view bytes,
                                                              const TokenizerSideFiles& side) {
  if (bytes.size() > kMaxTokenizerFileBytes) {
    return absl::InvalidArgumentError(absl::StrCat(kModelFile, ": the file is too large"));
  }
  SentencePieceParts parts;
  parts.source = kModelFile;
  ASSIGN_OR_RETURN(parts.model, ParseSentencePieceModel(bytes));
  RETURN_IF_ERROR(CheckPieces(parts.model));
  ASSIGN_OR_RETURN(const SideInfo info, ParseSideFiles(side));
  RETURN_IF_ERROR(AddDeclared(info, &parts.model, &parts.vocabulary.kinds));
  const SentencePieceModel& model = parts.model;
  const auto in_range = [&](int32_t id) {
    return id >= 0 && static_cast<size_t>(id) < model.pieces.size();
  };
  if (in_range(model.bos_id)) parts.vocabulary.bos_id = model.bos_id;
  if (in_range(model.eos_id)) parts.vocabulary.eos_ids.push_back(model.eos_id);
  parts.vocabulary.add_bos = true;  // the habit of every family that ships this file
  parts.vocabulary.splits_user_defined = false;
  RETURN_IF_ERROR(FinishVocabulary(NamesOf(model), info, &parts.vocabulary));
  return MakeSentencePiece(std::move(parts));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeGgufTokenizer(GgufTokenizerData data) {
  RETURN_IF_ERROR(CheckGguf(data));
  if (data.model == "gpt2") return MakeGgufByteLevel(std::move(data));
  if (data.model == "llama") return MakeGgufSentencePiece(std::move(data));
  return absl::UnimplementedError(absl::StrCat(
      kGguf, ".model: \"", data.model, "\" is not supported; supported are gpt2 and llama"));
}

}  // namespace entropyserve
