#include "engine/text/tokenizer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "engine/text/byte_trie.h"
#include "engine/text/utf8.h"
#include "kernels/check.h"

namespace entropyserve {

Tokenizer::Tokenizer(Vocabulary vocabulary) : vocab_(std::move(vocabulary)) {
  Check(vocab_.bytes.size() == vocab_.kinds.size(), "one kind per token");
  auto added = std::make_unique<ByteTrie>();
  auto user_defined = std::make_unique<ByteTrie>();
  for (int32_t id = 0; id < vocab_size(); ++id) {
    // A name that is not UTF-8 cannot occur in text, and must not cut a character in two.
    if (vocab_.kinds[id] == TokenKind::kText || !IsValidUtf8(vocab_.bytes[id])) continue;
    added->Insert(vocab_.bytes[id], id);
    if (vocab_.kinds[id] == TokenKind::kUserDefined && vocab_.splits_user_defined) {
      user_defined->Insert(vocab_.bytes[id], id);
    }
  }
  added_ = std::move(added);
  user_defined_ = std::move(user_defined);
}

Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       const EncodeOptions& options) const {
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("text: ", text.size(), " bytes, at most ", kMaxTextBytes));
  }
  std::string repaired;
  if (!IsValidUtf8(text)) {
    repaired = SanitizeUtf8(text);
    text = repaired;
  }
  std::vector<int32_t> ids;
  if (options.add_bos && vocab_.bos_id.has_value()) ids.push_back(*vocab_.bos_id);

  WorkMeter meter(options.keep_going);
  const ByteTrie& found_here = options.parse_special ? *added_ : *user_defined_;
  size_t section = 0;  // where the text that belongs to no added token began
  const auto encode_section = [&](size_t end) -> absl::Status {
    if (section == end) return absl::OkStatus();
    return EncodeText(text.substr(section, end - section), options.text_start && section == 0,
                      &meter, &ids);
  };
  if (!found_here.empty()) {
    for (size_t pos = 0; pos < text.size();) {
      const ByteTrie::Match match = found_here.Longest(text.substr(pos));
      const bool cut = match.length > 0 && (IsControl(match.value) || vocab_.splits_user_defined);
      if (!cut) {
        ++pos;
        continue;
      }
      RETURN_IF_ERROR(encode_section(pos));
      ids.push_back(match.value);
      pos += match.length;
      section = pos;
    }
  }
  RETURN_IF_ERROR(encode_section(text.size()));
  return ids;
}

std::string Tokenizer::Decode(std::span<const int32_t> ids, bool skip_special) const {
  std::string bytes;
  bool strip = vocab_.strips_leading_space;
  for (const int32_t id : ids) {
    if (IsControl(id)) {
      if (!skip_special) bytes.append(TokenBytes(id));
      continue;
    }
    std::string_view token = TokenBytes(id);
    if (strip && !token.empty()) {
      strip = false;
      if (token.front() == ' ') token.remove_prefix(1);
    }
    bytes.append(token);
  }
  return SanitizeUtf8(bytes);
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  return IsValid(id) ? std::string_view(vocab_.bytes[id]) : std::string_view();
}

std::optional<int32_t> Tokenizer::FindAdded(std::string_view name) const {
  const int32_t id = added_->Find(name);
  return id == ByteTrie::kNone ? std::nullopt : std::optional<int32_t>(id);
}

std::optional<int32_t> Tokenizer::FindControl(std::string_view name) const {
  const std::optional<int32_t> id = FindAdded(name);
  return id.has_value() && IsControl(*id) ? id : std::nullopt;
}

bool Tokenizer::IsEos(int32_t id) const {
  return std::find(vocab_.eos_ids.begin(), vocab_.eos_ids.end(), id) != vocab_.eos_ids.end();
}

}  // namespace entropyserve
