#include <utf8proc.h>

#include <algorithm>
#include <vector>

#include "engine/text/byte_level_bpe.h"
#include "engine/text/utf8.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

// The longest canonical decomposition of one character is 4 code points (Unicode 13).
constexpr int kMaxDecomposition = 18;

void AppendDecomposed(uint32_t code_point, std::vector<utf8proc_int32_t>* out) {
  utf8proc_int32_t parts[kMaxDecomposition];
  int boundclass = 0;
  const utf8proc_ssize_t count = utf8proc_decompose_char(
      static_cast<utf8proc_int32_t>(code_point), parts, kMaxDecomposition,
      static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_DECOMPOSE), &boundclass);
  Check(count >= 0 && count <= kMaxDecomposition, "a canonical decomposition fits");
  out->insert(out->end(), parts, parts + count);
}

// Canonical order: every run of marks sorted by combining class. utf8proc's own sort is quadratic
// in the length of a run, which a text of nothing but marks would make very long.
void SortMarks(std::vector<utf8proc_int32_t>* points) {
  const auto class_of = [](utf8proc_int32_t c) {
    return utf8proc_get_property(c)->combining_class;
  };
  for (auto begin = points->begin(); begin != points->end();) {
    if (class_of(*begin) == 0) {
      ++begin;
      continue;
    }
    const auto end = std::find_if(begin, points->end(), [&](auto c) { return class_of(c) == 0; });
    std::stable_sort(begin, end, [&](auto a, auto b) { return class_of(a) < class_of(b); });
    begin = end;
  }
}

void AppendNormalized(std::string_view text, std::string* out) {
  std::vector<utf8proc_int32_t> points;
  points.reserve(text.size());
  while (!text.empty()) {
    const int length = NextUtf8(text).length;
    AppendDecomposed(DecodeUtf8(text, length), &points);
    text.remove_prefix(length);
  }
  SortMarks(&points);
  const utf8proc_ssize_t count =
      utf8proc_normalize_utf32(points.data(), static_cast<utf8proc_ssize_t>(points.size()),
                               static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  Check(count >= 0, "composition of valid code points");
  for (utf8proc_ssize_t i = 0; i < count; ++i) AppendUtf8(static_cast<uint32_t>(points[i]), out);
}

}  // namespace

std::string NormalizeNfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  const auto is_ascii = [](char c) { return static_cast<uint8_t>(c) < 0x80; };
  while (!text.empty()) {
    // ASCII is its own normal form, but its last character may take a mark that follows.
    const size_t ascii = std::find_if_not(text.begin(), text.end(), is_ascii) - text.begin();
    if (ascii == text.size()) {
      out.append(text);
      break;
    }
    const size_t begin = ascii == 0 ? 0 : ascii - 1;
    out.append(text.substr(0, begin));
    text.remove_prefix(begin);
    const size_t end = std::find_if(text.begin() + 1, text.end(), is_ascii) - text.begin();
    AppendNormalized(text.substr(0, end), &out);
    text.remove_prefix(end);
  }
  return out;
}

}  // namespace entropyserve
