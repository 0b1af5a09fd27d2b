#include "engine/weights/gguf_tokenizer.h"

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"

namespace entropyserve {
namespace {

// An id, -1 when the key is absent. Some writers store "none" as 0xffffffff.
absl::StatusOr<int32_t> Id(const GgufFile& file, const char* key) {
  ASSIGN_OR_RETURN(const int64_t id, file.IntOr(key, -1));
  if (id == -1 || id == int64_t{UINT32_MAX}) return -1;
  if (id < 0 || id > INT32_MAX) {
    return absl::InvalidArgumentError(absl::StrCat(file.name(), ": ", key, ": ", id, " is no id"));
  }
  return int32_t(id);
}

absl::Status OptionalBool(const GgufFile& file, const char* key, std::optional<bool>* out) {
  if (!file.Has(key)) return absl::OkStatus();
  ASSIGN_OR_RETURN(*out, file.BoolOr(key, false));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GgufTokenizerData> ReadGgufTokenizer(const GgufFile& file) {
  GgufTokenizerData data;
  ASSIGN_OR_RETURN(data.model, file.String("tokenizer.ggml.model"));
  ASSIGN_OR_RETURN(data.pre, file.StringOr("tokenizer.ggml.pre", ""));
  ASSIGN_OR_RETURN(data.tokens, file.Strings("tokenizer.ggml.tokens"));
  if (file.Has("tokenizer.ggml.scores")) {
    ASSIGN_OR_RETURN(data.scores, file.Floats("tokenizer.ggml.scores"));
  }
  if (file.Has("tokenizer.ggml.token_type")) {
    ASSIGN_OR_RETURN(data.types, file.Ints("tokenizer.ggml.token_type"));
  }
  if (file.Has("tokenizer.ggml.merges")) {
    ASSIGN_OR_RETURN(data.merges, file.Strings("tokenizer.ggml.merges"));
  }
  ASSIGN_OR_RETURN(data.bos_id, Id(file, "tokenizer.ggml.bos_token_id"));
  ASSIGN_OR_RETURN(data.eos_id, Id(file, "tokenizer.ggml.eos_token_id"));
  ASSIGN_OR_RETURN(data.eot_id, Id(file, "tokenizer.ggml.eot_token_id"));
  ASSIGN_OR_RETURN(data.unk_id, Id(file, "tokenizer.ggml.unknown_token_id"));
  RETURN_IF_ERROR(OptionalBool(file, "tokenizer.ggml.add_bos_token", &data.add_bos));
  RETURN_IF_ERROR(OptionalBool(file, "tokenizer.ggml.add_space_prefix", &data.add_space_prefix));
  ASSIGN_OR_RETURN(data.chat_template, file.StringOr("tokenizer.chat_template", ""));
  return data;
}

absl::StatusOr<GgufTokenizerData> ReadGgufTokenizer(const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<GgufFile> file, GgufFile::Open(path));
  return ReadGgufTokenizer(*file);
}

}  // namespace entropyserve
