#include "engine/text/bpe.h"

#include <algorithm>
#include <functional>

#include "kernels/check.h"

namespace entropyserve {
namespace {

constexpr int32_t kDead = -1;
constexpr uint32_t kEnd = UINT32_MAX;

}  // namespace

void BpeMerger::Enqueue(uint32_t left) {
  const uint32_t right = next_[left];
  if (right == kEnd) return;
  const PairTable::Merge* merge = pairs_.Find(ids_[left], ids_[right]);
  if (merge == nullptr) return;
  queue_.push_back(static_cast<uint64_t>(static_cast<uint32_t>(merge->rank)) << 32 | left);
  ++operations_;
}

std::span<const int32_t> BpeMerger::Merge(std::span<const int32_t> symbols) {
  Check(symbols.size() < kEnd, "positions are 32 bits wide");
  const uint32_t count = static_cast<uint32_t>(symbols.size());
  ids_.assign(symbols.begin(), symbols.end());
  next_.resize(count);
  previous_.resize(count);
  for (uint32_t i = 0; i < count; ++i) {
    next_[i] = i + 1 < count ? i + 1 : kEnd;
    previous_[i] = i > 0 ? i - 1 : kEnd;
  }
  queue_.clear();
  for (uint32_t i = 0; i < count; ++i) Enqueue(i);
  std::make_heap(queue_.begin(), queue_.end(), std::greater<>());

  const auto push = [&](uint32_t left) {
    const size_t before = queue_.size();
    Enqueue(left);
    if (queue_.size() > before) std::push_heap(queue_.begin(), queue_.end(), std::greater<>());
  };
  while (!queue_.empty()) {
    std::pop_heap(queue_.begin(), queue_.end(), std::greater<>());
    const uint64_t entry = queue_.back();
    queue_.pop_back();
    const uint32_t left = static_cast<uint32_t>(entry);
    // An entry may be out of date: what it was made for has merged with something else. Whatever
    // pair stands there now is merged if it has the entry's rank, since its turn is now too.
    if (ids_[left] == kDead || next_[left] == kEnd) continue;
    const uint32_t right = next_[left];
    const PairTable::Merge* merge = pairs_.Find(ids_[left], ids_[right]);
    if (merge == nullptr || static_cast<uint32_t>(merge->rank) != entry >> 32) continue;
    ids_[left] = merge->id;
    ids_[right] = kDead;
    next_[left] = next_[right];
    if (next_[left] != kEnd) previous_[next_[left]] = left;
    push(left);
    if (previous_[left] != kEnd) push(previous_[left]);
  }
  ids_.erase(std::remove(ids_.begin(), ids_.end(), kDead), ids_.end());
  return ids_;
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
