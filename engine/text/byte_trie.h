// A set of byte strings with the longest-match walk that vocabularies need.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "absl/container/flat_hash_map.h"

namespace entropyserve {

class ByteTrie {
 public:
  static constexpr int32_t kNone = -1;

  // A string inserted twice keeps the last value (>= 0). Empty strings are ignored.
  void Insert(std::string_view key, int32_t value) {
    if (key.empty()) return;
    int32_t node = 0;
    for (const char c : key) node = edges_.try_emplace(Edge(node, c), ++last_node_).first->second;
    values_[node] = value;
    starts_[static_cast<uint8_t>(key[0])] = true;
  }

  bool empty() const { return values_.empty(); }

  // No key begins with this byte: saves the walk for almost every position.
  bool MayStart(char byte) const { return starts_[static_cast<uint8_t>(byte)]; }

  // Calls visit(length, value) for every key that is a prefix of `text`, shortest first.
  template <typename Visit>
  void ForEachPrefix(std::string_view text, Visit visit) const {
    if (text.empty() || !MayStart(text[0])) return;
    int32_t node = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      const auto edge = edges_.find(Edge(node, text[i]));
      if (edge == edges_.end()) return;
      node = edge->second;
      if (const auto value = values_.find(node); value != values_.end())
        visit(i + 1, value->second);
    }
  }

  struct Match {
    size_t length = 0;
    int32_t value = kNone;
  };
  // The longest key that is a prefix of `text`; length 0 when there is none.
  Match Longest(std::string_view text) const {
    Match best;
    ForEachPrefix(text, [&](size_t length, int32_t value) { best = {length, value}; });
    return best;
  }

  // The value of exactly this key.
  int32_t Find(std::string_view key) const {
    const Match match = Longest(key);
    return !key.empty() && match.length == key.size() ? match.value : kNone;
  }

 private:
  static uint64_t Edge(int32_t node, char byte) {
    return static_cast<uint64_t>(node) << 8 | static_cast<uint8_t>(byte);
  }

  // Node numbers are unique, not dense: a lookup that finds its edge leaves a gap.
  int32_t last_node_ = 0;
  absl::flat_hash_map<uint64_t, int32_t> edges_;
  absl::flat_hash_map<int32_t, int32_t> values_;
  bool starts_[256] = {};
};

}  // namespace entropyserve
