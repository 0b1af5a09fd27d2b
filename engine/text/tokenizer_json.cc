// tokenizer.json: the file of the `tokenizers` library. A component either is supported exactly or
// refused by name.
#include <algorithm>
#include <optional>
#include <utility>

#include "engine/base/status_macros.h"
#include "engine/text/bpe.h"
#include "engine/text/byte_level_bpe.h"
#include "engine/text/json_reader.h"
#include "engine/text/sentencepiece.h"
#include "engine/text/sentencepiece_normalizer.h"
#include "engine/text/tokenizer_files.h"

namespace entropyserve {
namespace {

constexpr std::string_view kFile = "tokenizer.json";

absl::Status Unsupported(std::string_view field, std::string_view what) {
  return absl::UnimplementedError(absl::StrCat(std::string(kFile), ": ", std::string(field), " ",
                                               std::string(what), " is not supported"));
}

absl::Status Invalid(std::string_view field, std::string_view what) {
  return JsonError(kFile, field, what);
}

// What the components besides the model say.
struct Pipeline {
  bool byte_level = false;
  bool nfc = false;
  std::vector<SplitPattern> splits;
  // A SentencePiece vocabulary: spaces become U+2581, and one is put in front.
  bool marks_spaces = false;
  bool prefix = false;
  bool prefix_first_only = false;
  std::string bos;  // what the post-processor puts first
};

// A component as a list: itself, or the parts of a Sequence (one level, as every real file has it).
absl::StatusOr<std::vector<const Json*>> PartsOf(const Json& root, const char* field,
                                                 const char* list) {
  std::vector<const Json*> parts;
  const Json* component = FieldOf(root, field);
  if (component == nullptr) return parts;
  if (StringOf(*component, "type") != "Sequence") {
    parts.push_back(component);
    return parts;
  }
  const Json* items = FieldOf(*component, list);
  if (items == nullptr || !items->is_array() || items->size() > 16) {
    return Invalid(field, "is a Sequence without a list of at most 16 parts");
  }
  for (const Json& item : *items) parts.push_back(&item);
  return parts;
}

absl::Status ReadNormalizer(const Json& root, Pipeline* pipeline) {
  ASSIGN_OR_RETURN(const auto parts, PartsOf(root, "normalizer", "normalizers"));
  for (const Json* part : parts) {
    const std::string type = StringOf(*part, "type");
    const Json* pattern = FieldOf(*part, "pattern");
    if (type == "NFC") {
      pipeline->nfc = true;
    } else if (type == "Prepend" && StringOf(*part, "prepend") == kSpaceMark) {
      pipeline->prefix = true;
    } else if (type == "Replace" && pattern != nullptr && StringOf(*pattern, "String") == " " &&
               StringOf(*part, "content") == kSpaceMark) {
      pipeline->marks_spaces = true;
    } else {
      return Unsupported("normalizer", type);
    }
  }
  return absl::OkStatus();
}

absl::Status ReadSplit(const Json& part, Pipeline* pipeline) {
  const Json* pattern = FieldOf(part, "pattern");
  const std::optional<SplitPattern> known =
      pattern == nullptr ? std::nullopt : FindSplitPattern(StringOf(*pattern, "Regex"));
  if (!known.has_value()) {
    return Unsupported("pre_tokenizer", "Split with a pattern that no known model family uses");
  }
  if (StringOf(part, "behavior") != "Isolated" || BoolOf(part, "invert", false)) {
    return Unsupported("pre_tokenizer", "Split with a behavior other than Isolated, or inverted,");
  }
  pipeline->splits.push_back(*known);
  return absl::OkStatus();
}

absl::Status ReadMetaspace(const Json& part, Pipeline* pipeline) {
  const std::string scheme = StringOf(part, "prepend_scheme");
  if (StringOf(part, "replacement") != kSpaceMark || BoolOf(part, "split", true)) {
    return Unsupported("pre_tokenizer", "Metaspace that splits, or with another mark,");
  }
  if (!scheme.empty() && scheme != "always" && scheme != "first" && scheme != "never") {
    return Unsupported("pre_tokenizer", "Metaspace with prepend_scheme " + scheme);
  }
  pipeline->marks_spaces = true;
  pipeline->prefix = scheme != "never" && BoolOf(part, "add_prefix_space", true);
  pipeline->prefix_first_only = scheme == "first";
  return absl::OkStatus();
}

absl::Status ReadPreTokenizer(const Json& root, Pipeline* pipeline) {
  ASSIGN_OR_RETURN(const auto parts, PartsOf(root, "pre_tokenizer", "pretokenizers"));
  for (const Json* part : parts) {
    const std::string type = StringOf(*part, "type");
    if (pipeline->byte_level) {
      return Unsupported("pre_tokenizer", "a component after ByteLevel (" + type + ")");
    }
    if (type == "Split") {
      RETURN_IF_ERROR(ReadSplit(*part, pipeline));
    } else if (type == "Digits") {
      pipeline->splits.push_back(BoolOf(*part, "individual_digits", false)
                                     ? SplitPattern::kSingleDigit
                                     : SplitPattern::kDigitRun);
    } else if (type == "ByteLevel") {
      if (BoolOf(*part, "add_prefix_space", true)) {
        return Unsupported("pre_tokenizer", "ByteLevel with add_prefix_space");
      }
      if (BoolOf(*part, "use_regex", true)) pipeline->splits.push_back(SplitPattern::kGpt2);
      pipeline->byte_level = true;
    } else if (type == "Metaspace" && parts.size() == 1) {
      RETURN_IF_ERROR(ReadMetaspace(*part, pipeline));
    } else {
      return Unsupported("pre_tokenizer", type);
    }
  }
  return absl::OkStatus();
}

// TemplateProcessing may put one special token before the text and nothing after it.
absl::Status ReadTemplate(const Json& part, Pipeline* pipeline) {
  const Json* single = FieldOf(part, "single");
  if (single == nullptr || !single->is_array()) {
    return Invalid("post_processor", "is a TemplateProcessing without a list `single`");
  }
  bool text_seen = false;
  for (const Json& item : *single) {
    if (FieldOf(item, "Sequence") != nullptr && !text_seen) {
      text_seen = true;
    } else if (const Json* special = FieldOf(item, "SpecialToken");
               special != nullptr && !text_seen && pipeline->bos.empty()) {
      pipeline->bos = StringOf(*special, "id");
    } else {
      return Unsupported("post_processor", "a template other than one token before the text");
    }
  }
  return absl::OkStatus();
}

absl::Status ReadPostProcessor(const Json& root, Pipeline* pipeline) {
  ASSIGN_OR_RETURN(const auto parts, PartsOf(root, "post_processor", "processors"));
  for (const Json* part : parts) {
    const std::string type = StringOf(*part, "type");
    if (type == "TemplateProcessing") {
      RETURN_IF_ERROR(ReadTemplate(*part, pipeline));
    } else if (type != "ByteLevel") {  // ByteLevel here only moves offsets
      return Unsupported("post_processor", type);
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Pipeline> ReadPipeline(const Json& root) {
  Pipeline pipeline;
  RETURN_IF_ERROR(ReadNormalizer(root, &pipeline));
  RETURN_IF_ERROR(ReadPreTokenizer(root, &pipeline));
  RETURN_IF_ERROR(ReadPostProcessor(root, &pipeline));
  if (pipeline.byte_level && (pipeline.marks_spaces || pipeline.prefix)) {
    return Unsupported("normalizer", "a space mark together with ByteLevel");
  }
  if (!pipeline.byte_level && !pipeline.marks_spaces) {
    return Unsupported("pre_tokenizer",
                       "a vocabulary that is neither ByteLevel nor SentencePiece's");
  }
  if (!pipeline.byte_level && (pipeline.nfc || !pipeline.splits.empty())) {
    return Unsupported("normalizer", "NFC or splitting with a SentencePiece vocabulary");
  }
  return pipeline;
}

struct Words {
  std::vector<std::string> names;  // by id
  std::vector<TokenKind> kinds;
};

absl::Status AddVocab(const Json& model, Words* words) {
  const Json* vocab = FieldOf(model, "vocab");
  if (vocab == nullptr || !vocab->is_object() || vocab->empty()) {
    return Invalid("model.vocab", "is missing, empty or not an object");
  }
  for (const auto& [name, value] : vocab->items()) {
    const std::optional<int32_t> id = IdOf(value, kMaxVocabularySize);
    if (!id.has_value())
      return Invalid("model.vocab", "has an id that is not in the allowed range");
    if (name.empty() || name.size() > kMaxTokenBytes) {
      return Invalid("model.vocab", "has an empty or too long token");
    }
    if (static_cast<size_t>(*id) >= words->names.size()) words->names.resize(*id + 1);
    if (!words->names[*id].empty()) {
      return Invalid("model.vocab", absl::StrCat("gives id ", *id, " to two tokens"));
    }
    words->names[*id] = name;
  }
  words->kinds.resize(words->names.size(), TokenKind::kText);
  return absl::OkStatus();
}

absl::Status AddAddedTokens(const Json& root, Words* words) {
  const Json* added = FieldOf(root, "added_tokens");
  if (added == nullptr) return absl::OkStatus();
  if (!added->is_array()) return Invalid("added_tokens", "is not a list");
  TextMap<std::string, int32_t> ids;
  for (size_t id = 0; id < words->names.size(); ++id) {
    ids.emplace(words->names[id], static_cast<int32_t>(id));
  }
  for (const Json& token : *added) {
    const std::string content = StringOf(token, "content");
    const Json* id_field = FieldOf(token, "id");
    const std::optional<int32_t> id =
        id_field == nullptr ? std::nullopt : IdOf(*id_field, kMaxVocabularySize);
    if (!id.has_value() || content.empty() || content.size() > kMaxTokenBytes) {
      return Invalid("added_tokens", "has an entry without a valid id and content");
    }
    for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
      if (BoolOf(token, flag, false)) {
        return Unsupported("added_tokens", absl::StrCat(flag, " (token ", *id, ")"));
      }
    }
    if (static_cast<size_t>(*id) >= words->names.size()) {
      words->names.resize(*id + 1);
      words->kinds.resize(*id + 1, TokenKind::kText);
    }
    const auto known = ids.emplace(content, *id).first;
    if (known->second != *id || (!words->names[*id].empty() && words->names[*id] != content)) {
      return Invalid("added_tokens", absl::StrCat("and the vocabulary disagree about id ", *id));
    }
    words->names[*id] = content;
    words->kinds[*id] =
        BoolOf(token, "special", false) ? TokenKind::kControl : TokenKind::kUserDefined;
  }
  return absl::OkStatus();
}

// "left right", or ["left", "right"] in newer files.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> ReadMerges(const Json& model) {
  std::vector<std::pair<std::string, std::string>> merges;
  const Json* list = FieldOf(model, "merges");
  if (list == nullptr || !list->is_array())
    return Invalid("model.merges", "is missing or not a list");
  merges.reserve(list->size());
  for (const Json& merge : *list) {
    if (merge.is_array() && merge.size() == 2 && merge[0].is_string() && merge[1].is_string()) {
      merges.emplace_back(merge[0].get<std::string>(), merge[1].get<std::string>());
    } else if (merge.is_string()) {
      const std::string text = merge.get<std::string>();
      const size_t space = text.find(' ');
      if (space == std::string::npos) {
        return Invalid("model.merges", absl::StrCat("entry ", merges.size(), " is not two tokens"));
      }
      merges.emplace_back(text.substr(0, space), text.substr(space + 1));
    } else {
      return Invalid("model.merges", absl::StrCat("entry ", merges.size(), " is not two tokens"));
    }
  }
  return merges;
}

absl::Status CheckModel(const Json& model) {
  const std::string type = StringOf(model, "type");
  const bool is_bpe = type == "BPE" || (type.empty() && FieldOf(model, "merges") != nullptr);
  if (!is_bpe) return Unsupported("model.type", type.empty() ? "(none)" : type);
  if (const Json* dropout = FieldOf(model, "dropout"); dropout != nullptr && *dropout != 0) {
    return Unsupported("model.dropout", "other than null");
  }
  for (const char* field : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!StringOf(model, field).empty()) return Unsupported("model", field);
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeByteLevel(const Json& root, const Json& model,
                                                         const Pipeline& pipeline, Words words,
                                                         Vocabulary vocabulary) {
  if (const Json* decoder = FieldOf(root, "decoder");
      decoder != nullptr && StringOf(*decoder, "type") != "ByteLevel") {
    return Unsupported("decoder", StringOf(*decoder, "type"));
  }
  ByteLevelParts parts;
  parts.source = kFile;
  parts.vocabulary = std::move(vocabulary);
  parts.vocabulary.bytes = std::move(words.names);
  ASSIGN_OR_RETURN(parts.merges, ReadMerges(model));
  parts.splits = pipeline.splits;
  parts.nfc = pipeline.nfc;
  parts.ignore_merges = BoolOf(model, "ignore_merges", false);
  return MakeByteLevelBpe(std::move(parts));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> MakeMarked(const Json& model, const Pipeline& pipeline,
                                                      Words words, Vocabulary vocabulary) {
  if (BoolOf(model, "ignore_merges", false)) {
    return Unsupported("model.ignore_merges", "with a SentencePiece vocabulary");
  }
  SentencePieceParts parts;
  parts.source = kFile;
  parts.model.algorithm = SentencePieceModel::Algorithm::kBpe;
  parts.model.byte_fallback = BoolOf(model, "byte_fallback", false);
  parts.model.add_dummy_prefix = pipeline.prefix;
  parts.model.remove_extra_whitespaces = false;
  parts.prefix_first_only = pipeline.prefix_first_only;
  parts.fuse_unknown = BoolOf(model, "fuse_unk", false);
  const std::string unknown = StringOf(model, "unk_token");
  parts.model.unk_id = -1;
  for (size_t id = 0; id < words.names.size(); ++id) {
    SentencePieceModel::Piece piece{.text = words.names[id]};
    const std::string& name = words.names[id];
    if (!unknown.empty() && name == unknown) parts.model.unk_id = static_cast<int32_t>(id);
    if (parts.model.byte_fallback && name.size() == 6 && name.starts_with("<0x") &&
        name[5] == '>') {
      piece.type = PieceType::kByte;
    }
    parts.model.pieces.push_back(std::move(piece));
  }
  ASSIGN_OR_RETURN(parts.merges, ReadMerges(model));
  parts.merges_by_rank = true;
  parts.vocabulary = std::move(vocabulary);
  return MakeSentencePiece(std::move(parts));
}

}  // namespace

absl::StatusOr<std::unique_ptr<Tokenizer>> ParseTokenizerJson(std::string_view json,
                                                              const TokenizerSideFiles& side) {
  if (json.size() > kMaxTokenizerFileBytes) return Invalid("the file", "is too large");
  ASSIGN_OR_RETURN(const Json root, ParseJsonObject(kFile, json));
  ASSIGN_OR_RETURN(SideInfo info, ParseSideFiles(side));
  const Json* model = FieldOf(root, "model");
  if (model == nullptr || !model->is_object())
    return Invalid("model", "is missing or not an object");
  RETURN_IF_ERROR(CheckModel(*model));
  ASSIGN_OR_RETURN(const Pipeline pipeline, ReadPipeline(root));
  Words words;
  RETURN_IF_ERROR(AddVocab(*model, &words));
  RETURN_IF_ERROR(AddAddedTokens(root, &words));

  Vocabulary vocabulary;
  vocabulary.kinds = words.kinds;
  if (!pipeline.bos.empty()) {
    info.bos = pipeline.bos;
    vocabulary.add_bos = true;
  }
  RETURN_IF_ERROR(FinishVocabulary(words.names, info, &vocabulary));
  return pipeline.byte_level
             ? MakeByteLevel(root, *model, pipeline, std::move(words), std::move(vocabulary))
             : MakeMarked(*model, pipeline, std::move(words), std::move(vocabulary));
}

}  // namespace entropyserve
