#include "engine/text/sentencepiece_normalizer.h"

#include <algorithm>

#include "absl/status/status.h"
#include "engine/text/utf8.h"

namespace entropyserve {
namespace {

// A unit of the double array (the format of the darts-clone library): bit 8 says that a value hangs
// below, bits 10-30 are the offset to the children, shifted by 8 where bit 9 is set; a value's unit
// has bit 31 set.
bool HasLeaf(uint32_t unit) { return (unit >> 8 & 1) != 0; }
uint32_t ValueOf(uint32_t unit) { return unit & 0x7FFFFFFF; }
uint32_t LabelOf(uint32_t unit) { return unit & 0x800000FF; }
uint32_t OffsetOf(uint32_t unit) { return (unit >> 10) << ((unit & 0x200) >> 6); }

// No entry of a real map comes near; a hostile trie may loop, or turn a letter into a book.
constexpr size_t kMaxKeyBytes = 128;
constexpr size_t kMaxReplacementBytes = 1024;

uint32_t ReadUint32(std::string_view bytes) {
  uint32_t value = 0;
  for (int i = 0; i < 4; ++i) value |= uint32_t{static_cast<uint8_t>(bytes[i])} << (8 * i);
  return value;
}

}  // namespace

absl::StatusOr<CharsMap> CharsMap::Parse(std::string_view blob) {
  CharsMap map;
  if (blob.empty()) return map;
  const auto malformed = [] {
    return absl::InvalidArgumentError(
        "tokenizer.model: truncated or malformed normalizer_spec.precompiled_charsmap");
  };
  if (blob.size() < 4) return malformed();
  const uint32_t trie_bytes = ReadUint32(blob);
  blob.remove_prefix(4);
  if (trie_bytes == 0 || trie_bytes % 4 != 0 || trie_bytes > blob.size()) return malformed();
  map.units_.resize(trie_bytes / 4);
  for (uint32_t& unit : map.units_) {
    unit = ReadUint32(blob);
    blob.remove_prefix(4);
  }
  if (blob.empty() || blob.back() != '\0' || !IsValidUtf8(blob)) return malformed();
  for (size_t begin = 0; begin < blob.size();) {
    const size_t end = blob.find('\0', begin);
    if (end - begin > kMaxReplacementBytes) return malformed();
    begin = end + 1;
  }
  map.replacements_ = std::string(blob);
  return map;
}

CharsMap::Match CharsMap::Longest(std::string_view text) const {
  Match best;
  if (units_.empty()) return best;
  uint64_t position = OffsetOf(units_[0]);
  for (size_t i = 0; i < std::min(text.size(), kMaxKeyBytes); ++i) {
    const uint32_t label = static_cast<uint8_t>(text[i]);
    position ^= label;
    if (label == 0 || position >= units_.size() || LabelOf(units_[position]) != label) break;
    const uint32_t unit = units_[position];
    position ^= OffsetOf(unit);
    if (!HasLeaf(unit)) continue;
    if (position >= units_.size()) break;
    const uint32_t value = ValueOf(units_[position]);
    if (value >= replacements_.size()) break;
    best.length = i + 1;
    best.replacement = std::string_view(replacements_.c_str() + value);
  }
  return best;
}

std::string SentencePieceNormalizer::Normalize(std::string_view text, const ByteTrie& protect,
                                               bool prefix) const {
  const std::string_view space = escape_whitespaces ? kSpaceMark : std::string_view(" ");
  // The next step of the text: what is consumed and what it becomes.
  const auto step = [&](std::string_view rest) -> CharsMap::Match {
    if (const ByteTrie::Match kept = protect.Longest(rest); kept.length > 0) {
      return {kept.length, rest.substr(0, kept.length)};
    }
    if (const CharsMap::Match mapped = charsmap.Longest(rest); mapped.length > 0) return mapped;
    const size_t length = NextUtf8(rest).length;
    return {length, rest.substr(0, length)};
  };

  std::string out;
  out.reserve(text.size() + text.size() / 4 + kSpaceMark.size());
  if (remove_extra_whitespaces) {
    while (!text.empty()) {
      const CharsMap::Match next = step(text);
      if (next.replacement != " ") break;
      text.remove_prefix(next.length);
    }
  }
  if (text.empty()) return out;
  if (add_dummy_prefix && prefix) out.append(space);

  bool after_space = remove_extra_whitespaces;
  while (!text.empty()) {
    const CharsMap::Match next = step(text);
    text.remove_prefix(next.length);
    std::string_view piece = next.replacement;
    while (after_space && !piece.empty() && piece.front() == ' ') piece.remove_prefix(1);
    if (!piece.empty()) {
      for (const char c : piece) c == ' ' ? out.append(space) : out.append(1, c);
      after_space = remove_extra_whitespaces && piece.back() == ' ';
    }
  }
  if (remove_extra_whitespaces) {
    while (out.ends_with(space)) out.resize(out.size() - space.size());
  }
  return out;
}

}  // namespace entropyserve
