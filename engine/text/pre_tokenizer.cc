#include "engine/text/pre_tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/base/status_macros.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

// Unicode's White_Space, which is \s in the patterns' own dialect. PCRE2's \s also has U+180E,
// which has not been white space since Unicode 6.3.
#define ES_SPACE                                                                      \
  R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f})" \
  R"(\x{205f}\x{3000})"

#define ES_WORDS_AND_REST(digits)                                                      \
  R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}++|)" digits "| ?[^" ES_SPACE \
  R"(\p{L}\p{N}]++[\r\n]*+|[)" ES_SPACE R"(]*[\r\n]++|[)" ES_SPACE "]+(?![^" ES_SPACE  \
  "])|[" ES_SPACE "]++"

// Possessive where giving back a character could not help: the patterns stay linear on long runs.
constexpr const char* kGpt2Regex =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}++| ?\p{N}++| ?[^)" ES_SPACE R"(\p{L}\p{N}]++|[)" ES_SPACE
    "]+(?![^" ES_SPACE "])|[" ES_SPACE "]++";
constexpr const char* kLlama3Regex = ES_WORDS_AND_REST(R"(\p{N}{1,3})");
constexpr const char* kQwen2Regex = ES_WORDS_AND_REST(R"(\p{N})");
constexpr const char* kSingleDigitRegex = R"(\p{N})";
constexpr const char* kDigitRunRegex = R"(\p{N}++)";

const char* RegexOf(SplitPattern pattern) {
  switch (pattern) {
    case SplitPattern::kGpt2:
      return kGpt2Regex;
    case SplitPattern::kLlama3:
      return kLlama3Regex;
    case SplitPattern::kQwen2:
      return kQwen2Regex;
    case SplitPattern::kSingleDigit:
      return kSingleDigitRegex;
    case SplitPattern::kDigitRun:
      return kDigitRunRegex;
  }
  Check(false, "a known pattern");
  return nullptr;
}

// Limits per byte of text: the patterns need about one step a byte, a run of white space two.
constexpr uint32_t kMatchStepsPerByte = 8;
constexpr uint32_t kMatchStepsAtLeast = 10'000;
// For PCRE2's interpreter, where there is no JIT: its default of 20 GiB is no limit.
constexpr uint32_t kMatchHeapKib = 512 * 1024;

template <auto Free>
struct Deleter {
  template <typename T>
  void operator()(T* pointer) const {
    Free(pointer);
  }
};

}  // namespace

struct PreTokenizer::Step {
  std::unique_ptr<pcre2_code, Deleter<pcre2_code_free>> code;
};

std::optional<SplitPattern> FindSplitPattern(std::string_view regex) {
  if (regex ==
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)") {
    return SplitPattern::kLlama3;
  }
  if (regex ==
      R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)") {
    return SplitPattern::kQwen2;
  }
  if (regex == R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)") {
    return SplitPattern::kGpt2;
  }
  return std::nullopt;
}

PreTokenizer::PreTokenizer(const std::vector<SplitPattern>& steps) {
  for (const SplitPattern pattern : steps) {
    int error = 0;
    PCRE2_SIZE offset = 0;
    auto step = std::make_unique<Step>();
    step->code.reset(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(RegexOf(pattern)),
                                   PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error, &offset,
                                   nullptr));
    Check(step->code != nullptr, "the patterns compile");
    // Without JIT (not every machine has it) the interpreter gives the same matches, slower.
    pcre2_jit_compile(step->code.get(), PCRE2_JIT_COMPLETE);
    steps_.push_back(std::move(step));
  }
}

PreTokenizer::~PreTokenizer() = default;
PreTokenizer::PreTokenizer(PreTokenizer&&) noexcept = default;

// What one call of Split reuses for every piece.
struct PreTokenizer::Scratch {
  std::unique_ptr<pcre2_match_data, Deleter<pcre2_match_data_free>> match;
  std::unique_ptr<pcre2_match_context, Deleter<pcre2_match_context_free>> context;
};

absl::Status PreTokenizer::Split(std::string_view text, const PieceFn& piece) const {
  Scratch scratch;
  scratch.match.reset(pcre2_match_data_create(1, nullptr));
  scratch.context.reset(pcre2_match_context_create(nullptr));
  Check(scratch.match != nullptr && scratch.context != nullptr, "memory for a match");
  const uint64_t limit = kMatchStepsAtLeast + uint64_t{kMatchStepsPerByte} * text.size();
  pcre2_set_match_limit(scratch.context.get(),
                        static_cast<uint32_t>(std::min<uint64_t>(limit, UINT32_MAX)));
  pcre2_set_heap_limit(scratch.context.get(), kMatchHeapKib);
  return SplitFrom(0, text, scratch, piece);
}

absl::Status PreTokenizer::SplitFrom(size_t step, std::string_view text, const Scratch& scratch,
                                     const PieceFn& piece) const {
  if (text.empty()) return absl::OkStatus();
  if (step == steps_.size()) return piece(text);
  for (size_t pos = 0; pos < text.size();) {
    // The text was checked once; a check in every match would make the whole quadratic.
    const auto run = [&](uint32_t options) {
      return pcre2_match(steps_[step]->code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()),
                         text.size(), pos, PCRE2_NO_UTF_CHECK | options, scratch.match.get(),
                         scratch.context.get());
    };
    int found = run(0);
    if (found == PCRE2_ERROR_JIT_STACKLIMIT) found = run(PCRE2_NO_JIT);
    if (found == PCRE2_ERROR_NOMATCH) return SplitFrom(step + 1, text.substr(pos), scratch, piece);
    if (found < 0) {
      return absl::ResourceExhaustedError(absl::StrCat("text: the pre-tokenizer gave up at byte ",
                                                       pos, " (PCRE2 error ", found, ")"));
    }
    // Read before the next step's matches overwrite it.
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch.match.get());
    const size_t begin = range[0];
    const size_t end = range[1];
    Check(end > begin && begin >= pos, "no pattern matches the empty string");
    RETURN_IF_ERROR(SplitFrom(step + 1, text.substr(pos, begin - pos), scratch, piece));
    RETURN_IF_ERROR(SplitFrom(step + 1, text.substr(begin, end - begin), scratch, piece));
    pos = end;
  }
  return absl::OkStatus();
}

}  // namespace entropyserve
