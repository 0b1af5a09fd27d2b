#include "kernels/cuda/range_allocator.h"

#include <algorithm>
#include <iterator>

#include "kernels/check.h"

namespace entropyserve {

RangeAllocator::RangeAllocator(size_t size) {
  size -= size % kAlignment;
  if (size > 0) Insert(0, size);
}

void RangeAllocator::Insert(size_t offset, size_t size) {
  free_.emplace(offset, size);
  free_by_size_.emplace(size, offset);
}

void RangeAllocator::Remove(size_t offset, size_t size) {
  free_.erase(offset);
  auto [first, last] = free_by_size_.equal_range(size);
  free_by_size_.erase(std::find_if(first, last, [&](auto& e) { return e.second == offset; }));
}

size_t RangeAllocator::Alloc(size_t bytes) {
  if (bytes > kNone - kAlignment) return kNone;
  const size_t size = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  const auto it = free_by_size_.lower_bound(size);
  if (it == free_by_size_.end()) return kNone;
  const auto [have, offset] = *it;
  Remove(offset, have);
  if (have > size) Insert(offset + size, have - size);
  taken_.emplace(offset, size);
  used_ += size;
  return offset;
}

size_t RangeAllocator::Free(size_t offset) {
  const auto taken = taken_.find(offset);
  Check(taken != taken_.end(), "RangeAllocator::Free of a range that is not taken");
  const size_t freed = taken->second;
  taken_.erase(taken);
  used_ -= freed;
  size_t begin = offset, size = freed;
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && next->first == begin + size) {
    const auto [next_offset, next_size] = *next;
    Remove(next_offset, next_size);
    size += next_size;
  }
  auto after = free_.lower_bound(offset);
  if (after != free_.begin()) {
    const auto [prev_offset, prev_size] = *std::prev(after);
    if (prev_offset + prev_size == begin) {
      Remove(prev_offset, prev_size);
      begin = prev_offset;
      size += prev_size;
    }
  }
  Insert(begin, size);
  return freed;
}

size_t RangeAllocator::largest_free() const {
  return free_by_size_.empty() ? 0 : free_by_size_.rbegin()->first;
}

}  // namespace entropyserve
