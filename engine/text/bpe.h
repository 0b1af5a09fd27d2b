// Byte-pair merging of one piece of text in O(n log n), whatever the piece: a run of one character
// 8 MiB long is one piece.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/hash/hash.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "engine/text/work_meter.h"

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
  void Add(int32_t left, int32_t right, Merge merge) {
    merges_[Key(left, right)] = merge;
    ranks_ = std::max(ranks_, merge.rank + 1);
  }
  const Merge* Find(int32_t left, int32_t right) const {
    const auto found = merges_.find(Key(left, right));
    return found == merges_.end() ? nullptr : &found->second;
  }
  int32_t ranks() const { return ranks_; }  // all ranks are below it

 private:
  static uint64_t Key(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  absl::flat_hash_map<uint64_t, Merge> merges_;
  int32_t ranks_ = 0;
};

// The pairs that may merge: the lowest rank comes out first, the leftmost of equals. A heap; but
// one over a word of megabytes misses the caches at every level, so pairs of long words wait in one
// list per rank, which are written and read in order, until their rank's turn.
class MergeQueue {
 public:
  struct Entry {
    uint32_t rank;
    uint32_t position;
  };

  // Forgets everything, for a word of `symbols` symbols and ranks below `ranks`.
  void Start(size_t symbols, int32_t ranks);
  void Push(Entry entry);
  std::optional<Entry> Pop();
  // A position that soon comes out, probably; the word is larger than the caches.
  uint32_t Ahead() const {
    return taken_ + kAhead < current_.size() ? current_[taken_ + kAhead] : 0;
  }

 private:
  static constexpr size_t kAhead = 16;          // a few hundred ns of merges
  static constexpr size_t kLongWord = 1 << 15;  // symbols; a heap of 256 kB

  // Makes the list of the next rank that has one the current one. False: there is none.
  bool NextRank();

  std::vector<uint64_t> heap_;  // rank << 32 | position of ranks below heap_ranks_
  uint64_t heap_ranks_ = 0;
  // Rank heap_ranks_ - 1: positions in order, of which the first taken_ have come out.
  std::vector<uint32_t> current_;
  size_t taken_ = 0;
  std::vector<std::vector<uint32_t>> waiting_;  // positions by rank, from heap_ranks_ on
};

// Scratch for merging; one per call of Encode, so that the tokenizer itself stays constant.
class BpeMerger {
 public:
  BpeMerger(const PairTable& pairs, WorkMeter* meter) : pairs_(pairs), meter_(*meter) {}

  // Merges the pair of lowest rank, the leftmost of equals, until no pair is left. `symbols` are
  // ids (any ids that the table's pairs may name); at most 2^32 - 1 of them. The result is valid
  // until the next call. Errors are the meter's.
  absl::StatusOr<std::span<const int32_t>> Merge(std::span<const int32_t> symbols);

  // Queue entries made so far: the work done, for tests of its growth.
  int64_t operations() const { return operations_; }

 private:
  void Enqueue(uint32_t left);

  const PairTable& pairs_;
  WorkMeter& meter_;
  struct Symbol {
    int32_t id;  // kDead once merged into its left neighbour
    uint32_t next;
    uint32_t previous;
  };
  std::vector<Symbol> symbols_;  // by position
  std::vector<int32_t> ids_;     // the result
  MergeQueue queue_;
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
