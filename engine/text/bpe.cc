#include "engine/text/bpe.h"

#include <algorithm>
#include <functional>
#include <utility>

#include "engine/base/status_macros.h"
#include "kernels/check.h"

namespace entropyserve {
namespace {

constexpr int32_t kDead = -1;
constexpr uint32_t kEnd = UINT32_MAX;

}  // namespace

void MergeQueue::Start(size_t symbols, int32_t ranks) {
  heap_.clear();
  current_.clear();
  taken_ = 0;
  waiting_.clear();
  heap_ranks_ = uint64_t{UINT32_MAX} + 1;
  if (symbols < kLongWord) return;
  heap_ranks_ = 0;
  waiting_.resize(static_cast<size_t>(ranks));
}

void MergeQueue::Push(Entry entry) {
  if (entry.rank >= heap_ranks_) {
    waiting_[entry.rank].push_back(entry.position);
    return;
  }
  heap_.push_back(uint64_t{entry.rank} << 32 | entry.position);
  std::push_heap(heap_.begin(), heap_.end(), std::greater<>());
}

std::optional<MergeQueue::Entry> MergeQueue::Pop() {
  if (taken_ == current_.size() && heap_.empty() && !NextRank()) return std::nullopt;
  if (taken_ < current_.size()) {
    const uint64_t next = (heap_ranks_ - 1) << 32 | current_[taken_];
    if (heap_.empty() || next < heap_.front()) {
      ++taken_;
      return Entry{static_cast<uint32_t>(next >> 32), static_cast<uint32_t>(next)};
    }
  }
  std::pop_heap(heap_.begin(), heap_.end(), std::greater<>());
  const uint64_t next = heap_.back();
  heap_.pop_back();
  return Entry{static_cast<uint32_t>(next >> 32), static_cast<uint32_t>(next)};
}

bool MergeQueue::NextRank() {
  while (heap_ranks_ < waiting_.size() && waiting_[heap_ranks_].empty()) ++heap_ranks_;
  if (heap_ranks_ >= waiting_.size()) return false;
  current_ = std::move(waiting_[heap_ranks_++]);
  std::sort(current_.begin(), current_.end());
  taken_ = 0;
  return true;
}

void BpeMerger::Enqueue(uint32_t left) {
  const Symbol& symbol = symbols_[left];
  if (symbol.next == kEnd) return;
  const PairTable::Merge* merge = pairs_.Find(symbol.id, symbols_[symbol.next].id);
  if (merge == nullptr) return;
  queue_.Push({static_cast<uint32_t>(merge->rank), left});
  ++operations_;
}

absl::StatusOr<std::span<const int32_t>> BpeMerger::Merge(std::span<const int32_t> symbols) {
  Check(symbols.size() < kEnd, "positions are 32 bits wide");
  const uint32_t count = static_cast<uint32_t>(symbols.size());
  symbols_.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    symbols_[i] = {symbols[i], i + 1 < count ? i + 1 : kEnd, i > 0 ? i - 1 : kEnd};
  }
  queue_.Start(count, pairs_.ranks());
  for (uint32_t i = 0; i < count; ++i) {
    RETURN_IF_ERROR(meter_.Add());
    Enqueue(i);
  }
  while (const std::optional<MergeQueue::Entry> entry = queue_.Pop()) {
    RETURN_IF_ERROR(meter_.Add());
    __builtin_prefetch(&symbols_[queue_.Ahead()]);
    // An entry may be out of date: what it was made for has merged with something else. Whatever
    // pair stands there now is merged if it has the entry's rank, since its turn is now too.
    Symbol& left = symbols_[entry->position];
    if (left.id == kDead || left.next == kEnd) continue;
    Symbol& right = symbols_[left.next];
    const PairTable::Merge* merge = pairs_.Find(left.id, right.id);
    if (merge == nullptr || static_cast<uint32_t>(merge->rank) != entry->rank) continue;
    left.id = merge->id;
    left.next = right.next;
    right.id = kDead;
    if (left.next != kEnd) symbols_[left.next].previous = entry->position;
    Enqueue(entry->position);
    if (left.previous != kEnd) Enqueue(left.previous);
  }
  ids_.clear();
  for (const Symbol& symbol : symbols_) {
    if (symbol.id != kDead) ids_.push_back(symbol.id);
  }
  return std::span<const int32_t>(ids_);
}

void WordCache::Add(std::string_view word, std::span<const int32_t> ids) {
  if (word.size() > kMaxWordBytes || words_.size() >= kMaxWords) return;
  words_[word] = {static_cast<uint32_t>(ids_.size()), static_cast<uint32_t>(ids.size())};
  ids_.insert(ids_.end(), ids.begin(), ids.end());
}

std::optional<std::span<const int32_t>> WordCache::Find(std::string_view word) const {
  if (word.size() > kMaxWordBytes) return std::nullopt;
  const auto found = words_.find(word);
  if (found == words_.end()) return std::nullopt;
  return std::span(ids_).subspan(found->second.begin, found->second.size);
}

}  // namespace entropyserve
