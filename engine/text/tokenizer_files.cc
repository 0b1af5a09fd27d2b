#include "engine/text/tokenizer_files.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/json_reader.h"

namespace entropyserve {
namespace {

constexpr std::string_view kConfig = "tokenizer_config.json";
constexpr std::string_view kGeneration = "generation_config.json";

// What the known chat templates build conversations from (chat_template.cc).
constexpr std::string_view kTemplateMarkers[] = {
    "<|im_start|>",      "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "[unused9]",         "[unused10]",
};

// A special token is written as its name or as {"content": name, ...}.
std::string TokenName(const Json& config, const char* field) {
  const Json* value = FieldOf(config, field);
  if (value == nullptr) return "";
  return value->is_string() ? value->get<std::string>() : StringOf(*value, "content");
}

// One template, or a list of named ones of which "default" is for conversations.
std::string TemplateOf(const Json& config) {
  const Json* value = FieldOf(config, "chat_template");
  if (value == nullptr) return "";
  if (value->is_string()) return value->get<std::string>();
  if (!value->is_array()) return "";
  for (const Json& entry : *value) {
    if (StringOf(entry, "name") == "default") return StringOf(entry, "template");
  }
  return "";
}

absl::Status ParseConfig(std::string_view text, SideInfo* info) {
  ASSIGN_OR_RETURN(const Json config, ParseJsonObject(kConfig, text));
  info->bos = TokenName(config, "bos_token");
  info->eos = TokenName(config, "eos_token");
  if (const Json* add = FieldOf(config, "add_bos_token"); add != nullptr) {
    if (!add->is_boolean()) return JsonError(kConfig, "add_bos_token", "is not true or false");
    info->add_bos = add->get<bool>();
  }
  info->chat_template = TemplateOf(config);
  const Json* added = FieldOf(config, "added_tokens_decoder");
  if (added == nullptr) return absl::OkStatus();
  if (!added->is_object()) return JsonError(kConfig, "added_tokens_decoder", "is not an object");
  for (const auto& [key, token] : added->items()) {
    const Json id = Json::parse(key, nullptr, false);
    const std::optional<int32_t> number = IdOf(id, kMaxVocabularySize);
    const std::string content = StringOf(token, "content");
    if (!number.has_value() || content.empty() || content.size() > kMaxTokenBytes) {
      return JsonError(kConfig, "added_tokens_decoder",
                       "has an entry without a valid id and content");
    }
    info->added.push_back({*number, content, BoolOf(token, "special", false)});
  }
  // Keys are sorted as text; ids are wanted in order.
  std::sort(info->added.begin(), info->added.end(),
            [](const auto& a, const auto& b) { return a.id < b.id; });
  return absl::OkStatus();
}

absl::Status ParseGeneration(std::string_view text, SideInfo* info) {
  ASSIGN_OR_RETURN(const Json config, ParseJsonObject(kGeneration, text));
  const Json* eos = FieldOf(config, "eos_token_id");
  if (eos == nullptr) return absl::OkStatus();
  const auto add = [&](const Json& value) {
    const std::optional<int32_t> id = IdOf(value, kMaxVocabularySize);
    if (id.has_value()) info->eos_ids.push_back(*id);
    return id.has_value();
  };
  const bool ok =
      eos->is_array() ? eos->size() <= 64 && std::all_of(eos->begin(), eos->end(), add) : add(*eos);
  return ok ? absl::OkStatus()
            : JsonError(kGeneration, "eos_token_id", "is not an id or a list of ids");
}

std::optional<int32_t> FindName(const std::vector<std::string>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (name.empty() || found == names.end()) return std::nullopt;
  return static_cast<int32_t>(found - names.begin());
}

// NOT_FOUND when there is no such file.
absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path) {
  const std::string name = path.filename().string();
  std::error_code error;
  const auto size = std::filesystem::file_size(path, error);
  if (error) return absl::NotFoundError(absl::StrCat(name, ": no such file"));
  if (size > kMaxTokenizerFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": ", size, " bytes, at most ", kMaxTokenizerFileBytes));
  }
  std::ifstream file(path, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (file.bad() || text.size() != size) {
    return absl::InvalidArgumentError(absl::StrCat(name, ": cannot be read"));
  }
  return text;
}

absl::StatusOr<std::string> ReadOptional(const std::filesystem::path& path) {
  absl::StatusOr<std::string> text = ReadFile(path);
  if (absl::IsNotFound(text.status())) return std::string();
  return text;
}

}  // namespace

absl::StatusOr<SideInfo> ParseSideFiles(const TokenizerSideFiles& files) {
  SideInfo info;
  if (!files.tokenizer_config.empty()) RETURN_IF_ERROR(ParseConfig(files.tokenizer_config, &info));
  if (!files.generation_config.empty()) {
    RETURN_IF_ERROR(ParseGeneration(files.generation_config, &info));
  }
  if (!files.chat_template.empty()) info.chat_template = files.chat_template;
  return info;
}

absl::Status FinishVocabulary(const std::vector<std::string>& names, const SideInfo& side,
                              Vocabulary* vocabulary) {
  vocabulary->chat_template = side.chat_template;
  if (!side.bos.empty()) {
    vocabulary->bos_id = FindName(names, side.bos);
    if (!vocabulary->bos_id.has_value()) {
      return JsonError(kConfig, "bos_token", "is not in the vocabulary");
    }
  }
  std::vector<int32_t> eos = side.eos_ids;
  if (!side.eos.empty()) {
    const std::optional<int32_t> id = FindName(names, side.eos);
    if (!id.has_value()) return JsonError(kConfig, "eos_token", "is not in the vocabulary");
    eos.push_back(*id);
  }
  eos.insert(eos.end(), vocabulary->eos_ids.begin(), vocabulary->eos_ids.end());
  vocabulary->eos_ids.clear();
  for (const int32_t id : eos) {
    if (id < 0 || static_cast<size_t>(id) >= names.size()) {
      return JsonError(kGeneration, "eos_token_id", "is not in the vocabulary");
    }
    if (std::count(vocabulary->eos_ids.begin(), vocabulary->eos_ids.end(), id) == 0) {
      vocabulary->eos_ids.push_back(id);
    }
  }
  if (side.add_bos.has_value()) vocabulary->add_bos = *side.add_bos;
  vocabulary->add_bos &= vocabulary->bos_id.has_value();

  // A token that merges can make stays text even if some setting also lets it end an answer.
  for (const int32_t id : vocabulary->eos_ids) {
    if (vocabulary->kinds[id] == TokenKind::kUserDefined)
      vocabulary->kinds[id] = TokenKind::kControl;
  }
  for (const std::string& name : {side.bos, side.eos}) {
    const std::optional<int32_t> id = FindName(names, name);
    if (id.has_value()) vocabulary->kinds[*id] = TokenKind::kControl;
  }
  for (const std::string_view marker : kTemplateMarkers) {
    if (side.chat_template.find(marker) == std::string::npos) continue;
    const std::optional<int32_t> id = FindName(names, marker);
    if (id.has_value()) vocabulary->kinds[*id] = TokenKind::kControl;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Tokenizer>> LoadTokenizer(const std::string& folder) {
  const std::filesystem::path path(folder);
  TokenizerSideFiles side;
  ASSIGN_OR_RETURN(side.tokenizer_config, ReadOptional(path / kConfig));
  ASSIGN_OR_RETURN(side.generation_config, ReadOptional(path / kGeneration));
  ASSIGN_OR_RETURN(side.chat_template, ReadOptional(path / "chat_template.jinja"));
  absl::StatusOr<std::string> json = ReadFile(path / "tokenizer.json");
  if (json.ok()) return ParseTokenizerJson(*json, side);
  if (!absl::IsNotFound(json.status())) return json.status();
  absl::StatusOr<std::string> model = ReadFile(path / "tokenizer.model");
  if (model.ok()) return ParseSentencePiece(*model, side);
  if (!absl::IsNotFound(model.status())) return model.status();
  return absl::NotFoundError("neither tokenizer.json nor tokenizer.model is in the model's folder");
}

}  // namespace entropyserve
