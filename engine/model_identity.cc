#include "engine/model_identity.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/sessions/session_file.h"

namespace entropyserve {

absl::StatusOr<std::string> ModelIdentity(const Checkpoint& checkpoint, DType dtype) {
  const ModelConfig& c = checkpoint.config();
  std::string text = absl::StrCat(checkpoint.Fingerprint(), " ", int(dtype), " ");
  const auto add = [&](const std::string& name, int64_t rows, int64_t cols) -> absl::Status {
    if (!checkpoint.Has(name)) return absl::OkStatus();
    std::vector<float> row(cols);
    // A fine-tuned model differs in every row: three will do.
    for (const int64_t r : {int64_t{0}, rows / 2, rows - 1}) {
      RETURN_IF_ERROR(checkpoint.Read(name, {rows, cols}, r, r + 1, DType::kF32, row.data()));
      text.append(reinterpret_cast<const char*>(row.data()), row.size() * sizeof(float));
    }
    return absl::OkStatus();
  };
  RETURN_IF_ERROR(add("model.embed_tokens.weight", c.vocab, c.hidden));
  const int64_t kv_rows = int64_t{c.kv_heads} * c.head_dim;
  for (const int layer : {0, c.layers / 2, c.layers - 1}) {
    for (const char* part : {"k_proj", "v_proj"}) {
      RETURN_IF_ERROR(add(absl::StrCat("model.layers.", layer, ".self_attn.", part, ".weight"),
                          kv_rows, c.hidden));
    }
  }
  return HexDigest(text);
}

}  // namespace entropyserve
