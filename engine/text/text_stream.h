// Sampled ids to text, one at a time: the text is always valid UTF-8, and no part of a stop string
// is ever released before it is known not to be one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/text/tokenizer.h"
#include "engine/text/utf8.h"

namespace entropyserve {

// Finds the earliest end of any of several byte strings, one byte at a time (Aho-Corasick). Its
// state says how many of the bytes seen last could be the beginning of a match.
class StopMatcher {
 public:
  StopMatcher() : StopMatcher(std::vector<std::string>{}) {}
  explicit StopMatcher(const std::vector<std::string>& patterns);  // none empty

  // Returns the length of the longest pattern that ends with this byte, or 0.
  size_t Push(uint8_t byte);
  // The longest suffix of what was pushed that is a proper prefix of a pattern, in bytes.
  size_t pending() const { return nodes_[state_].depth; }
  void Reset() { state_ = 0; }

 private:
  struct Node {
    std::vector<std::pair<uint8_t, int32_t>> children;  // few: a handful of patterns
    int32_t fail = 0;
    uint32_t depth = 0;
    uint32_t match = 0;  // length of the longest pattern that ends here
  };
  int32_t Child(int32_t node, uint8_t byte) const;

  std::vector<Node> nodes_;
  int32_t state_ = 0;
};

// One answer's text. Memory is bounded by the longest stop string and one token.
class TextStream {
 public:
  static constexpr size_t kMaxStops = 32;
  static constexpr size_t kMaxStopBytes = 1024;

  struct Options {
    std::vector<std::string> stops = {};
    bool skip_special = true;  // control tokens give no text
    // Drop the space that a SentencePiece vocabulary puts before the first word: for an answer to
    // messages. False when the answer continues the prompt's text.
    bool strip_leading_space = false;
  };

  // `tokenizer` must outlive the stream. INVALID_ARGUMENT names `stop`: too many, an empty or too
  // long one, or one that is not valid UTF-8.
  static absl::StatusOr<TextStream> Create(const Tokenizer& tokenizer, Options options);

  // Feeds one sampled id and returns the text that is now certain; often empty. After a stop string
  // was found nothing more comes.
  std::string Push(int32_t id);

  // The end of the answer: what was held back. An incomplete character becomes U+FFFD.
  std::string Flush();

  // A stop string was found; text before it has been returned, it and what follows never will be.
  bool stopped() const { return stopped_; }
  // The stop string that was found; empty before.
  const std::string& matched_stop() const { return matched_stop_; }

 private:
  TextStream(const Tokenizer& tokenizer, Options options);
  void Take(std::string_view character, std::string* out);

  const Tokenizer* tokenizer_;
  bool skip_special_;
  bool at_start_;  // the next byte may be a leading space to drop
  StopMatcher matcher_;
  std::string partial_;  // an incomplete character, at most 3 bytes
  std::string held_;     // valid text that may be the beginning of a stop string
  std::string matched_stop_;
  bool stopped_ = false;
};

}  // namespace entropyserve
