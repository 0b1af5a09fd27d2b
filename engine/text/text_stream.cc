#include "engine/text/text_stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace entropyserve {

StopMatcher::StopMatcher(const std::vector<std::string>& patterns) : nodes_(1) {
  for (const std::string& pattern : patterns) {
    Check(!pattern.empty(), "a stop string has at least one byte");
    int32_t node = 0;
    for (const char c : pattern) {
      int32_t child = Child(node, static_cast<uint8_t>(c));
      if (child < 0) {
        child = static_cast<int32_t>(nodes_.size());
        nodes_[node].children.emplace_back(static_cast<uint8_t>(c), child);
        Node fresh;
        fresh.depth = nodes_[node].depth + 1;
        nodes_.push_back(std::move(fresh));
      }
      node = child;
    }
    nodes_[node].match = static_cast<uint32_t>(pattern.size());
  }
  // Breadth first: a node's failure link is shorter, so it is final before the node is visited.
  std::vector<int32_t> order = {0};
  for (size_t i = 0; i < order.size(); ++i) {
    for (const auto& [byte, child] : nodes_[order[i]].children) {
      int32_t fail = nodes_[order[i]].fail;
      while (fail != 0 && Child(fail, byte) < 0) fail = nodes_[fail].fail;
      const int32_t next = order[i] == 0 ? -1 : Child(fail, byte);
      nodes_[child].fail = std::max(next, 0);
      if (nodes_[child].match == 0) nodes_[child].match = nodes_[nodes_[child].fail].match;
      order.push_back(child);
    }
  }
}

int32_t StopMatcher::Child(int32_t node, uint8_t byte) const {
  for (const auto& [label, child] : nodes_[node].children) {
    if (label == byte) return child;
  }
  return -1;
}

size_t StopMatcher::Push(uint8_t byte) {
  int32_t child = Child(state_, byte);
  while (child < 0 && state_ != 0) {
    state_ = nodes_[state_].fail;
    child = Child(state_, byte);
  }
  state_ = std::max(child, 0);
  return nodes_[state_].match;
}

absl::StatusOr<TextStream> TextStream::Create(const Tokenizer& tokenizer, Options options) {
  if (options.stops.size() > kMaxStops) {
    return absl::InvalidArgumentError(
        absl::StrCat("stop: ", options.stops.size(), " strings, at most ", kMaxStops));
  }
  for (size_t i = 0; i < options.stops.size(); ++i) {
    const std::string& stop = options.stops[i];
    const std::string field = absl::StrCat("stop[", i, "]: ");
    if (stop.empty()) return absl::InvalidArgumentError(field + "must not be empty");
    if (stop.size() > kMaxStopBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, stop.size(), " bytes, at most ", kMaxStopBytes));
    }
    if (!IsValidUtf8(stop)) return absl::InvalidArgumentError(field + "must be valid UTF-8");
  }
  return TextStream(tokenizer, std::move(options));
}

TextStream::TextStream(const Tokenizer& tokenizer, Options options)
    : tokenizer_(&tokenizer),
      skip_special_(options.skip_special),
      at_start_(options.strip_leading_space && tokenizer.strips_leading_space()),
      matcher_(options.stops) {}

// Adds one whole character: text leaves `held_` at character boundaries only.
void TextStream::Take(std::string_view character, std::string* out) {
  held_.append(character);
  for (const char c : character) {
    const size_t match = matcher_.Push(static_cast<uint8_t>(c));
    if (match == 0) continue;
    // Stop strings are whole characters, so a match ends where this character ends.
    matched_stop_ = held_.substr(held_.size() - match);
    held_.resize(held_.size() - match);
    out->append(held_);
    held_.clear();
    stopped_ = true;
    return;
  }
  const size_t certain = held_.size() - matcher_.pending();
  out->append(held_, 0, certain);
  held_.erase(0, certain);
}

std::string TextStream::Push(int32_t id) {
  std::string out;
  if (stopped_ || (skip_special_ && tokenizer_->IsControl(id))) return out;
  std::string bytes = std::move(partial_);
  partial_.clear();
  bytes.append(tokenizer_->TokenBytes(id));
  std::string_view rest = bytes;
  if (at_start_ && !rest.empty()) {
    at_start_ = false;
    if (rest.front() == ' ') rest.remove_prefix(1);
  }
  while (!rest.empty() && !stopped_) {
    const Utf8Step step = NextUtf8(rest);
    if (step.incomplete) {
      partial_ = std::string(rest);
      break;
    }
    Take(step.valid ? rest.substr(0, step.length) : "\xEF\xBF\xBD", &out);
    rest.remove_prefix(step.length);
  }
  return out;
}

std::string TextStream::Flush() {
  std::string out;
  if (stopped_) return out;
  if (!partial_.empty()) {
    partial_.clear();
    Take("\xEF\xBF\xBD", &out);
  }
  if (!stopped_) out.append(held_);
  held_.clear();
  matcher_.Reset();
  return out;
}

}  // namespace entropyserve
