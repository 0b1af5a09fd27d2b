// Hands out ranges of one region. Best fit, neighbours merge when freed; host-side bookkeeping
// only, so it serves device memory and is tested without a device. Not thread-safe.
#pragma once

#include <cstddef>
#include <map>
#include <unordered_map>

namespace entropyserve {

class RangeAllocator {
 public:
  // Enough for 16-byte vector accesses, TMA (128) and cuBLASLt's best kernels (256).
  static constexpr size_t kAlignment = 256;
  static constexpr size_t kNone = ~size_t{0};

  explicit RangeAllocator(size_t size);

  // Offset of `bytes` free bytes (a multiple of kAlignment), or kNone. 0 bytes take one unit.
  size_t Alloc(size_t bytes);
  // Returns the size that Alloc took. `offset` must come from Alloc and be freed once.
  size_t Free(size_t offset);

  size_t used() const { return used_; }
  size_t largest_free() const;  // the largest Alloc that succeeds now

 private:
  void Insert(size_t offset, size_t size);
  void Remove(size_t offset, size_t size);

  size_t used_ = 0;
  std::map<size_t, size_t> free_;               // offset -> size
  std::multimap<size_t, size_t> free_by_size_;  // size -> offset
  std::unordered_map<size_t, size_t> taken_;    // offset -> size
};

}  // namespace entropyserve
