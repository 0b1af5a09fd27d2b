// Cuts text into the pieces inside which byte-level BPE merges. The patterns are the ones that
// model families were trained with, known here by name: a file selects one, its regular expressions
// are never run.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "absl/status/status.h"

namespace entropyserve {

enum class SplitPattern : uint8_t {
  kGpt2,         // the ByteLevel component's own
  kLlama3,       // digits in groups of up to three
  kQwen2,        // the same, digits one by one; Qwen2, Qwen2.5, Qwen3
  kSingleDigit,  // Digits(individual_digits); SmolLM2, before kGpt2
  kDigitRun,     // Digits without it
};

// The pattern whose text, as tokenizer.json writes it, is `regex`.
std::optional<SplitPattern> FindSplitPattern(std::string_view regex);

// Constant after construction: Split may run on several threads at once.
class PreTokenizer {
 public:
  using PieceFn = std::function<absl::Status(std::string_view)>;

  // Every step cuts the pieces of the step before; no steps leave the text whole.
  explicit PreTokenizer(const std::vector<SplitPattern>& steps);
  ~PreTokenizer();
  PreTokenizer(PreTokenizer&&) noexcept;

  // Calls piece(text) for every piece of `text` in order, which together are the whole text. `text`
  // is valid UTF-8. Stops at the first error of `piece`. RESOURCE_EXHAUSTED: the matcher reached
  // its limit, which grows with the text.
  absl::Status Split(std::string_view text, const PieceFn& piece) const;

 private:
  struct Step;
  struct Scratch;
  absl::Status SplitFrom(size_t step, std::string_view text, const Scratch& scratch,
                         const PieceFn& piece) const;

  std::vector<std::unique_ptr<Step>> steps_;
};

}  // namespace entropyserve
