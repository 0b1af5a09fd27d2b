// Byte-pair merging of one piece of text in O(n log n), whatever the piece: a run of one character
// 8 MiB long is one piece.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"
#include "absl/strings/string_view.h"

namespace entropyserve {

// Seeded per process, so that a text cannot be made of words that collide. (Debian's
// absl::string_view is its own class, and std::string_view has no absl hash.)
struct TextHash {
  using is_transparent = void;
  size_t operator()(std::string_view text) const {
    return absl::HashOf(absl::string_view(text.data(), text.size()));
  }
};
struct TextEqual {
  using is_transparent = void;
  bool operator()(std::string_view a, std::string_view b) const { return a == b; }
};
template <typename Key, typename Value>
using TextMap = absl::flat_hash_map<Key, Value, TextHash, TextEqual>;

// Which neighbours merge into which token, and in what order: lower ranks first.
class PairTable {
 public:
  struct Merge {
    int32_t rank;
    int32_t id;
  };

  void Reserve(size_t pairs) { merges_.reserve(pairs); }
  // A pair added twice keeps the last rule, as the `tokenizers` library does.
  void Add(int32_t left, int32_t right, Merge merge) { merges_[Key(left, right)] = merge; }
  const Merge* Find(int32_t left, int32_t right) const {
    const auto found = merges_.find(Key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
  }

 private:
  static uint64_t Key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  absl::flat_hash_map<uint64_t, Merge> merges_;
};

// Scratch for merging; one per call of Encode, so that the tokenizer itself stays constant.
class BpeMerger {
 public:
  explicit BpeMerger(const PairTable& pairs) : pairs_(pairs) {}

  // Merges the pair of lowest rank, the leftmost of equals, until no pair is left. `symbols` are
  // ids (any ids that the table's pairs may name); at most 2^32 - 1 of them. The result is valid
  // until the next call.
  std::span<const int32_t> Merge(std::span<const int32_t> symbols);

  // Queue entries made so far: the work done, for tests of its growth.
  int64_t operations() const { return operations_; }

 private:
  void Enqueue(uint32_t left);

  const PairTable& pairs_;
  std::vector<int32_t> ids_;  // by position; kDead once merged into its left neighbour
  std::vector<uint32_t> next_;
  std::vector<uint32_t> previous_;
  std::vector<uint64_t> queue_;  // heap of rank << 32 | position
  int64_t operations_ = 0;
};

// The ids of pieces already merged in this call: text repeats its words. Bounded, and per call, so
// it needs no lock.
class WordCache {
 public:
  // The ids of `word`, which must have been the last argument of a Find that returned nothing.
  void Add(std::string_view word, std::span<const int32_t> ids);
  std::optional<std::span<const int32_t>> Find(std::string_view word) const;

 private:
  static constexpr size_t kMaxWords = 1 << 16;  // about 4 MiB of table
  static constexpr size_t kMaxWordBytes = 64;   // longer pieces rarely come back
  struct Range {
    uint32_t begin;
    uint32_t size;
  };
  TextMap<std::string_view, Range> words_;
  std::vector<int32_t> ids_;
};

}  // namespace entropyserve
